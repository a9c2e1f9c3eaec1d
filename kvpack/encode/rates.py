"""The rates that may be asked for, in bits a weight. Imports nothing: the command line shows them in its help."""

MIN_BITS = 1.5
MAX_BITS = 7.5
# The lowest rate, in steps of 0.05, with a KL divergence of at most 0.01 on books-27m (docs/results/weight-quality.md).
DEFAULT_BITS = 4.85
