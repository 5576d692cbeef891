"""Packed modules and their registration with transformers."""
