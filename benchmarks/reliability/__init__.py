"""Inject faults into real runs, and check that they cost no more than they may."""
