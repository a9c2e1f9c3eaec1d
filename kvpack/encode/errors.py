"""What can go wrong with an input, an output or an option, besides a file that breaks the format."""

from __future__ import annotations


class InputError(ValueError):
    """The input, the output or an option cannot be used; the message says why and what would do."""


class NotInstalledError(RuntimeError):
    """An option needs a package that is not installed; the message says what to install."""


class OtherFilesError(InputError):
    """A directory is not replaced, since it holds what is no part of an output. The message lists it."""
