"""Write a trained model for others to use: in the format of transformers, with a model card, on the hub."""
