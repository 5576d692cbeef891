"""Containers for finished weights. An exporter chooses bytes; it neither rounds nor rescales."""
