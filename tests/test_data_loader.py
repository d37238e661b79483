"""The order of rows: a function of seed and step alone, the same on any number of hosts; prefetching never hangs."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.dataset import Dataset, count_tokens, fingerprint
from jaxlm.data.loader import Loader, evaluation_batches, prefetch
from jaxlm.data.packing import Examples, rows_of


def dataset(count, length=4):
    """Row i holds one document of 1 to `length` inputs, all of them i + 1."""
    sizes = [2 + i % length for i in range(count)]
    tokens = np.concatenate([np.full(size, i + 1, np.int32) for i, size in enumerate(sizes)])
    examples = Examples(tokens, np.ones(len(tokens), bool), np.cumsum([0, *sizes], dtype=np.int64))
    return Dataset(rows_of(examples, length, False), {"data.path": "x"}, "data.path: x")


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_every_epoch_holds_every_row_once(count, seed):
    loader = Loader(dataset(count), count, seed)
    for step in range(3):
        assert sorted(loader.rows(step).tolist()) == list(range(count))
    smaller = Loader(dataset(count), max(count // 3, 1), seed)
    stream = np.concatenate([smaller.rows(step) for step in range(3 * count // smaller.batch_size + 1)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_the_order_is_shuffled_anew_and_by_the_seed():
    loader = Loader(dataset(200), 200, 7)
    epochs = [loader.rows(step).tolist() for step in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != list(range(200))
    assert Loader(dataset(200), 200, 8).rows(0).tolist() != epochs[0]


def test_order_does_not_depend_on_hosts_and_resumes_by_step():
    data = dataset(37)
    alone = Loader(data, 12, 3)
    for hosts in (1, 2, 3, 4):
        fresh = [Loader(data, 12, 3, host, hosts) for host in range(hosts)]
        for step in (5, 0, 1000):  # any step, in any order: there is no state
            parts = [loader.batch(step)["tokens"] for loader in fresh]
            whole = np.empty((12, 4), np.int32)
            for host, part in enumerate(parts):
                whole[host::hosts] = part
            assert (whole == alone.batch(step)["tokens"]).all()


def test_the_order_is_the_same_in_another_version():
    """Resuming after an upgrade must continue the same order; these numbers must never change."""
    assert Loader(dataset(10), 10, 0).rows(0).tolist() == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3]
    assert Loader(dataset(10), 10, 0).rows(1).tolist() == [9, 6, 1, 8, 2, 0, 3, 5, 4, 7]


def test_bad_requests_are_named():
    with pytest.raises(
        ValueError, match=r"data.path: x: 5 rows of data are fewer than one batch \(train.batch_size 6\)"
    ):
        Loader(dataset(5), 6)
    with pytest.raises(ValueError, match=r"train.batch_size: 6 is not a multiple of the 4 processes"):
        Loader(dataset(50), 6, 0, 0, 4)
    with pytest.raises(ValueError, match=r"train.batch_size: 0 is not positive"):
        Loader(dataset(5), 0)
    with pytest.raises(ValueError, match=r"run.seed: -1 is not in"):
        Loader(dataset(5), 1, -1)


def test_identity_names_what_changed():
    first = Loader(dataset(5), 2, 0).identity
    second = Loader(dataset(5), 2, 1).identity
    assert {key for key in first if first[key] != second[key]} == {"run.seed"}
    assert fingerprint(first) != fingerprint(second) == fingerprint(dict(reversed(second.items())))


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_row_once(hosts):
    data = dataset(11)
    seen = []
    for host in range(hosts):
        for batch in evaluation_batches(data, 4, host, hosts):
            assert batch["tokens"].shape == (4 // hosts, 4)
            assert not batch["mask"][batch["segments"] == 0].any()
            seen += [row for row in batch["tokens"][:, 0].tolist() if row]
    assert sorted(seen) == list(range(1, 12))


def test_counts_and_spread():
    data = dataset(8)
    assert count_tokens(data.batch([0, 3])) == 1 + 4 and data.tokens == 20
    assert [int(data.spread(4).rows[i]["tokens"][0]) for i in range(4)] == [1, 3, 5, 7]
    assert data.spread(4).tokens == 1 + 3 + 1 + 3 and data.spread(100) is data


def test_prefetch_gives_all_steps_in_order():
    with prefetch(lambda step: step * step, range(3, 50)) as batches:
        assert list(batches) == [step * step for step in range(3, 50)]


def test_prefetch_raises_what_the_worker_raised():
    def make(step):
        if step == 2:
            raise ValueError("file:7: bad row")
        return step

    with pytest.raises(ValueError, match="file:7: bad row"), prefetch(make, range(5)) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        next(batches)


def test_a_worker_that_hangs_is_an_error_that_says_where():
    release = threading.Event()
    start = time.monotonic()
    hangs = pytest.raises(RuntimeError, match=r"no batch within 0.3 s .*threading")
    with hangs, prefetch(lambda step: release.wait(30), range(5), timeout=0.3) as batches:
        next(batches)
    assert time.monotonic() - start < 5
    release.set()


def test_a_worker_that_dies_is_an_error(monkeypatch):
    class Dead(threading.Thread):
        def run(self):
            pass

    monkeypatch.setattr(threading, "Thread", Dead)
    with pytest.raises(RuntimeError, match="the thread has died"), prefetch(lambda step: step, range(5)) as batches:
        next(batches)


def test_leaving_ends_the_worker():
    before = threading.active_count()
    with prefetch(lambda step: np.zeros(10), iter(range(10**9)), depth=2) as batches:
        next(batches)
    assert threading.active_count() <= before
