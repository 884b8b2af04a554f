"""`l2e-ds study`: a grid of runs over a base recipe, run, resumed and collected (docs/studies.md)."""
