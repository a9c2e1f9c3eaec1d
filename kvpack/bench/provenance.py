"""When, where and with what a measurement was made: what every result file says about itself."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from kvpack._version import __version__
from kvpack.bench.codec import cpu_name
from kvpack.encode.threads import default_threads

PACKAGE = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(name: str) -> str | None:
    """The installed version of a distribution; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Date, commit, processor and versions.

    The commit is that of the checkout, or ``$KVPACK_COMMIT`` where the sources lie without their history; an installed
    package lies in no checkout of its own, even if its folder is inside somebody's.
    """
    checkout = bool(_git("ls-files", "--error-unmatch", "_version.py"))
    commit = _git("rev-parse", "HEAD") if checkout else ""
    changed = _git("status", "--porcelain", "--", ".") if checkout else ""
    names = ["numpy", "numba", "ml_dtypes", "safetensors", *packages]
    return {
        "kvpack": __version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or os.environ.get("KVPACK_COMMIT"),
        "package_changed_since_commit": bool(changed) if commit else None,
        "cpu": cpu_name(),
        "cores": default_threads(),
        "load_at_start": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in names},
    }


def kvpack_command() -> str:
    """This process's command line as ``kvpack …``; paths by their last part, since results name no places."""
    shown = ["kvpack"]
    for argument in sys.argv[1:]:
        option, separator, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(option + separator + (Path(value).name if os.sep in value else value))
    return " ".join(shown)
