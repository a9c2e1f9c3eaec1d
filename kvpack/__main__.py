"""``python -m kvpack``."""

from kvpack.cli import main

main()
