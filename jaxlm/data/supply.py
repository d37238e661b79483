"""From the `data` section to a tokenizer and two sets of rows: the one door that training and evaluation use."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.bins import VALIDATION, Bins, check_ids, is_bins, open_bins
from jaxlm.data.config import DataConfig, MixtureConfig
from jaxlm.data.corpus import docstring_tasks
from jaxlm.data.dataset import Dataset, Rows
from jaxlm.data.mixture import Mixture, label_share, mixed
from jaxlm.data.packing import Examples, RunningRows, rows_of
from jaxlm.data.pairs import Pair, PairRows, encode_pairs, read_sets
from jaxlm.data.prepare import bins_tokenizer, prepared, sample, text_parts
from jaxlm.data.prompts import prompt_records, read_prompts
from jaxlm.data.sources import Record, content_hash, digest, is_plain_text, read_records
from jaxlm.data.splits import SHARE, SMALL_SET, hold_out_rows
from jaxlm.data.supervised import Render, Sample, encode_samples, read_samples, sample_key
from jaxlm.data.tokenizer import DEFAULT_VOCABULARY, Tokenizer, load_tokenizer, token_bytes, train_tokenizer

VERSION = 1
"""To be raised with every change of the code that changes the rows made from the same data."""

RUNNING = ("next_token",)
SUPERVISED = ("sft", "distill")
PAIRS = ("dpo", "simpo", "orpo", "reward")
LABELLED = ("kto",)
PROMPTS = ("grpo", "ppo")


class Data(NamedTuple):
    """What training reads.

    Attributes:
      tokenizer: of the data.
      train, validation: rows of the same length.
      token_bytes: int32 [V], UTF-8 bytes behind each token, for bits per byte.
      notes: what the user should be told: examples cut or dropped, a validation set that is not held out.
      others: further held-out rows by name; evaluated as `eval/<name>/...`.
    """

    tokenizer: Tokenizer
    train: Dataset
    validation: Dataset
    token_bytes: np.ndarray
    notes: tuple[str, ...] = ()
    others: Mapping[str, Dataset] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `open_data`, checked."""

    config: DataConfig
    kind: str
    tokenizer: Tokenizer | None
    vocab_size: int | None
    render: Render | None
    reserve: int

    @property
    def name(self) -> str:
        return f"data.path: {self.config.path or 'the embedded corpus'}"


def open_data(
    config: DataConfig,
    *,
    kind: str = "next_token",
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    render: Render | None = None,
    reserve: int = 0,
) -> Data:
    """Open the data of a run, preparing and caching what has to be.

    Running text (`next_token`, and .txt files or token bins for every kind) is cut into rows; rows of data become an
    example each, those of preferences a pair (see `pairs`). With `config.path` null, rows are tasks made of the
    docstrings of the embedded corpus, and everything else is its text.

    Args:
      config: the `data` section.
      kind: the objective's kind.
      tokenizer: the model's, with its EOS; `config.tokenizer` comes first. Where neither is given, that of the token
        bins is used, or one of `vocab_size` is trained on the training part.
      vocab_size: V of the model; None is the tokenizer's. No row holds an id that is not below it.
      render: the chat template, for rows with messages, see `supervised.Render`.
      reserve: positions of a row that completions of the model's own need (`grpo`, `ppo`).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: `where: what; what to do` for everything that is wrong with the configuration or the data.
    """
    config.validate()
    known = RUNNING + SUPERVISED + PAIRS + LABELLED + PROMPTS
    if kind not in known:
        raise ValueError(f"objective.kind: no rows for {kind}; this door knows {', '.join(known)}")
    if config.tokenizer is not None:
        given = tokenizer.eos_id if tokenizer is not None else None
        loaded = load_tokenizer(config.tokenizer)
        tokenizer = loaded if loaded.eos_id is not None else dataclasses.replace(loaded, eos_id=given)
    request = _Request(config, kind, tokenizer, vocab_size, render, reserve)
    if config.mixture is not None and kind not in RUNNING + SUPERVISED:
        raise ValueError(
            f"data.mixture: general text cannot stand among the rows of objective.kind {kind}; leave it out"
        )
    if kind in PAIRS + LABELLED:
        return _open_pairs(request)
    if kind in PROMPTS:
        return _open_prompts(request)
    data = _open_running(request) if _is_running(config, kind) else _open_rows(request)
    return data if config.mixture is None else _with_general(request, data, config.mixture)


def _with_general(request: _Request, data: Data, mixture: MixtureConfig) -> Data:
    """The data with general text mixed in, and its held-out part beside."""
    plain = dataclasses.replace(
        request.config, path=mixture.path, validation=None, tokenizer=None, packing=False, mixture=None
    )
    try:
        general = open_data(plain, tokenizer=data.tokenizer, vocab_size=request.vocab_size)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.path", "data.mixture.path")) from None
    train, notes = mixed(data.train, general.train, mixture.ratio), data.notes
    if isinstance(train.rows, Mixture):
        shares = f"{mixture.ratio:.0%} of the rows and about {label_share(train.rows):.0%} of the labels"
        notes = (*notes, f"data.mixture: general text has {shares}")
    others = {**data.others, "general": general.validation}
    return data._replace(train=train, notes=notes, others=others)


def _is_running(config: DataConfig, kind: str) -> bool:
    if kind in RUNNING or is_bins(config.path):
        return True
    if config.path is None:
        return kind != "sft"
    return is_plain_text(config.path)


def _open_running(request: _Request) -> Data:
    config = request.config
    if is_bins(config.path):
        bins, tokenizer, content, held_out = _open_given_bins(request)
    else:
        content, parts = text_parts(config.path, config.validation, config.text_field)
        bins, tokenizer = prepared(content, parts, request.tokenizer, request.vocab_size)
        held_out = open_bins(bins.folder / VALIDATION) if is_bins(bins.folder / VALIDATION) else None
    vocab_size = request.vocab_size or tokenizer.size
    for part, name in ((bins, request.name), (held_out, _validation_name(config))):
        if part is not None:
            check_ids(part, vocab_size, name)
    length, total = config.sequence_length, len(bins.tokens)
    if not total:
        raise ValueError(f"{request.name}: no text; give a file with something in it")
    if config.validation is not None and held_out is None:
        raise ValueError(f"data.validation: {config.validation}: no text; give a file with something in it")
    stop = total if held_out is not None else max(total - max(round(total * SHARE), length + 1), 0)
    train = RunningRows(bins, length, vocab_size, 0, stop)
    if held_out is not None:
        validation = RunningRows(held_out, length, vocab_size, 0, len(held_out.tokens), pad_tail=True)
    else:
        validation = RunningRows(bins, length, vocab_size, stop, total, pad_tail=True)
    for rows, name in ((train, request.name), (validation, _validation_name(config))):
        if not len(rows):
            raise ValueError(
                f"{name}: {rows.stop - rows.start} tokens do not fill one row of {length} (data.sequence_length); "
                "give more text or lower it"
            )
    return _data(request, tokenizer, train, validation, content)


def _open_given_bins(request: _Request) -> tuple[Bins, Tokenizer, dict[str, str], Bins | None]:
    """Token bins that `data.path` names; `data.validation` may name others, or text for the same tokenizer."""
    config, vocab_size = request.config, request.vocab_size
    bins = open_bins(config.path or "", vocab_size)
    tokenizer = request.tokenizer or bins_tokenizer(bins)
    if tokenizer.sha256 != bins.manifest["tokenizer_sha256"]:
        raise ValueError(
            f"data.tokenizer: not the one that made the token bins in {config.path}; leave it out or prepare the text "
            "again"
        )
    vocab_size = vocab_size or tokenizer.size
    if config.validation is None:
        own = bins.folder / VALIDATION
        held_out = open_bins(own, vocab_size) if is_bins(own) else None
    elif is_bins(config.validation):
        held_out = open_bins(config.validation, vocab_size)
    else:
        text, parts = text_parts(config.validation, None, config.text_field)
        whole = lambda: (part._replace(held_out=False) for part in parts())  # noqa: E731
        held_out = prepared(text | {"split": "none"}, whole, tokenizer, None)[0]
    content = {"data.path": bins.content} | ({"data.validation": held_out.content} if held_out else {})
    return bins, tokenizer, content, held_out


def _open_rows(request: _Request) -> Data:
    config = request.config
    samples, held_out, content = _samples(request)
    notes: list[str] = []
    if not samples:
        raise ValueError(f"{request.name}: no rows; give a file with something in it")
    if not held_out:
        sides = hold_out_rows([sample_key(sample) for sample in samples])
        held_out = [sample for sample, side in zip(samples, sides, strict=True) if side]
        samples = [sample for sample, side in zip(samples, sides, strict=True) if not side]
    tokenizer = request.tokenizer
    if tokenizer is None:
        texts = lambda: (sample.text for sample in samples)  # noqa: E731
        tokenizer = train_tokenizer(sample(texts), request.vocab_size or DEFAULT_VOCABULARY)
    train = _examples(request, samples, tokenizer, notes)
    if not held_out:
        validation = train
        notes.append(_nothing_held_out(len(samples)))
    else:
        validation = _examples(request, held_out, tokenizer, [])
    length = config.sequence_length
    rows = [rows_of(part, length, config.packing) for part in (train, validation)]
    if config.packing and len(rows[0]):
        filled = rows[0].input_tokens / (len(rows[0]) * length)
        notes.append(f"data.packing: {len(rows[0].groups)} examples in {len(rows[0])} rows, {filled:.1%} filled")
    data = _data(request, tokenizer, rows[0], rows[1], content)
    return data._replace(notes=(*data.notes, *notes))


def _open_pairs(request: _Request) -> Data:
    config, kind = request.config, request.kind
    for field, wanted in (("packing", False), ("mixture", None)):
        if getattr(config, field) != wanted:
            raise ValueError(f"data.{field}: cannot be with objective.kind {kind}; leave it out")
    sets, content = read_sets(config, kind in LABELLED, request.render)
    if not sets["train"]:
        raise ValueError(f"{request.name}: no rows; give a file with something in it")
    tokenizer = request.tokenizer
    if tokenizer is None:
        texts = lambda: (side.text for pair in sets["train"] for side in pair.sides)  # noqa: E731
        tokenizer = train_tokenizer(sample(texts), request.vocab_size or DEFAULT_VOCABULARY)
    rows = {name: _pair_rows(request, pairs, tokenizer) for name, pairs in sets.items()}
    train = rows.pop("train")
    notes: tuple[str, ...] = ()
    if train.truncated:
        notes += (f"data: {train.truncated} of {len(sets['train'])} rows were longer than data.sequence_length "
                  f"{config.sequence_length}; {train.dropped} of them were dropped, the others cut",)  # fmt: skip
    if "validation" not in rows:
        notes += (_nothing_held_out(len(train)),)
    data = _data(request, tokenizer, train, rows.pop("validation", train), content)
    further = {
        name: Dataset(part, data.train.identity | {"part": name}, f"data: the set {name}").spread(
            config.validation_rows
        )
        for name, part in rows.items()
    }
    return data._replace(notes=(*data.notes, *notes), others={**data.others, **further})


def _pair_rows(request: _Request, pairs: list[Pair], tokenizer: Tokenizer) -> PairRows:
    rows = encode_pairs(pairs, tokenizer, request.config.sequence_length, whole=request.kind == "reward")
    for side in rows.sides:
        _check_ids(request, side.examples, tokenizer)
    return rows


def _open_prompts(request: _Request) -> Data:
    config = request.config
    for field, wanted in (("packing", False), ("mixture", None)):
        if getattr(config, field) != wanted:
            raise ValueError(f"data.{field}: cannot be with objective.kind {request.kind}; leave it out")
    room = config.sequence_length - request.reserve
    if room < 1:
        raise ValueError(
            f"objective.max_new_tokens: {request.reserve} leaves no room for a prompt in data.sequence_length "
            f"{config.sequence_length}; change one of them"
        )
    records, held_out, content = prompt_records(config.path, config.validation)
    if not records:
        raise ValueError(f"{request.name}: no rows; give a file with something in it")
    tokenizer = request.tokenizer
    if tokenizer is None:
        texts = lambda: (str(record.fields.get("prompt")) for record in records)  # noqa: E731
        tokenizer = train_tokenizer(sample(texts), request.vocab_size or DEFAULT_VOCABULARY)
    train, cut = read_prompts(records, tokenizer, room)
    notes: tuple[str, ...] = (_nothing_held_out(len(records)),) if not held_out else ()
    if cut:
        notes += (
            f"data: {cut} of {len(records)} prompts lost their beginning: data.sequence_length {config.sequence_length}"
            f" leaves room for {room} tokens of them",
        )
    validation = read_prompts(held_out, tokenizer, room)[0].spread(config.validation_rows) if held_out else train
    top, vocab_size = max(map(max, train.ids + validation.ids)), request.vocab_size or tokenizer.size
    if top >= vocab_size:
        raise ValueError(
            f"{request.name}: token id {top} is outside the vocabulary of {vocab_size}; use the model's tokenizer or a "
            "larger model.vocab_size"
        )
    data = _data(request, tokenizer, train, validation, content)
    return data._replace(notes=(*data.notes, *notes))


def _nothing_held_out(count: int) -> str:
    return (
        f"validation: nothing is held out of {count} rows (fewer than {SMALL_SET}); evaluations are on the "
        "training rows; set data.validation"
    )


def _samples(request: _Request) -> tuple[list[Sample], list[Sample], dict[str, str]]:
    """The rows of training and of a validation set of its own (else empty), and the hashes of both."""
    config = request.config

    def read(records: Iterable[Record]) -> list[Sample]:
        return list(read_samples(records, request.render, config.text_field))

    if config.path is None:
        parts = [docstring_tasks("train"), docstring_tasks("validation")]
        rows = [[Record(f"{row['module']}:{row['function']}", dict(row)) for row in part] for part in parts]
        content = {"data.path": digest(*(row["prompt"] + row["completion"] for part in parts for row in part))}
        train, held_out = read(rows[0]), read(rows[1])
    else:
        content = {"data.path": content_hash(config.path)}
        train, held_out = read(read_records(config.path, config.text_field)), []
    if config.validation is not None:
        content["data.validation"] = content_hash(config.validation, "data.validation")
        held_out = read(read_records(config.validation, config.text_field, "data.validation"))
        if not held_out:
            raise ValueError(f"data.validation: {config.validation}: no rows; give a file with something in it")
    return train, held_out, content


def _examples(request: _Request, samples: list[Sample], tokenizer: Tokenizer, notes: list[str]) -> Examples:
    examples = encode_samples(samples, tokenizer, request.config.sequence_length)
    _check_ids(request, examples, tokenizer)
    if examples.truncated:
        first = f", the first at {examples.where}" if examples.dropped else ""
        notes.append(
            f"data: {examples.truncated} of {len(samples)} examples were cut to {request.config.sequence_length + 1} "
            f"tokens; {examples.dropped} of them{first} had no label left and were dropped"
        )
    return examples


def _check_ids(request: _Request, examples: Examples, tokenizer: Tokenizer) -> None:
    vocab_size = request.vocab_size or tokenizer.size
    if examples.tokens.size and examples.tokens.max() >= vocab_size:
        position = int(np.argmax(examples.tokens >= vocab_size))
        raise ValueError(
            f"{request.name}: token {position} is id {examples.tokens[position]}, outside the vocabulary of "
            f"{vocab_size}; use the model's tokenizer or a larger model.vocab_size"
        )


def _data(request: _Request, tokenizer: Tokenizer, train: Rows, validation: Rows, content: dict[str, str]) -> Data:
    config = request.config
    identity: dict[str, Any] = content | {
        "data.tokenizer": tokenizer.sha256,
        "data.sequence_length": config.sequence_length,
        "data.packing": config.packing,
        "end-of-text token": tokenizer.eos_id,
        "rows": f"{request.kind} {VERSION}",
    }
    held_out = Dataset(validation, identity | {"part": "validation"}, _validation_name(config))
    if config.validation is None:
        held_out = held_out.spread(config.validation_rows)
    notes: tuple[str, ...] = ()
    if request.tokenizer is None and not is_bins(config.path) and tokenizer.size < (request.vocab_size or 0):
        notes = (f"data: the text gave {tokenizer.size} tokens, fewer than model.vocab_size {request.vocab_size}",)
    sizes = token_bytes(tokenizer, max(request.vocab_size or 0, tokenizer.size))
    return Data(tokenizer, Dataset(train, identity, request.name), held_out, sizes, notes)


def _validation_name(config: DataConfig) -> str:
    return f"data.validation: {config.validation or 'the held-out part of ' + (config.path or 'the embedded corpus')}"
