"""The command line: parse, call, print. Nothing imports it but the ``kvpack`` script and ``python -m kvpack``."""

from kvpack.cli.application import app, main
from kvpack.cli.failures import ExitCode

__all__ = ["ExitCode", "app", "main"]
