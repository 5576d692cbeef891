"""One small file for each family of models that needs facts of its own."""
