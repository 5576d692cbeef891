"""What a pipeline will do and cost, before it runs."""
