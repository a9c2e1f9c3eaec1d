"""What ``kvpack bench`` runs, with peers, timing, reports, plots and provenance. Only the command line imports it."""
