"""Text -> token bins, once: in a folder of the user's choice, or in the cache under the hash of all that matters."""

import importlib
import itertools
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxlm.data.bins import VALIDATION, Bins, BinWriter, open_bins
from jaxlm.data.cache import cached
from jaxlm.data.corpus import corpus_hash, standard_library
from jaxlm.data.sources import content_hash, digest, read_documents
from jaxlm.data.splits import Part, split_documents
from jaxlm.data.tokenizer import DEFAULT_VOCABULARY, Tokenizer, encode_documents, parse_tokenizer, train_tokenizer

VERSION = "1"
"""To be raised with every change of the code that changes the bins made from the same text."""

SAMPLE_CHARACTERS = 3_000_000
PIECE_CHARACTERS = 1 << 14

Parts = Callable[[], Iterable[Part]]


def text_parts(path: str | None, validation: str | None, text_field: str = "text") -> tuple[dict[str, str], Parts]:
    """The texts to prepare, each on its side of the split, and the hashes of their content.

    Args:
      path: see `DataConfig`; None is the embedded corpus.
      validation: likewise; None holds out a part of `path`.
      text_field: the column that holds the text.

    Returns:
      (SHA-256 of the content by field, a function that starts a pass over the parts).
    """
    if path is None:
        documents = standard_library()
        content, train = corpus_hash(documents), lambda: iter(documents)
    else:
        content, train = content_hash(path), lambda: read_documents(path, text_field)
    if validation is None:
        return {"data.path": content}, split_documents(train)

    def parts() -> Iterator[Part]:
        yield from (Part(False, document.text) for document in train())
        yield from (Part(True, document.text) for document in read_documents(validation, text_field, "data.validation"))

    return {"data.path": content, "data.validation": content_hash(validation, "data.validation")}, parts


def prepare(
    path: str | None,
    out: str | Path,
    *,
    validation: str | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    text_field: str = "text",
) -> Bins:
    """Write token bins into the folder `out`, which `data.path` can then name.

    Args:
      path: the text, see `DataConfig.path`.
      out: an empty or new folder.
      validation: the held-out text; None holds out a part of `path`.
      tokenizer: None trains one on the text.
      vocab_size: V of a tokenizer trained here.
      text_field: the column that holds the text.

    Returns:
      The opened bins of the training part; the held-out part is in the folder `validation` beside them.

    Raises:
      ValueError, FileNotFoundError: the text cannot be read, or there is none.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder; choose a new one")
    write_bins(folder, text_parts(path, validation, text_field)[1], tokenizer, vocab_size)
    return open_bins(folder)


def prepared(
    content: dict[str, str], parts: Parts, tokenizer: Tokenizer | None, vocab_size: int | None
) -> tuple[Bins, Tokenizer]:
    """The bins and the tokenizer of a text, from the cache if they were made before.

    Args:
      content: hashes of the text, from `text_parts`.
      parts: the text.
      tokenizer: None trains one on the training part.
      vocab_size: V of a tokenizer trained here.
    """
    if tokenizer is None:
        library = importlib.import_module("tokenizers").__version__
        made_by = f"trained {vocab_size or DEFAULT_VOCABULARY} {library}"
    else:
        made_by = f"{tokenizer.sha256} {tokenizer.eos_id}"
    key = f"tokens-{digest(VERSION, made_by, *(part for item in sorted(content.items()) for part in item))[:32]}"
    return cached(key, lambda folder: write_bins(folder, parts, tokenizer, vocab_size), _read)


def write_bins(folder: Path, parts: Parts, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    """Encode the parts into `folder` and, those held out, into `folder/validation`."""
    if tokenizer is None:
        texts = lambda: (part.text for part in parts() if not part.held_out)  # noqa: E731
        tokenizer = train_tokenizer(sample(texts), vocab_size or DEFAULT_VOCABULARY)
    sides: deque[bool] = deque()

    def texts_in_order() -> Iterator[str]:
        for part in parts():
            sides.append(part.held_out)
            yield part.text

    with BinWriter(folder, tokenizer) as train, BinWriter(folder / VALIDATION, tokenizer) as held_out:
        for ids in encode_documents(tokenizer, texts_in_order()):
            (held_out if sides.popleft() else train).append(ids)
        tokenizer.save(folder / "tokenizer.json")
    if not held_out.documents:
        shutil.rmtree(folder / VALIDATION)


def bins_tokenizer(bins: Bins) -> Tokenizer:
    """The tokenizer that stands beside the bins."""
    file = bins.folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; set data.tokenizer to the tokenizer that made the bins")
    tokenizer = parse_tokenizer(file.read_bytes().decode("utf-8"), bins.manifest.get("eos_id"))
    if tokenizer.sha256 != bins.manifest.get("tokenizer_sha256"):
        raise ValueError(f"{file}: not the tokenizer that made the bins; prepare the folder again")
    return tokenizer


def sample(texts: Callable[[], Iterable[str]], limit: int = SAMPLE_CHARACTERS) -> Iterator[str]:
    """Pieces spread evenly over the texts, about `limit` characters together; everything if it is not more."""
    total = sum(len(text) for text in texts())
    stride = max(1, -(-total // limit))
    pieces = (text[i : i + PIECE_CHARACTERS] for text in texts() for i in range(0, len(text), PIECE_CHARACTERS))
    return itertools.islice(pieces, 0, None, stride)


def _read(folder: Path) -> tuple[Bins, Tokenizer]:
    bins = open_bins(folder)
    return bins, bins_tokenizer(bins)
