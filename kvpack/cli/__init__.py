"""The command line: parse, call, print. Nothing imports it but the ``kvpack`` script and ``python -m kvpack``."""

from kvpack.cli.application import ExitCode, app, main

__all__ = ["ExitCode", "app", "main"]
