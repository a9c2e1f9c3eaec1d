"""``KVPackConfig``: config.json's ``quantization_config`` of a compressed model, as transformers holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kvpack.encode.model_config import METHOD
from kvpack.errors import DirectoryIndexError
from kvpack.format.layout import VERSION


class KVPackConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers knows of a compressed model.

    Args:
        format_version: of the blobs (docs/FORMAT.md).
        blob_bytes: coded tensor → length of its blob.
        options: with which the model was compressed.
        modules_to_not_convert: names of modules whose weights are decoded when the model is loaded, with all that is
            below them: ``["lm_head", "model.layers.0"]``.
        dequantize: decode all weights when the model is loaded; it is a plain model then.
        rest: whatever else config.json says; it is kept.

    Raises:
        DirectoryIndexError: a version of the format that this kvpack does not know.
    """

    def __init__(
        self,
        format_version: int = VERSION,
        blob_bytes: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        **rest: Any,
    ) -> None:
        rest.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # any string serves
        self.format_version = format_version
        self.blob_bytes = dict(blob_bytes or {})
        self.options = dict(options or {})
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.dequantize = dequantize
        self.__dict__.update(rest)
        if format_version != VERSION:
            raise DirectoryIndexError(
                f"quantization_config has format_version {format_version!r}, this kvpack knows {VERSION}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: options of loading only where they are set."""
        found: dict[str, Any] = super().to_dict()
        for key in ("modules_to_not_convert", "dequantize"):
            if not found[key]:
                del found[key]
        return found
