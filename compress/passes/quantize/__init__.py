"""Passes onto a grid."""
