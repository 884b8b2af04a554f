"""`l2e-ds doctor`: what this machine and launch offer a run."""
