"""Which way the imports run (CONTRIBUTING.md), and what may be loaded when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from snapshot_samples import SamplePages, make_header, usual_formats

from kvpack.format.pages import PageFormat

ROOT = Path(__file__).resolve().parents[1]

CORE = {"numpy", "safetensors"}
ENCODE = CORE | {"numba", "ml_dtypes"}
RUNTIME = ENCODE | {"torch", "cupy", "rich"}

# room -> (what of kvpack it may import, which other packages; None means any)
RULES: dict[str, tuple[set[str], set[str] | None]] = {
    "format": ({"format"}, CORE),
    "encode": ({"format", "encode"}, ENCODE),
    "runtime/device": ({"format", "encode", "runtime.device"}, RUNTIME),
    "runtime/codec": ({"format", "encode", "runtime.device", "runtime.codec"}, RUNTIME),
    "runtime/weights": ({"format", "encode", "runtime.device", "runtime.codec", "runtime.weights"}, RUNTIME),
    "runtime/kv": ({"format", "encode", "runtime.device", "runtime.codec", "runtime.kv"}, RUNTIME),
    "bench": ({"format", "encode", "runtime", "bench"}, RUNTIME | {"matplotlib"}),
    "integrations": ({"format", "encode", "runtime", "integrations", "compression"}, None),
    "cli": ({"format", "encode", "runtime", "bench", "integrations", "cli", "compression"}, {"typer", "rich"}),
}
FOR_ALL = {"_version", "errors"}
# What `kvpack bench linear` and `kvpack kv bench` compare with. Only these files name them, and they load them when
# they measure: kvpack neither needs nor installs these packages.
PEERS = {
    "kvpack/bench/peers.py": {"nvidia", "entropack", "humming"},
    "kvpack/bench/int8_gemv_triton.py": {"triton"},
    "kvpack/bench/snapshot.py": {"lz4", "zstandard"},
}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, at whatever depth and under whatever condition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            prefix = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            if module == "kvpack":
                for alias in node.names:
                    yield node.lineno, f"kvpack.{alias.name}"
            elif module == "kvpack.runtime":
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if (
                function in {"import_module", "__import__"}
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                yield node.lineno, name.value


def violations(source: str, package: str, peers: frozenset[str] = frozenset()) -> list[str]:
    room = package.removeprefix("kvpack.").replace(".", "/")
    rooms, others = RULES[room if room in RULES else room.rpartition("/")[0]]
    others = None if others is None else others | peers
    found = []
    for line, module in imported_modules(ast.parse(source), package):
        first, _, rest = module.partition(".")
        if first == "kvpack":
            legal = any(f"{rest}.".startswith(f"{room}.") for room in rooms | FOR_ALL)
        else:
            legal = others is None or first in others or first in sys.stdlib_module_names
        if not legal:
            found.append(f"line {line}: {module}")
    return found


@pytest.mark.parametrize("room", RULES)
def test_import_direction(room: str) -> None:
    files = sorted((ROOT / "kvpack" / room).rglob("*.py"))
    assert files
    found = {}
    for file in files:
        package = ".".join(file.parent.relative_to(ROOT).parts)
        name = file.relative_to(ROOT).as_posix()
        if wrong := violations(file.read_text(encoding="utf-8"), package, frozenset(PEERS.get(name, ()))):
            found[name] = wrong
    assert not found


# room -> where the only files outside it are that import it
IMPORTERS = {"cli": "kvpack/__main__.py", "bench": "kvpack/cli/"}


@pytest.mark.parametrize("room", IMPORTERS)
def test_importers(room: str) -> None:
    """Of all files of kvpack, also of those that are in no room."""
    importers = set()
    for file in sorted((ROOT / "kvpack").rglob("*.py")):
        name = file.relative_to(ROOT)
        imports = imported_modules(ast.parse(file.read_text(encoding="utf-8")), ".".join(name.parent.parts))
        if any(f"{module}.".startswith(f"kvpack.{room}.") for _, module in imports):
            importers.add(name.as_posix())
    importers = {name for name in importers if not name.startswith(f"kvpack/{room}/")}
    assert importers
    assert {name for name in importers if not name.startswith(IMPORTERS[room])} == set()


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "kvpack").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {room.partition("/")[0] for room in RULES}


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_loaded_when_measured(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {found for function in functions for found in imported_modules(function, "kvpack.runtime")}
    of_peers = {found for found in imported_modules(tree, "kvpack.runtime") if found[1].split(".")[0] in PEERS[name]}
    assert of_peers
    assert of_peers <= inside


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kvpack.format", "import numba"),
        ("kvpack.format", "from kvpack.encode.rans import encoder_table"),
        ("kvpack.format", "from kvpack import encode"),
        ("kvpack.format", "from ..encode import rans"),
        ("kvpack.format", "from .. import encode"),
        ("kvpack.format", "import kvpack"),
        ("kvpack.encode", "def f():\n    import torch"),
        ("kvpack.encode", "if TYPE_CHECKING:\n    from kvpack.runtime import sources"),
        ("kvpack.encode", "import importlib\nimportlib.import_module('cupy')"),
        ("kvpack.runtime.kv", "from transformers import Cache"),
        ("kvpack.runtime.weights", "from kvpack.integrations import transformers"),
        ("kvpack.runtime.device", "import kvpack.cli"),
        ("kvpack.runtime.device", "from kvpack.runtime import weights"),
        ("kvpack.runtime.device", "from kvpack.runtime.kv.cache import KVCache"),
        ("kvpack.runtime.weights", "from kvpack.runtime.kv import page_pools"),
        ("kvpack.runtime.kv", "from kvpack.runtime.weights.load import load"),
        ("kvpack.runtime.kv", "from ..weights import load"),
        ("kvpack.integrations", "from kvpack.bench import timing"),
        ("kvpack.encode", "from kvpack.bench import provenance"),
        ("kvpack.runtime.codec", "from kvpack.runtime.weights import products"),
        ("kvpack.runtime.codec", "from kvpack.runtime import kv"),
        ("kvpack.runtime.weights", "from kvpack.bench import timing"),
        ("kvpack.integrations", "from kvpack.cli import app"),
        ("kvpack.bench", "from kvpack.cli.printing import shown_size"),
        ("kvpack.cli", "def f():\n    import torch"),
        ("kvpack.cli", "from transformers import AutoTokenizer"),
        ("kvpack.bench", "from kvpack import integrations"),
    ],
)
def test_wrong_imports_are_seen(package: str, source: str) -> None:
    assert violations(source, package)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kvpack.format", "import zlib\nimport numpy.typing as npt\nfrom . import layout"),
        ("kvpack.encode", "from kvpack._version import __version__\nfrom ..format import blob"),
        ("kvpack.runtime.device", "import torch\nfrom kvpack.encode.rans import decoder_table"),
        ("kvpack.runtime.kv", "from kvpack.runtime import device\nfrom kvpack.errors import CacheFullError"),
        ("kvpack.integrations", "import transformers\nfrom kvpack.runtime.device import sources"),
        ("kvpack.cli", "import typer\nfrom kvpack.bench import plot\nfrom kvpack.compression import compress"),
    ],
)
def test_right_imports_pass(package: str, source: str) -> None:
    assert not violations(source, package)


# folder of cuda/ -> the folders whose files it may include
CUDA_RULES = {
    "common": {"common"},
    "codec": {"common", "codec"},
    "weights": {"common", "codec", "weights"},
    "kv": {"common", "kv"},
    "bench": {"common", "bench"},
}


@pytest.mark.parametrize("folder", CUDA_RULES)
def test_include_direction(folder: str) -> None:
    sources = sorted((ROOT / "cuda" / folder).glob("*.cu*"))
    assert sources
    included = {
        (source.name, name)
        for source in sources
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', source.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {pair for pair in included if pair[1].partition("/")[0] not in CUDA_RULES[folder]} == set()
    assert {path.name for path in (ROOT / "cuda").iterdir() if path.is_dir()} == set(CUDA_RULES)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


IMPORT_ALL = """
import importlib, pkgutil, sys
name, *blocked = sys.argv[1:]
for module in blocked:
    sys.modules[module] = None
package = importlib.import_module(name)
for module in pkgutil.walk_packages(package.__path__, name + "."):
    importlib.import_module(module.name)
    print(module.name)
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("kvpack.format", ["torch", "cupy", "transformers", "numba"]),
        ("kvpack.encode", ["torch", "cupy", "transformers"]),
    ],
)
def test_imports_without(package: str, blocked: list[str]) -> None:
    done = run(IMPORT_ALL, package, *blocked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import kvpack
for name in sys.argv[1:]:
    try:
        getattr(kvpack, name)
    except ModuleNotFoundError as error:
        print(error.name, error)
"""


def test_what_needs_torch_says_what_to_install() -> None:
    names = ["KVCache", "RansLinear", "attention_with_kv_cache", "load", "replace_linears", "warmup"]
    done = run(WITHOUT_TORCH, *names, "PageFormat", "open")
    assert done.returncode == 0, done.stderr
    install = "which is not installed: pip install 'kvpack[cuda13]'"
    starts = [f"torch kvpack.{name} needs torch, {install}" for name in names]
    assert [line.partition(" (or")[0] for line in done.stdout.splitlines()] == starts


# A stand-in for the heavy packages sees each attempt to load one, be it installed here or not.
HELP = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

HEAVY = {"torch", "cupy", "numba", "transformers"}
loaded = []

class Recorder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name in HEAVY else None

    def create_module(self, spec):
        loaded.append(spec.name)

    def exec_module(self, module):
        raise ImportError(f"{module.__name__} must not be loaded here")

sys.meta_path.insert(0, Recorder())
from kvpack.cli import main
sys.argv = ["kvpack", *sys.argv[1:]]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
if loaded:
    sys.exit(f"loaded: {loaded}")
sys.exit(code)
"""


def test_help_loads_nothing_heavy() -> None:
    done = run(HELP, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_context_is_inspected_without_loading_anything_heavy(tmp_path: Path) -> None:
    header = make_header(200)
    SamplePages(header, usual_formats(header, PageFormat.INT4)).write(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path):
        done = run(HELP, "kv", "inspect", str(path))
        assert done.returncode == 0, done.stderr
        assert "INT4" in done.stdout
