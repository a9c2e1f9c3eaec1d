"""Tables that several tensors have in common, so that one launch multiplies them: a GPU makes one for each table."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_decoder import decode_tile, element_dtype
from kvpack.encode.blob_encoder import NO_TABLE, EncodedBlob, encode_tile, join_tiles
from kvpack.encode.rans import decoder_table, encoder_table
from kvpack.encode.table_clusters import cluster_tables
from kvpack.encode.threads import map_ordered
from kvpack.encode.tile_coder import count_symbols
from kvpack.format.blob import Blob
from kvpack.format.layout import NUM_SYMBOLS, Predictor
from kvpack.format.tile_parts import TileBytes, TilePart

Elements = npt.NDArray[np.unsignedinteger]


def share_tables(blobs: Sequence[EncodedBlob], executor: ThreadPoolExecutor | None = None) -> list[EncodedBlob]:
    """The same numbers, coded anew with tables for all tiles of all blobs together.

    Args:
        blobs: of one layout, without a predictor.
    """
    parsed = [Blob(blob.data) for blob in blobs]
    layout = parsed[0].header.layout
    decoder_tables = [[decoder_table(table) for table in blob.tables] for blob in parsed]

    def decoded(blob: int, tile: int) -> tuple[TilePart, Elements]:
        geometry = parsed[blob].header.tile_geometry(tile)
        part = TilePart.of(parsed[blob], tile, 0, geometry.rows, 0)
        elements = np.empty((geometry.rows, geometry.cols), element_dtype(layout.element_bits))
        decode_tile(parsed[blob], part.tile, decoder_tables[blob], elements)
        return part, elements

    def count(place: tuple[int, int]) -> npt.NDArray[np.int64]:
        counts = np.zeros(NUM_SYMBOLS, np.int64)
        count_symbols(decoded(*place)[1], layout.parameters, False, counts)
        return counts

    places = [(blob, tile) for blob, source in enumerate(parsed) for tile in range(source.header.num_tiles)]
    counts = np.stack(list(map_ordered(count, places, executor)))
    tables, assignment = cluster_tables(counts, layout)
    encoder_tables = [encoder_table(table) for table in tables]

    def encode(number: int) -> TileBytes:
        blob, tile = places[number]
        part, elements = decoded(blob, tile)
        index = int(assignment[number])
        table = encoder_tables[index] if index >= 0 else NO_TABLE
        header, geometry = parsed[blob].header, part.tile.geometry
        return encode_tile(header, geometry, elements, part.outliers, counts[number], index, table, Predictor.NONE)

    done, first = [], 0
    for source, before in zip(parsed, blobs, strict=True):
        numbers = range(first, first + source.header.num_tiles)
        coded = map_ordered(encode, numbers, executor)
        header = replace(source.header, num_tables=0, table_bytes=0)
        done.append(join_tiles(header, tables, coded, before.entropy_bits_per_element))
        first = numbers.stop
    return done
