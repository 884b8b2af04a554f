"""`l2e-ds plan`: memory, time and traffic of a run on given GPUs."""
