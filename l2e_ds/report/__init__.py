"""`l2e-ds report`: one page of runs and studies, for a browser without a network. Reads run directories only."""

# Packages of the extra `report`. A missing one is reported in one line.
PACKAGES = ("matplotlib",)
GENERATOR = "l2e-ds report"  # by which a report is recognised
