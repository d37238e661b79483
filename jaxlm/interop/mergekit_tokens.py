"""Merging models whose vocabularies differ: one vocabulary for the result, and each model's rows in its order."""

import importlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.interop.load import model_directory
from jaxlm.interop.mergekit import Recipe
from jaxlm.interop.mergekit_models import Parent, Stored
from jaxlm.interop.save import TOKENIZER_FILES


class Vocabulary(NamedTuple):
    """The vocabulary of a result.

    Attributes:
      size: rows of its embedding, padding included.
      rows: by model, for each token of the result its id in the model, -1 where the model does not know it.
      source: directory whose tokenizer files the result gets.
      json: text of its tokenizer.json.
    """

    size: int
    rows: Mapping[str, np.ndarray]
    source: Path
    json: str

    def arrange(
        self, models: Sequence[str], tensors: Sequence[Stored], base: str | None, dtype: np.dtype
    ) -> list[Stored]:
        """Tensors with a row for each token [V, ...], in the order of this vocabulary, converted to `dtype`.

        A token that a model does not know gets the base model's row, else the mean of the rows of those that know it.
        """
        maps = [self.rows[model] for model in models]
        plain = np.arange(self.size)
        if all(np.array_equal(ids, plain) for ids in maps) and all(x.shape[0] == self.size for x in tensors):
            return list(tensors)
        shapes = {x.shape[1:] for x in tensors}
        if len(shapes) > 1:
            named = ", ".join(f"{m}: {list(x.shape)}" for m, x in zip(models, tensors, strict=True))
            raise ValueError(f"embedding: widths differ ({named}); they must be equal")
        place = models.index(base) if base in models else None
        size = self.size
        return [Arranged(i, tuple(tensors), tuple(maps), place, size, dtype) for i in range(len(tensors))]

    def write(self, out: Path) -> None:
        """Put the tokenizer into a directory."""
        for name in TOKENIZER_FILES:
            (out / name).unlink(missing_ok=True)
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, out / name)
        (out / "tokenizer.json").write_bytes(self.json.encode("utf-8"))


class Arranged(NamedTuple):
    """The rows of tensor `own` of `tensors`, in another order, those that it lacks taken from the others."""

    own: int
    tensors: tuple[Stored, ...]
    maps: tuple[np.ndarray, ...]
    base: int | None
    size: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, *self.tensors[0].shape[1:])

    def view(self) -> np.ndarray:
        """The rows; those beyond the vocabulary are the mean of all."""
        ids = self.maps[self.own]
        result = np.zeros(self.shape, self.dtype)
        known = np.flatnonzero(ids >= 0)
        result[known] = np.asarray(self.tensors[self.own].view())[ids[known]].astype(self.dtype)
        for token in np.flatnonzero(ids < 0):
            knowing = [i for i, other in enumerate(self.maps) if other[token] >= 0]
            givers = [self.base] if self.base in knowing else knowing
            rows = [self.tensors[i].view()[self.maps[i][token]].astype(np.float32) for i in givers if i is not None]
            if rows:
                result[token] = np.mean(rows, axis=0).astype(self.dtype)
        if self.size > len(ids):
            result[len(ids) :] = np.mean(result[: len(ids)], axis=0, dtype=np.float32).astype(self.dtype)
        return result


def vocabulary(recipe: Recipe, parents: Mapping[str, Parent]) -> Vocabulary | None:
    """The vocabulary that a recipe asks for; None where it asks for none.

    A model without a tokenizer.json is taken to have that of the base model, as in mergekit.

    Raises:
      FileNotFoundError, ValueError: naming the tokenizer that is missing or cannot be used.
    """
    if recipe.tokens is None:
        return None
    donor = parents[recipe.donor].directory
    base = load_tokenizer(donor, field="tokenizer")
    found = {name: _tokenizer(parent.directory) or base for name, parent in parents.items()}
    if recipe.tokens.source == "base":
        source, text = donor, base.json
    elif recipe.tokens.source == "union":
        source, text = donor, _union(base, [one for one in found.values() if one is not base])
    else:
        source = model_directory(recipe.tokens.source)
        text = load_tokenizer(source, field="tokenizer").json
    words = _words(text)
    ids = sorted(words.values())
    if ids != list(range(len(ids))):
        raise ValueError(f"{source / 'tokenizer.json'}: ids are not 0 to {len(ids) - 1}; such a table cannot be merged")
    ordered = sorted(words, key=lambda word: words[word])
    rows = {name: _rows(ordered, found[name], parent) for name, parent in parents.items()}
    multiple = recipe.tokens.multiple or 1
    return Vocabulary(-(-len(ids) // multiple) * multiple, rows, source, text)


def _tokenizer(directory: Path) -> Tokenizer | None:
    return load_tokenizer(directory, field="tokenizer") if (directory / "tokenizer.json").is_file() else None


def _words(text: str) -> dict[str, int]:
    backend = importlib.import_module("tokenizers").Tokenizer.from_str(text)
    return backend.get_vocab(with_added_tokens=True)


def _rows(ordered: Sequence[str], tokenizer: Tokenizer, parent: Parent) -> np.ndarray:
    known = _words(tokenizer.json)
    limit = parent.config.get("vocab_size", len(known))
    ids = (known.get(word, -1) for word in ordered)
    return np.array([i if i < limit else -1 for i in ids], np.int64)


def _union(base: Tokenizer, others: Sequence[Tokenizer]) -> str:
    """The base model's tokenizer with what the others know besides, in their order, as added tokens."""
    backend = importlib.import_module("tokenizers").Tokenizer.from_str(base.json)
    seen = set(backend.get_vocab(with_added_tokens=True))
    plain: list[Any] = []
    marked: list[Any] = []
    for other in others:
        added = {token.content: token for _, token in sorted(other.backend.get_added_tokens_decoder().items())}
        words = _words(other.json)
        for word in sorted(words, key=lambda word: words[word]):
            if word not in seen:
                seen.add(word)
                (marked if word in added else plain).append(added.get(word, word))
    if not plain and not marked:
        return base.json
    backend.add_tokens(plain)
    backend.add_special_tokens([token for token in marked if token.special])
    backend.add_tokens([token for token in marked if not token.special])
    return backend.to_str()
