"""Tokenizers: train byte-level BPE, load any tokenizer.json, encode documents, count the bytes behind each token."""

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCABULARY = 2048
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of text."""

LONGEST_TOKEN = 16
"""Bytes of the longest token that training makes; keeps long runs of one character from becoming a few huge tokens."""

KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>", "[SEP]")
"""Looked for, in this order, where a tokenizer.json stands without a tokenizer_config.json that names the EOS."""

PIECE_CHARACTERS = 1 << 15
BATCH_CHARACTERS = 1 << 21
CUT = re.compile(r"(?<=\S) (?=\S)")
"""A single space between two words: pre-tokenizers break before it, so the pieces encode as the whole does."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, ready to encode.

    Attributes:
      backend: the `tokenizers` object; the truncation and padding that a file may ask for are switched off.
      json: text of the file, kept to the letter, so that a copy has the same hash.
      eos_id: the token that ends a document or an answer, or None.
    """

    backend: "tokenizers.Tokenizer" = dataclasses.field(repr=False, compare=False)
    json: str = dataclasses.field(repr=False)
    eos_id: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the file's content, in hexadecimal."""
        return hashlib.sha256(self.json.encode("utf-8")).hexdigest()

    @property
    def size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with the special tokens that tokenizer.json itself adds and no others."""
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json, to the letter."""
        Path(path).write_bytes(self.json.encode("utf-8"))


def parse_tokenizer(text: str, eos_id: int | None = None) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json.

    Raises:
      ValueError: it is not one.
    """
    backend_class = importlib.import_module("tokenizers").Tokenizer
    try:
        backend = backend_class.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"not a tokenizer.json ({error}); write it again with the tokenizers library") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, text, eos_id)


def load_tokenizer(path: str | Path, eos_id: int | None = None, field: str = "data.tokenizer") -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder.

    Args:
      path: the file or the folder.
      eos_id: id of the end of text; None looks in tokenizer_config.json beside it, then for a name in common use.
      field: what to call it in messages.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no tokenizer.json.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{field}: {file}: no such file; give a tokenizer.json or a folder that holds one")
    try:
        tokenizer = parse_tokenizer(file.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{field}: {file}: {error}") from None
    if eos_id is None:
        eos_id = _find_eos(tokenizer.backend, file.parent / "tokenizer_config.json")
    return dataclasses.replace(tokenizer, eos_id=eos_id)


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCABULARY) -> Tokenizer:
    """Byte-level BPE over the texts: every byte has a token, so any text can be written. Deterministic.

    Args:
      texts: the sample to count on.
      vocab_size: V, the end of text included; fewer where the sample has no more pairs to merge.

    Raises:
      ValueError: `vocab_size` has no room for 256 bytes and the end of text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"model.vocab_size: {vocab_size} is too small for a tokenizer trained on the data; "
            f"use at least {SMALLEST_VOCABULARY} (256 bytes and the end of text) or set data.tokenizer"
        )
    library = importlib.import_module("tokenizers")
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=LONGEST_TOKEN,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, backend.to_str(), backend.token_to_id(END_OF_TEXT))


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Encode documents, on all cores and in bounded memory.

    Args:
      tokenizer: adds what tokenizer.json says (often a BOS); the EOS, if any, ends each document.
      texts: any number of documents of any length.

    Yields:
      uint32 [tokens] for each document, in order.
    """
    prefix, suffix = added_by_template(tokenizer)
    suffix = suffix if tokenizer.eos_id is None or suffix[-1:] == [tokenizer.eos_id] else [*suffix, tokenizer.eos_id]
    head, tail = np.array(prefix, np.uint32), np.array(suffix, np.uint32)
    parts: list[np.ndarray] = []
    for batch in _batches(_pieces(texts)):
        encodings = tokenizer.backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, last) in zip(encodings, batch, strict=True):
            parts.append(np.array(encoding.ids, np.uint32))
            if last:
                yield np.concatenate([head, *parts, tail])
                parts = []


def added_by_template(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that tokenizer.json puts before and after a text by itself."""
    bare = tokenizer.backend.encode("a", add_special_tokens=False).ids
    full = tokenizer.backend.encode("a").ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def token_bytes(tokenizer: Tokenizer, size: int | None = None) -> np.ndarray:
    """How many UTF-8 bytes of text each token stands for; special tokens stand for none.

    Byte-level tokens have one character a byte; elsewhere a leading sign for a space (▁) counts one, a byte token
    `<0x0A>` counts one, and WordPiece's `##` none. Sums over the tokens of a text equal its length in UTF-8, except for
    the space that SentencePiece-like tokenizers put before a text.

    Args:
      tokenizer: any.
      size: length of the result; None is the tokenizer's size. Ids without a token count 0.

    Returns:
      int32 [size].
    """
    counts = np.zeros(max(size or 0, tokenizer.size), np.int32)
    byte_level = "ByteLevel" in _kinds_of(json.loads(tokenizer.json))
    for text, index in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        counts[index] = len(text) if byte_level else _text_bytes(text)
    for index, added in tokenizer.backend.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return counts if size is None else counts[:size]


def _text_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode("utf-8"))


def _kinds_of(description: Any) -> set[str]:
    """The `type` names of the normaliser, pre-tokenizer and decoder, nested ones included."""
    if isinstance(description, list):
        return set().union(*map(_kinds_of, description))
    if not isinstance(description, dict):
        return set()
    inner = ("pre_tokenizer", "normalizer", "decoder", "pretokenizers", "normalizers", "decoders")
    return set().union({str(description.get("type", ""))}, *(_kinds_of(description.get(key)) for key in inner))


def _find_eos(backend: "tokenizers.Tokenizer", config: Path) -> int | None:
    names: list[str] = []
    if config.is_file():
        try:
            given = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            raise ValueError(f"{config}: not a JSON object; repair or remove the file") from None
        names = [given["content"] if isinstance(given, dict) else given] if given else []
    for name in names or KNOWN_ENDS:
        if (found := backend.token_to_id(name)) is not None:
            return found
    return None


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Long documents in pieces, cut where no token can span; the flag marks the last piece of a document."""
    for text in texts:
        start = 0
        while (cut := CUT.search(text, start + PIECE_CHARACTERS)) is not None:
            yield text[start : cut.start()], False
            start = cut.start()
        yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    size = 0
    batch: list[tuple[str, bool]] = []
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
