"""Faults that are injected into real runs, and what they must not cost."""
