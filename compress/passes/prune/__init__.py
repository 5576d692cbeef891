"""Passes that zero weights."""
