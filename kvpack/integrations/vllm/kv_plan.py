"""What the scheduler tells the workers to load and to save, and what they tell it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PageRange:
    """Neighbouring pages of one request's tokens.

    Attributes:
        first_page: the first one's index in the request.
        parent: hash of the page before it, None of the first one.
        hashes, tokens: of each page: its hash, and its token ids as they are hashed.
        block_ids: the request's block table in vLLM's cache, from its first token on, as far as these pages reach.
    """

    first_page: int
    parent: bytes | None
    hashes: tuple[bytes, ...]
    tokens: tuple[bytes, ...]
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """Tokens ``first_token … end_token − 1`` of a request that are to be put into vLLM's cache; of the pages' other
    tokens nothing is touched."""

    request_id: str
    first_token: int
    end_token: int
    pages: PageRange


@dataclass
class StepPlan:
    """Of one step of the engine; ``computes``: whether any request is computed in it."""

    loads: list[Load] = field(default_factory=list)
    saves: list[PageRange] = field(default_factory=list)
    computes: bool = False


@dataclass
class Changes:
    """Pages that have come to a rank's store, and that have gone from it."""

    come: set[bytes] = field(default_factory=set)
    gone: set[bytes] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.come or self.gone)

    def then(self, later: Changes) -> Changes:
        """Both, one after the other."""
        return Changes((self.come - later.gone) | later.come, (self.gone - later.come) | later.gone)
