"""What docs/FORMAT.md §§11.2 and 11.3 show in hex decodes to the numbers printed there, by kvpack and independently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from independent_decoder import decode_blob, read_container

import kvpack
from kvpack.encode.blob_decoder import decode_integers
from kvpack.format.blob import Blob
from kvpack.format.container import Container
from kvpack.format.layout import ElementKind, Predictor, TileMode, integer_layout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "FORMAT.md").read_text(encoding="utf-8")


def listing(name: str) -> list[str]:
    found = re.search(rf"<!-- {name} -->\n```\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found.group(1).splitlines()


def vector(name: str = "vector") -> bytes:
    data = b""
    repeat = False
    for line in listing(name):
        if line == "*":
            repeat = True
            continue
        offset, _, digits = line.partition("  ")
        if repeat:
            data += data[-16:] * ((int(offset, 16) - len(data)) // 16)
        assert len(data) == int(offset, 16)
        data += bytes.fromhex(digits)
        repeat = False
    return data


def table(name: str) -> np.ndarray[Any, Any]:
    return np.array([[float(cell) for cell in line.split()] for line in listing(name)])


def printed_states(table: str) -> list[str]:
    """The column "x after" of a lane's steps."""
    rows = table.splitlines()[2:]
    return [state for row in rows for state in re.findall(r"`([0-9A-F]{8})`", "".join(row.split("|")[5:6]))]


def states_of_lane_0(blob: Blob, steps: int) -> list[str]:
    """§5.2 by hand."""
    frequencies = blob.tables[0].astype(int)
    starts = np.cumsum(frequencies) - frequencies
    x, words = int(blob.tile(0).states[0]), blob.tile(0).words.tolist()
    states = []
    for _ in range(steps):
        slot = x % 4096
        symbol = int(np.flatnonzero((starts <= slot) & (slot < starts + frequencies))[0])
        x = int(frequencies[symbol]) * (x >> 12) + slot - int(starts[symbol])
        if x < 1 << 16:
            x = (x << 16) | words.pop(0)
        states.append(f"{x:08X}")
    return states


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vector.safetensors"
    path.write_bytes(vector())
    return path


def test_kvpack_reads_the_numbers_of_the_page(file: Path) -> None:
    with kvpack.open(file, threads=1) as reader:
        assert reader.keys() == ["w"]
        assert np.array_equal(reader.decode("w"), table("integers"))
        numbers = reader.dequantize("w", "float32")
        assert numbers.dtype == np.float32
        assert np.array_equal(numbers, table("numbers"))
    assert kvpack.verify(file).bytes_without_checksum == 0


def test_the_independent_decoder_reads_the_numbers_of_the_page(file: Path) -> None:
    assert np.array_equal(read_container(file)["w"], table("numbers"))
    with Container(file) as container:
        assert np.array_equal(decode_blob(bytes(container.data("w_kvpack")))[0], table("integers"))


def test_it_holds_all_that_the_page_says(file: Path) -> None:
    """A vector without lanes, planes or outliers would be decoded by less than a decoder."""
    assert len(vector()) == 808
    with Container(file) as container:
        assert container.crc32.keys() == {"w_kvpack_scale"}
        blob = Blob(container.data("w_kvpack"))
    tile = blob.tile(0)
    assert (tile.mode, tile.predictor) == (TileMode.RANS, Predictor.PREVIOUS)
    assert [hex(word) for word in tile.words] == ["0xf0ff", "0xfc00", "0xfc00"]
    assert [hex(state) for state in tile.states[:3]] == ["0x10fff", "0x87ffb0ff", "0x10000"]
    assert tile.outliers.deltas.tolist() == [100]
    assert tile.raw.any()
    assert {symbol: int(f) for symbol, f in enumerate(blob.tables[0]) if f} == {0x78: 1024, 0x87: 2048, 0x88: 1024}
    for value in (blob.header.header_crc32, int(blob.tiles["payload_crc32"][0])):
        assert f"`0x{value:08X}`" in PAGE


def test_the_lane_of_the_page(file: Path) -> None:
    """§5.2 by hand: the table of states is what its words give."""
    with Container(file) as container:
        blob = Blob(container.data("w_kvpack"))
    states = states_of_lane_0(blob, 16)
    printed = printed_states(PAGE[PAGE.index("| step | x before |") : PAGE.index("The state is L after 16 steps")])
    assert printed == states
    assert states[-1] == "00010000"


def test_the_folded_blob_of_the_page() -> None:
    data = vector("folded")
    assert len(data) == 592
    blob, expected = Blob(data), table("folded integers")
    assert blob.header.layout == integer_layout("balanced", ElementKind.SIGNED, 4)
    assert blob.header.layout.folded
    assert np.array_equal(decode_integers(blob)[0], expected)
    assert np.array_equal(decode_blob(data)[0], expected)
    tile = blob.tile(0)
    assert tile.mode == TileMode.RANS
    assert {symbol: int(f) for symbol, f in enumerate(blob.tables[0]) if f} == {
        0x00: 1792, 0x05: 512, 0xA0: 256, 0xAA: 1536
    }  # fmt: skip
    section = PAGE[PAGE.index("### 11.3") : PAGE.index("## 12.")]
    for value in (blob.header.header_crc32, int(blob.tiles["payload_crc32"][0]), *tile.states[:2].tolist()):
        assert f"`0x{value:08X}`" in section
    assert not len(tile.words)
    assert printed_states(section[section.index("| step |") : section.index("Step 0 has")]) == states_of_lane_0(blob, 8)
