"""A trained model for others: transformers' format, a model card, the hub."""
