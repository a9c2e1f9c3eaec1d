"""The documents show what the result files hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_documents_show_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "render_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
