"""Starts a run through any launcher, stops it without losing a step, and restarts it after a failure."""
