"""Passes that make up for what others lost."""
