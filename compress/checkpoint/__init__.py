"""Where values are: the source, what passes made of it, the packed folder, deltas."""
