"""What neurons answer to: the analysis of finished models and checkpoints (docs/analysis.md)."""

# Of the extra `analysis`: said in one line where one is missing.
PACKAGES = ("matplotlib", "pandas", "pyarrow", "scipy")
