"""Shared by several test files: small models, Hypothesis strategies, the real models and data."""
