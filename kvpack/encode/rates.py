"""The rates that may be asked for, in bits a weight. Imports nothing: the command line shows them in its help."""

MIN_BITS = 1.5
# The highest rate that weights are quantized at. Above it they are coded exactly where that fits, else at this rate.
MAX_BITS = 7.5
# No tensor that is quantized has more.
MAX_ASKED_BITS = 32
LOSSLESS = "lossless"
# The lowest rate, in steps of 0.05, with a KL divergence of at most 0.01 on books-27m (docs/results/weight-quality.md).
DEFAULT_BITS = 4.85
