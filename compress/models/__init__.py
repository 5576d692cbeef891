"""What is known of models: blocks, sites, loading, symmetries."""
