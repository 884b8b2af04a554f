"""What lies in a run directory: training writes it; reports, studies, exports and supervisors read it."""
