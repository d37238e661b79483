"""Perplexity and bits per byte of a text, by the sums that training evaluates with."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.sources import READERS, Document, read_documents, text_of
from jaxlm.data.tokenizer import token_bytes
from jaxlm.evals.results import Outcome
from jaxlm.evals.scoring import Request, batches, inputs_of, rolling_windows
from jaxlm.evals.subject import Subject, exact
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.training.evaluate import Scorer, Sums, text_metrics, text_sums
from jaxlm.types import Array, Batch, Variables


def read_texts(path: str | Path) -> list[Document]:
    """The texts of a file: rows of .jsonl and .parquet (`text`); a file of any other kind is one UTF-8 text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: `file:line: what; what to do`, or nothing to read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file; check the name and the current directory")
    if file.is_dir() or file.suffix in READERS:
        documents = list(read_documents(str(file), field="--data"))
    else:
        (record,) = READERS[".txt"](file, "text")
        documents = [Document(record.where, text_of(record, "text", ""))]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{path}: no text in it; give a file with some")
    return documents


def evaluate(subject: Subject, documents: list[Document], task: str) -> Outcome:
    """Perplexity of texts, each in windows of its own: see `rolling_windows`.

    `loss` is in nats per token, `perplexity` its exponential, `bits_per_byte` per byte of UTF-8.

    Args:
      subject: the model; the window is its `max_length`.
      documents: as from `read_texts`.
      task: name of the results.

    Raises:
      ValueError: texts of less than a token.
    """
    windows, size = [], 0
    for document in documents:
        prefix, ids, skipped = _with_prefix(subject, document.text)
        windows += rolling_windows(ids, prefix, subject.cfg.max_length)
        size += len(document.text.encode("utf-8")) - skipped
    tokens = sum(len(window.continuation) for window in windows)
    if not tokens:
        raise ValueError(f"{task}: no token to predict in it; give a longer text")
    with exact():
        loss = text_metrics(_scorer(subject), subject.variables, _batches(subject, windows))["loss"]
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(loss)))
    metrics = {"loss": loss, "perplexity": perplexity, "bits_per_byte": loss * tokens / math.log(2) / max(size, 1)}
    results = {task: {f"{name},none": value for name, value in metrics.items()}}
    count = {"original": len(documents), "effective": len(documents)}
    return Outcome(results, {}, {"n-samples": {task: count}, "n-tokens": {task: tokens}})


def _with_prefix(subject: Subject, text: str) -> tuple[int, list[int], int]:
    """The token before the text, the tokens to predict, and how many bytes of the text are not predicted.

    A model without tokens that begin or end a text starts from the text's own first token.
    """
    ids = subject.encode(text)
    if subject.prefix_id is not None:
        return subject.prefix_id, ids, 0
    return ids[0], ids[1:], int(token_bytes(subject.tokenizer, subject.cfg.V)[ids[0]])


def _batches(subject: Subject, windows: list[Request]) -> Iterator[Batch]:
    done = 0
    for rows in batches(subject, windows):
        # Repeated rows fill up the last batch: nothing of theirs is scored.
        filler = np.arange(len(rows.labels)) >= len(rows.chosen)
        labels = np.where(filler, 0, rows.labels)
        yield {"tokens": jnp.asarray(rows.tokens), "lengths": jnp.asarray(rows.lengths), "labels": jnp.asarray(labels)}
        done += len(rows.chosen)
        subject.report(done, len(windows))


def _scorer(subject: Subject) -> Scorer:
    sizes_V = jnp.asarray(token_bytes(subject.tokenizer, subject.cfg.V), jnp.float32)
    return functools.partial(_sums, subject.cfg, subject.compute, sizes_V)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(cfg: ModelConfig, compute: Compute, bytes_V: Array, variables: Variables, rows: Batch) -> Sums:
    apply = functools.partial(transformer.apply, cfg, compute=compute)
    return text_sums(apply, bytes_V, variables, inputs_of(**rows))
