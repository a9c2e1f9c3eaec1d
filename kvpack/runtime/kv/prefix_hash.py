"""Names of pages by all that decides what is in them: a chain of SHA-256 over the tokens, from the first one on.

A page's keys and values follow from its own tokens, from all tokens before it, and from the model and the cache that
made them. So does its hash::

    root = SHA-256(JSON of what model and cache are)
    hash = SHA-256(the hash before it, or the root ‖ 64 token ids, i32 little-endian)

Two prompts have the same hash at a page if, and only if, they are the same up to its end. Only full pages have one. A
hash of 64 tokens takes less than a microsecond, so nothing weaker is offered, and tenants may share a store: a *salt*
in the root keeps apart those who must not see from a hit what others have asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.errors import CacheInputError
from kvpack.format.pages import PAGE_TOKENS

HASH_BYTES = 32
_LEAST_TOKEN, _MOST_TOKEN = -(1 << 31), (1 << 31) - 1

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]


def root_hash(key: Mapping[str, Any]) -> bytes:
    """What the first page's hash stands on: everything but tokens that pages depend on, and a tenant's salt.

    Args:
        key: names with JSON values; their order does not matter. :class:`~kvpack.runtime.kv.manager.KVManager` puts
        in the
            model's fingerprint, adapter, formats or budget and policy, ``recent_tokens``, ``sinks``, ``key_order``,
            dtype and salt.

    Returns:
        32 bytes.

    Raises:
        CacheInputError: a value that JSON cannot say (NaN is none either).

    >>> root_hash({"model": "books", "adapter": None}).hex()[:16]
    '5142f634efa8f0fe'
    """
    try:
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CacheInputError(f"what prefixes are known by must be JSON: {error}; in {dict(key)!r}") from None
    return hashlib.sha256(text.encode()).digest()


def next_hash(parent: bytes, tokens: bytes) -> bytes:
    """Of the page behind ``parent`` (or behind the root), of 64 token ids as :func:`token_bytes` gives them."""
    return hashlib.sha256(parent + tokens).digest()


def page_hashes(root: bytes, tokens: Tokens, parent: bytes | None = None) -> npt.NDArray[np.uint8]:
    """The hash of each full page.

    Args:
        tokens: ids, from the first token on; those behind the last full page count for nothing.
        parent: hash of the page before them, if they do not begin with the first token.

    Returns:
        u8 [len(tokens) // 64, 32].

    Raises:
        CacheInputError: ids that are no integers of 32 bits.

    >>> hashes = page_hashes(root_hash({}), range(200))
    >>> hashes.shape
    (3, 32)
    >>> bool((page_hashes(root_hash({}), range(64, 200), hashes[0].tobytes()) == hashes[1:]).all())
    True
    """
    pages = token_pages(tokens)
    hashes = b"".join(chained(root if parent is None else parent, pages))
    return np.frombuffer(hashes, np.uint8).reshape(len(pages), HASH_BYTES)


def chained(parent: bytes, pages: Sequence[bytes]) -> list[bytes]:
    """The hash of each of the pages that lie behind ``parent``, of what :func:`token_pages` gives."""
    hashes = []
    for page in pages:
        parent = next_hash(parent, page)
        hashes.append(parent)
    return hashes


def token_bytes(tokens: Tokens) -> bytes:
    """Token ids as they are hashed.

    Raises:
        CacheInputError: they are no integers of 32 bits, or not in one row.
    """
    ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if ids.size == 0:
        return b""
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise CacheInputError(f"tokens are {ids.dtype} {list(ids.shape)}; a row of integers is wanted")
    if int(ids.min()) < _LEAST_TOKEN or int(ids.max()) > _MOST_TOKEN:
        raise CacheInputError(f"token ids run from {ids.min()} to {ids.max()}; they must be integers of 32 bits")
    return ids.astype("<i4").tobytes()


def token_pages(tokens: Tokens) -> list[bytes]:
    """The bytes of each full page's tokens.

    Raises:
        CacheInputError: as :func:`token_bytes`.
    """
    text, size = token_bytes(tokens), 4 * PAGE_TOKENS
    return [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
