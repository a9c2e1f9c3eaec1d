"""Makes transformers know kvpack, whichever of the two is imported first.

transformers has no entry points for what extends it. ``import kvpack`` must not import transformers, which takes
seconds; so a finder on ``sys.meta_path`` waits for the modules of :data:`ON_IMPORT` and calls a function once each of
them has run. Where they are loaded already, the functions are called at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Module of transformers → "module:function" of kvpack, called without arguments when it has been imported. A function
# may be called more than once, and does nothing the second time.
ON_IMPORT: dict[str, str] = {
    "transformers.quantizers.auto": "kvpack.integrations.transformers.quantizer:register",
    "peft.tuners.lora.model": "kvpack.integrations.peft:register",
    "transformers.modeling_utils": "kvpack.integrations.transformers.attention:register",
    "transformers.generation.utils": "kvpack.integrations.transformers.generation:register",
}


def _call(module: str) -> None:
    """A failure must not keep transformers from being imported: other models have nothing to do with kvpack."""
    import importlib
    import warnings

    home, _, function = ON_IMPORT[module].partition(":")
    try:
        imported = importlib.import_module(home)
        if hasattr(imported, function):
            getattr(imported, function)()
        # else this import of the module is one of that module's own, which registers when it has run.
    except Exception as error:
        warnings.warn(
            f"kvpack could not extend {module}: {type(error).__name__}: {error}; compressed models will not load "
            "(kvpack needs transformers 5.17 or later, and torch)",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterImport:
    """A finder. No subclass of importlib.abc.MetaPathFinder, whose module takes as long to import as all of this."""

    def __init__(self, modules: set[str]) -> None:
        self.waiting = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        from importlib.util import find_spec

        self.waiting.remove(fullname)  # the next line asks all finders, this one among them
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _call(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Have transformers know kvpack now, or as soon as it is imported. Calling it again does nothing."""
    waited_for = {name for finder in sys.meta_path if isinstance(finder, _AfterImport) for name in finder.waiting}
    missing = set()
    for module in ON_IMPORT:
        if module in sys.modules:
            _call(module)
        elif module not in waited_for:
            missing.add(module)
    if missing:
        sys.meta_path.insert(0, _AfterImport(missing))
