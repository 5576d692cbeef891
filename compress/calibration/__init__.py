"""Data, statistics and hooks."""
