"""Networks: Pythia's sizes, other families, their inhibited layers, their counts."""
