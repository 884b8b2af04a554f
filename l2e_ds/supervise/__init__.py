"""Start a run through any launcher, stop it without losing a step, and restart it after a failure."""
