"""Passes that train a few parameters of a compressed model."""
