"""Run files: their sections, how they are read, and how a batch is divided."""
