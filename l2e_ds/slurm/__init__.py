"""Submit runs to SLURM, and run them in its jobs."""
