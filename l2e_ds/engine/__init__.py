"""DeepSpeed: its configuration and its engine."""
