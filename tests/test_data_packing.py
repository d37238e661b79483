"""Rows: running text loses nothing and never mixes documents; packing keeps every example whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.bins import Bins
from jaxlm.data.packing import Examples, RunningRows, pack, rows_of

COLUMNS = {"tokens": "int32", "targets": "int32", "mask": "float32", "segments": "int32", "positions": "int32"}


def as_bins(documents):
    tokens = np.concatenate([np.zeros(0, np.uint16), *[np.array(d, np.uint16) for d in documents]])
    return Bins(None, tokens, np.cumsum([0, *map(len, documents)], dtype=np.int64), {}, "")


def as_examples(documents, labels=None):
    tokens = np.concatenate([np.zeros(0, np.int32), *[np.array(d, np.int32) for d in documents]])
    labels = np.ones(len(tokens), bool) if labels is None else np.concatenate(labels)
    return Examples(tokens, labels, np.cumsum([0, *map(len, documents)], dtype=np.int64))


def numbered(sizes):
    """Documents of these sizes, every token of all of them different."""
    starts = np.cumsum([0, *sizes])
    return [np.arange(start, start + size) + 1 for start, size in zip(starts, sizes, strict=False)]


def check_row(row, length):
    """What holds for every row."""
    assert {name: str(values.dtype) for name, values in row.items()} == COLUMNS
    assert all(values.shape == (length,) for values in row.values())
    segments, real = row["segments"], row["segments"] > 0
    assert not real[np.argmin(real) :].any() or real.all(), "padding stands at the end"
    assert (np.diff(segments[real]) >= 0).all() and (not real.any() or segments[0] == 1)
    starts = np.flatnonzero(np.diff(segments, prepend=0) != 0)
    for start in starts[segments[starts] > 0]:
        inside = segments == segments[start]
        assert (row["positions"][inside] == np.arange(inside.sum())).all()
    assert not row["mask"][~real].any() and not row["tokens"][~real].any() and not row["positions"][~real].any()


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9), st.booleans())
def test_running_rows(sizes, length, pad_tail):
    documents = numbered(sizes)
    bins, total = as_bins(documents), sum(sizes)
    rows = RunningRows(bins, length, 1000, 0, total, pad_tail)
    owner = {int(token): number for number, document in enumerate(documents) for token in document}
    labels = []
    for row in (rows[i] for i in range(len(rows))):
        check_row(row, length)
        for token, target, mask, segment in zip(*(row[c] for c in ("tokens", "targets", "mask", "segments"))):
            if segment:
                assert target == token + 1
                assert bool(mask) == (owner[int(token)] == owner[int(target)])
            if mask:
                labels.append(int(target))
        for segment in set(row["segments"].tolist()) - {0}:
            assert len({owner[int(token)] for token in row["tokens"][row["segments"] == segment]}) == 1
    firsts = {int(document[0]) for document in documents}
    covered = total if pad_tail else len(rows) * length + 1
    assert labels == [token for token in range(2, covered + 1) if token not in firsts]
    assert rows.input_tokens == sum(int((rows[i]["segments"] > 0).sum()) for i in range(len(rows)))


def test_one_token_documents_contribute_nothing():
    rows = RunningRows(as_bins(numbered([1, 1, 1, 3, 1])), 6, 100, 0, 7)
    row = rows[0]
    assert row["mask"].tolist() == [0, 0, 0, 1, 1, 0]
    assert row["segments"].tolist() == [1, 2, 3, 4, 4, 4] and row["positions"].tolist() == [0, 0, 0, 0, 1, 2]
    assert len(RunningRows(as_bins(numbered([1])), 6, 100, 0, 1, pad_tail=True)) == 0


def test_an_id_outside_the_vocabulary_is_refused_where_it_is_read(tmp_path):
    bins = as_bins([[1, 2, 3], [4, 50, 6]])
    bins = Bins(tmp_path, bins.tokens, bins.documents, {}, "")
    rows = RunningRows(bins, 2, 50, 0, 6)
    assert rows[0]["targets"].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"token 4 \(in document 2, from 1\) is id 50, outside the vocabulary of 50"):
        rows[1]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 20), max_size=60), st.integers(20, 40))
def test_packing_invariants(sizes, capacity):
    rows = pack(np.array(sizes, np.int64), capacity)
    assert sorted(example for row in rows for example in row) == list(range(len(sizes)))
    fill = [sum(sizes[example] for example in row) for row in rows]
    assert all(total <= capacity for total in fill)
    # at most one row is half empty or less: two such rows would have been one
    assert sum(2 * total <= capacity for total in fill if total) <= 1
    assert rows == pack(np.array(sizes, np.int64), capacity)


def test_best_fit_takes_the_fullest_row():
    assert pack(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match=r"example 1 of size 11 exceeds 10"):
        pack(np.array([1, 11]), 10)
    many = np.random.default_rng(0).integers(1, 500, 2000)
    assert len(pack(many, 512)) <= 1.02 * many.sum() / 512 + 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=15), st.booleans(), st.integers(0, 2**31))
def test_example_rows(sizes, packing, seed):
    documents = numbered(sizes)
    labels = [np.random.default_rng(seed + i).random(size) < 0.6 for i, size in enumerate(sizes)]
    rows = rows_of(as_examples(documents, labels), 8, packing)
    found = {}
    for row in (rows[i] for i in range(len(rows))):
        check_row(row, 8)
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            found[int(row["tokens"][inside][0])] = (row["tokens"][inside], row["targets"][inside], row["mask"][inside])
    assert len(found) == len(sizes) and (packing or len(rows) == len(sizes))
    for document, label in zip(documents, labels, strict=True):
        tokens, targets, mask = found[int(document[0])]
        assert tokens.tolist() == document[:-1].tolist() and targets.tolist() == document[1:].tolist()
        assert mask.tolist() == label[1:].astype(float).tolist()
    assert rows.input_tokens == sum(sizes) - len(sizes)
