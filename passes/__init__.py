"""Every pass, one verb per file."""
