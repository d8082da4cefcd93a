"""Backends: what runs an integer graph."""
