"""The pipeline file: read, checked, described."""
