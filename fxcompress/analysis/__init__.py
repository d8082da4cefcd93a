"""Shared questions about graphs; passes ask here and never re-derive."""
