"""What neurons answer to: the analysis of finished models and checkpoints (METHOD, section 8)."""

# Of the extra `analysis`: said in one line where one is missing.
PACKAGES = ("matplotlib", "pandas", "pyarrow", "scipy")
