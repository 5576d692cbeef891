"""A fine-tuned model as the difference from its base."""
