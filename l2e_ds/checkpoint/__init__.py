"""Checkpoints: saved and resumed by the trainer, read by everything that needs weights, managed by a command."""
