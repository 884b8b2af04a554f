"""Evaluate finished runs and models on the tasks of lm-evaluation-harness."""
