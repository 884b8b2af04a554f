"""Evaluate runs and models on the tasks of lm-evaluation-harness, and let them continue texts."""
