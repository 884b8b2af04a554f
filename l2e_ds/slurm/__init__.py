"""Jobs of SLURM: `l2e-ds submit`, and what its batch scripts run."""
