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
    "transformers.modeling_utils": "kvpack.integrations.transformers.attention_registration:register",
    "transformers.generation.utils": "kvpack.integrations.transformers.generation:register",
}


def _call(module: str) -> None:
    """A failure must not keep transformers from being imported: other models have nothing to do with kvpack."""
    import importlib

    home, _, function = ON_IMPORT[module].partition(":")
    try:
        imported = importlib.import_module(home)
        if hasattr(imported, function):
            getattr(imported, function)()
        # else this import of the module is one of that module's own, which registers when it has run.
    except Exception as error:
        _warn(module, f"{type(error).__name__}: {error}")


def _warn(module: str, reason: str) -> None:
    import warnings

    text = (
        f"kvpack could not extend {module}: {reason}; compressed models will not load (kvpack needs transformers 5.17 "
        "or later, and torch)"
    )
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # where warnings are errors
        print(text, file=sys.stderr)


class _AfterImport:
    """A finder. No subclass of importlib.abc.MetaPathFinder, whose module takes as long to import as all of this.

    It stays when it has found a module: who asked may not have run it, and a module may be loaded once more.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ON_IMPORT:
            return None
        others = (getattr(finder, "find_spec", None) for finder in list(sys.meta_path) if finder is not self)
        specs = (find(fullname, path, target) for find in others if find is not None)
        spec: ModuleSpec | None = next((spec for spec in specs if spec is not None), None)
        run = getattr(spec and spec.loader, "exec_module", None)
        if spec is None or run is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            run(module)
            if module.__name__ == fullname:  # one loader may serve many modules
                _call(fullname)

        try:
            spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        except AttributeError:
            _warn(fullname, f"a {type(spec.loader).__name__} loads it, which cannot be changed")
        return spec


def register_when_imported() -> None:
    """Have transformers know kvpack now, and whenever it is imported. Calling it again does nothing."""
    for module in ON_IMPORT:
        if module in sys.modules:
            _call(module)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
