"""What ``kvpack bench`` and ``kvpack tune`` run, with peers, timing, reports, plots and provenance.

Only the command line imports it.
"""
