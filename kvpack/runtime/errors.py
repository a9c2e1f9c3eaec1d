"""Where errors of the runtime used to be: :mod:`kvpack.errors` has them all."""

from kvpack.errors import *  # noqa: F403
