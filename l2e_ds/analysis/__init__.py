"""What neurons respond to: the analysis of finished models and checkpoints (docs/analysis.md)."""

# Packages of the extra `analysis`. A missing one is reported in one line.
PACKAGES = ("matplotlib", "pandas", "pyarrow", "scipy")
