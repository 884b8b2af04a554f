"""Networks: the sizes of Pythia, other families, their inhibited layers, their parameter counts."""
