"""What neurons answer to: the analysis of finished models and checkpoints (METHOD, section 8)."""
