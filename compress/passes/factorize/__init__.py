"""Passes that put thin factors in the place of a matrix."""
