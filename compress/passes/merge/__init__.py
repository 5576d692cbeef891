"""Merging passes: several models of one architecture become one."""
