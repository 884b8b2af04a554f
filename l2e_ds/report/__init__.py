"""`l2e-ds report`: one page of runs and studies, for a browser without a network. Reads run directories only."""

# Of the extra `report`: said in one line where one is missing.
PACKAGES = ("matplotlib",)
GENERATOR = "l2e-ds report"  # by which a page of ours is known
