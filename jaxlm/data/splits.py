"""Holding out a part of a text or of a set of examples, the same part every time."""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jaxlm.data.sources import Document

SHARE = 0.05
BLOCK_BYTES = 4096
MAX_BLOCKS = 16
KEY_CHARACTERS = 4096
SMALL_SET = 100
"""Sets of fewer examples are not divided: five rows would say nothing, and the user counted on all of them."""


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the first 4096 characters of `key` alone, whatever their case and spacing."""
    plain = " ".join(unicodedata.normalize("NFKC", key[:KEY_CHARACTERS]).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8"), digest_size=8, salt=b"jaxlm").digest()) / 2**64


def is_held_out(key: str, share: float = SHARE) -> bool:
    """Whether what `key` stands for belongs to the held-out share."""
    return fraction(key) < share


class Part(NamedTuple):
    """A stretch of text and the side of the split that it is on."""

    held_out: bool
    text: str


def split_documents(documents: Callable[[], Iterable[Document]]) -> Callable[[], Iterator[Part]]:
    """Divide documents into train and held-out parts, about 5 % of the bytes held out.

    Many documents are divided whole, by a hash of their group or of their text (so that a repeated document is never on
    both sides). Where that leaves a side too small (few documents, one large file), contiguous blocks are cut out of
    each document instead, at the ends of lines.

    Args:
      documents: starts a pass over the documents; called once by each pass over the result, and once more at first.

    Returns:
      Starts a pass over the parts, in the order of the documents.
    """

    @functools.cache
    def whole() -> bool:
        sizes = [0, 0]
        for document in documents():
            sizes[_by_hash(document)] += len(document.text)
        return SHARE / 3 <= sizes[True] / max(sum(sizes), 1) <= SHARE * 3

    def parts() -> Iterator[Part]:
        for document in documents():
            if whole():
                yield Part(_by_hash(document), document.text)
            else:
                yield from _cut(document.text)

    return parts


def hold_out_rows(keys: list[str], share: float = SHARE) -> list[bool]:
    """Which of the examples are held out: the share with the smallest hashes; equal keys are never divided.

    Args:
      keys: what identifies an example or its group, e.g. the prompt.

    Returns:
      One bool an example; all False for fewer than 100 examples.
    """
    if len(keys) < SMALL_SET:
        return [False] * len(keys)
    values = [fraction(key) for key in keys]
    limit = sorted(values)[round(share * len(keys)) - 1]
    held_out = [value <= limit for value in values]
    return held_out if not all(held_out) else [False] * len(keys)


def _by_hash(document: Document) -> bool:
    return is_held_out(document.text if document.group is None else document.group)


def _cut(text: str) -> Iterator[Part]:
    """Cut a document into stretches and hold out the end of each; blocks are at least 4 kB where the text allows."""
    blocks = min(max(int(len(text) * SHARE) // BLOCK_BYTES, 1), MAX_BLOCKS)
    start = 0
    for block in range(1, blocks + 1):
        stop = len(text) if block == blocks else _line_end(text, len(text) * block // blocks)
        middle = _line_end(text, stop - round(len(text) * SHARE / blocks))
        middle = middle if start < middle < stop else stop - round((stop - start) * SHARE)
        if middle > start:
            yield Part(False, text[start:middle])
        if stop > middle:
            yield Part(True, text[middle:stop])
        start = stop


def _line_end(text: str, near: int) -> int:
    """The first position at or after `near` that follows a newline, or `near` where a line is very long."""
    found = text.find("\n", max(near - 1, 0), near + BLOCK_BYTES // 4)
    return found + 1 if found >= 0 else near
