"""``KVPackConfig``: how transformers is told to quantize a model, and what it knows of a compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kvpack.encode.model_config import METHOD
from kvpack.encode.quant_config import QuantConfig
from kvpack.errors import DirectoryIndexError, InputError, NotSupportedError
from kvpack.format.layout import VERSION

_OPTIONS = tuple(option.name for option in fields(QuantConfig))


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(name, str) for name in value)


def _check_type(option: str, value: object, what: str, is_right: Callable[[Any], bool]) -> None:
    if value is not None and not is_right(value):
        raise InputError(f"{option} of a KVPackConfig is {value!r}, and must be {what}")


class KVPackConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization while loading; for compressed models, what config.json says of them.

    Example::

        model = AutoModelForCausalLM.from_pretrained(
            "Llama-3.1-8B", quantization_config=KVPackConfig(bits=4.25, exclude="down_proj"), device_map="auto"
        )
        model.save_pretrained("Llama-3.1-8B-kvpack")

    Args:
        bits: bits a weight, every overhead counted; 4.85 without a preset.
        modules_to_not_convert: names of modules whose weights are no coded ones, with all that is below them:
            ``["lm_head", "model.layers.0"]``. When a model is quantized they are kept as they are, else decoded.
        dequantize: decode all weights when the model is loaded; it is a plain model then.
        calibrate: refused: models are calibrated by ``kvpack compress --calibrate``, and loaded then.
        format_version: of a compressed model's blobs (docs/FORMAT.md).
        blob_bytes: coded tensor → length of its blob.
        options: with which the model was compressed, as :meth:`kvpack.QuantConfig.to_json` has them.
        rest: ``preset``, ``layout`` and all other options of :class:`kvpack.QuantConfig`. Whatever else a compressed
            model's config.json says is kept.

    Raises:
        InputError: an option has no such value or type, two exclude each other, or there is no such option.
        NotSupportedError: ``calibrate`` is given.
        DirectoryIndexError: a version of the format that this kvpack does not know.
    """

    def __init__(
        self,
        bits: float | None = None,
        *,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        calibrate: Any = None,
        format_version: int = VERSION,
        blob_bytes: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        rest.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # any string serves
        if calibrate is not None:
            raise NotSupportedError(
                "calibrate: no model is calibrated while it is loaded. kvpack compress MODEL --calibrate TEXT makes a "
                "directory that from_pretrained loads. Without, bits gives all tensors one rate, "
                "allocation='model' one step (the least squared error), tensor_bits={pattern: bits} rates of your own"
            )
        _check_type("modules_to_not_convert", modules_to_not_convert, "a list of names", _is_names)
        _check_type("dequantize", dequantize, "True or False", lambda value: isinstance(value, bool))
        _check_type("blob_bytes", blob_bytes, "an object", lambda value: isinstance(value, Mapping))
        _check_type("options", options, "an object", lambda value: isinstance(value, Mapping))
        given = {name: rest.pop(name) for name in _OPTIONS if name in rest}
        if bits is not None:
            given["bits"] = bits
        if options is not None or blob_bytes is not None:
            # As a file says it, perhaps one of a later version.
            self.options = {**(options or {}), **given}
            self.__dict__.update({key: value for key, value in rest.items() if not hasattr(type(self), key)})
        elif rest:
            known = [*_OPTIONS, "modules_to_not_convert", "dequantize"]
            raise InputError(f"KVPackConfig has no option {', '.join(rest)}; there are {', '.join(known)}")
        else:
            self.options = QuantConfig(**given).to_json()
        self.format_version = format_version
        self.blob_bytes = dict(blob_bytes or {})
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.dequantize = dequantize
        if format_version != VERSION or isinstance(format_version, bool):
            raise DirectoryIndexError(
                f"quantization_config has format_version {format_version!r}, this kvpack knows {VERSION}"
            )

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a config given to ``from_pretrained`` counts for a model that is compressed already."""
        wanted = {"modules_to_not_convert": self.modules_to_not_convert, "dequantize": self.dequantize}
        return {key: value for key, value in wanted.items() if value}

    def quant_config(self) -> QuantConfig:
        """The options with which weights are coded.

        Raises:
            InputError: they are those of another version.
        """
        return QuantConfig.from_json(self.options)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: options of loading only where they are set."""
        found: dict[str, Any] = super().to_dict()
        for key in ("modules_to_not_convert", "dequantize"):
            if not found[key]:
                del found[key]
        return found

    def __repr__(self) -> str:
        usual = QuantConfig().to_json() | {"bits": None}
        hidden = {name for name, value in usual.items() if self.options.get(name) == value} | {"dequantize_fp8"}
        shown = {name: value for name, value in self.options.items() if name not in hidden}
        if self.modules_to_not_convert:
            shown["modules_to_not_convert"] = self.modules_to_not_convert
        parts = [f"{name}={value!r}" for name, value in shown.items() if value is not None]
        parts += ["dequantize=True"] if self.dequantize else []
        parts += [f"{len(self.blob_bytes)} coded tensors"] if self.blob_bytes else []
        return f"KVPackConfig({', '.join(parts)})"
