"""The finder that waits for modules: it calls once they have run, whatever else was done with them, and breaks none."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvpack  # noqa: F401
from kvpack.integrations.transformers import registration

PACKAGE = "package_that_is_waited_for"
MODULE = f"{PACKAGE}.first"


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What has been called, with ``MODULE`` among those that are waited for; its file is in the temporary folder."""
    (tmp_path / PACKAGE).mkdir()
    for name in ("__init__", "first", "second"):
        (tmp_path / PACKAGE / f"{name}.py").write_text("")
    monkeypatch.setitem(registration.ON_IMPORT, MODULE, "nowhere:function")
    calls: list[str] = []
    monkeypatch.setattr(registration, "_call", calls.append)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield calls
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def test_once_when_it_has_run(called: list[str]) -> None:
    importlib.import_module(f"{PACKAGE}.second")
    assert called == []
    importlib.import_module(MODULE)
    importlib.import_module(MODULE)
    assert called == [MODULE]


def test_after_somebody_has_looked_for_it(called: list[str]) -> None:
    assert importlib.util.find_spec(MODULE) is not None
    assert called == []
    importlib.import_module(MODULE)
    assert called == [MODULE]


def test_after_an_import_that_failed(called: list[str], tmp_path: Path) -> None:
    file = tmp_path / PACKAGE / "first.py"
    file.write_text("raise ImportError('not yet')  # and then some text, so that the size differs")
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(MODULE)
    assert called == []
    file.write_text("")
    importlib.invalidate_caches()
    importlib.import_module(MODULE)
    assert called == [MODULE]


def test_after_a_reload(called: list[str]) -> None:
    importlib.reload(importlib.import_module(MODULE))
    assert called == [MODULE, MODULE]


def test_modules_of_one_archive(called: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loader is one object."""
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        for name in ("__init__", "first", "second", "third"):
            archive.writestr(f"{PACKAGE}/{name}.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "modules.zip"))
    for name in ("first", "second", "third"):
        importlib.import_module(f"{PACKAGE}.{name}")
    assert called == [MODULE]


class _Fixed:
    """A loader that takes no attributes."""

    __slots__ = ()

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.has_run = True


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, _Fixed()) if name == MODULE else None  # type: ignore[arg-type]


def test_a_loader_that_cannot_be_changed(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    sys.meta_path.insert(1, _Finder())  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="a _Fixed loads it"):
        assert importlib.import_module(MODULE).has_run
    assert called == []


def test_kvpack_that_fails_breaks_no_import(
    called: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where warnings are errors either, as here."""
    monkeypatch.undo()
    monkeypatch.setitem(registration.ON_IMPORT, "sys", "kvpack.no_such_module:register")
    registration._call("sys")
    assert "kvpack could not extend sys: ModuleNotFoundError" in capsys.readouterr().err


def test_one_finder() -> None:
    registration.register_when_imported()
    assert sum(isinstance(finder, registration._AfterImport) for finder in sys.meta_path) == 1
