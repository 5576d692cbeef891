"""Compressed deltas: what a fine-tune adds to its base, in one small file, read with the base as a model."""
