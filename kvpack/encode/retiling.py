"""A blob with tiles of other widths: for tensors that were coded without a thought of being split by their inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvpack.encode.blob_decoder import decode_elements
from kvpack.encode.blob_encoder import Strip, encode_strips
from kvpack.encode.quantize import DELTA_OFFSET
from kvpack.errors import GeometryError
from kvpack.format.blob import Blob
from kvpack.format.layout import TILE_ROWS, outlier_delta_max


def retile(blob: Blob, tile_cols: int) -> bytes:
    """The same numbers in tiles of ``tile_cols`` columns: decoded, and coded with tables of its own.

    Args:
        tile_cols: a multiple of 32 up to 2048.

    Raises:
        GeometryError: an outlier reaches further than those of so long tiles can.
        BlobError: the blob is damaged.
    """
    source = blob.header
    header = replace(source, tile_cols=tile_cols, num_tables=0, table_bytes=0)
    elements = decode_elements(blob)
    most = outlier_delta_max(tile_cols)

    def outliers(strip: int) -> np.ndarray:
        """u32 [count, 3] of all of a strip's tiles, sorted."""
        found = [np.empty((0, 3), np.int64)]
        for tile in range(strip * source.num_tiles_col, (strip + 1) * source.num_tiles_col):
            if blob.tiles[tile]["outlier_count"]:
                parts = blob.tile(tile, check_crc=False)
                first_col, own = parts.geometry.first_col, parts.outliers
                found.append(np.stack((own.rows, own.cols + first_col, own.deltas), axis=1).astype(np.int64))
        joined = np.concatenate(found)
        far = joined[(joined[:, 2] > most) | (joined[:, 2] < -most - 1), 2]
        if len(far):
            raise GeometryError(f"an outlier of {far[0]} steps; those of tiles of {tile_cols} columns end at {most}")
        joined[:, 2] += DELTA_OFFSET
        return joined[np.lexsort((joined[:, 1], joined[:, 0]))].astype(np.uint32)

    def strip(index: int) -> Strip:
        matrix, tile_row = divmod(index, source.num_tiles_row)
        return Strip(elements[matrix, tile_row * TILE_ROWS : (tile_row + 1) * TILE_ROWS], outliers(index))

    return encode_strips(header, strip).data
