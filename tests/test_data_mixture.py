"""General rows among those of a task: how many, which, in what order, and that they are told apart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.config import DataConfig, MixtureConfig
from jaxlm.data.loader import Loader
from jaxlm.data.mixture import Mixture, label_share
from jaxlm.data.supply import open_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))


class Numbers:
    """Rows that are their number, with one label each."""

    def __init__(self, first, count, labels=1):
        self.first, self.count, self.labels = first, count, labels

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"tokens": np.array([self.first + index]), "mask": np.ones(self.labels, np.float32)}


@settings(deadline=None)
@given(st.floats(0, 0.999), st.integers(0, 10**9), st.integers(1, 5000))
def test_any_stretch_of_the_order_has_the_ratio(ratio, start, count):
    """And within each part the draws go on by one."""
    mixture = Mixture(Numbers(0, 7), Numbers(100, 3), ratio)
    draws = [mixture.draw(i) for i in range(start, start + count)]
    assert abs(sum(part for part, _ in draws) - count * ratio) <= 1 + count * 1e-5
    for part in (0, 1):
        numbers = [number for which, number in draws if which == part]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def test_rows_of_both_parts():
    mixture = Mixture(Numbers(0, 7, labels=2), Numbers(100, 3, labels=6), 0.25)
    assert len(mixture) == 10 and [int(mixture[i]["tokens"][0]) for i in (0, 6, 7, 9)] == [0, 6, 100, 102]
    assert label_share(mixture) == pytest.approx(0.25 * 6 / (0.75 * 2 + 0.25 * 6))


@pytest.fixture
def paths(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rng = np.random.default_rng(0)
    words = rng.choice(["the", "quick", "brown", "fox"], 4000)
    (tmp_path / "general.txt").write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 4000, 10)))
    return tmp_path


def opened(paths, ratio, **changes):
    mixture = MixtureConfig(path=str(paths / "general.txt"), ratio=ratio)
    config = DataConfig(path=str(paths / "rows.jsonl"), sequence_length=32, mixture=mixture, **changes)
    return open_data(config, kind="sft", vocab_size=300)


def test_a_run_sees_the_ratio_and_every_row_once_an_epoch(paths):
    data = opened(paths, 0.2)
    rows = data.train.rows
    task = len(rows.task)
    loader = Loader(data.train, 20, seed=3)
    drawn = np.concatenate([loader.rows(step) for step in range(20)])
    general = drawn >= task
    assert [int(general[i : i + 20].sum()) for i in range(0, 400, 20)] == [4] * 20
    ours, theirs = drawn[~general], drawn[general] - task
    assert sorted(ours[:task]) == list(range(task))
    assert len(set(theirs)) == len(theirs) == 80 < len(rows.general)
    hosts = [Loader(data.train, 20, seed=3, host=h, hosts=2).batch(7)["tokens"] for h in range(2)]
    whole = loader.batch(7)["tokens"]
    assert (hosts[0] == whole[0::2]).all() and (hosts[1] == whole[1::2]).all()
    assert (Loader(data.train, 20, seed=3).rows(11) == drawn[220:240]).all(), "no state but the step"
    batch = loader.batch(0)
    full = batch["mask"].sum(1) > 20
    assert full.sum() == 4 and "general text has 20% of the rows" in data.notes[-1]


def test_validation_is_that_of_the_task_and_general_text_is_beside_it(paths):
    plain = open_data(DataConfig(path=str(paths / "rows.jsonl"), sequence_length=32), kind="sft", vocab_size=300)
    data = opened(paths, 0.2)
    assert data.validation.identity["data.path"] == plain.validation.identity["data.path"]
    assert len(data.validation) == len(plain.validation) and plain.others == {}
    (name,) = data.others
    held_out = data.others["general"]
    assert name == "general" and (held_out.rows[0]["mask"] == 1).all()
    train = {
        row.tobytes() for row in (data.train.rows.general[i]["tokens"] for i in range(len(data.train.rows.general)))
    }
    assert not train & {held_out.rows[i]["tokens"].tobytes() for i in range(len(held_out))}


def test_nothing_is_mixed_in_at_ratio_0_and_the_identity_follows(paths):
    plain = open_data(DataConfig(path=str(paths / "rows.jsonl"), sequence_length=32), kind="sft", vocab_size=300)
    none, some, more = (opened(paths, ratio) for ratio in (0.0, 0.2, 0.3))
    assert none.train.identity == plain.train.identity and len(none.train) == len(plain.train)
    assert list(none.others) == ["general"]
    assert len({data.train.fingerprint for data in (none, some, more)}) == 3
    assert (Loader(none.train, 10).rows(3) == Loader(plain.train, 10).rows(3)).all()


def test_what_is_wrong_with_general_text_is_said_under_its_own_name(paths):
    (paths / "general.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.mixture\.path: .*general\.txt: no such file"):
        opened(paths, 0.2)
    (paths / "general.txt").write_text("too little")
    with pytest.raises(ValueError, match=r"data\.mixture\.path: .* do not fill one row of 32"):
        opened(paths, 0.2)
    mixture = DataConfig(path=str(paths / "rows.jsonl"), mixture=MixtureConfig())
    for kind in ("dpo", "kto", "grpo"):
        with pytest.raises(ValueError, match=rf"data\.mixture: general text cannot .* objective\.kind {kind}"):
            open_data(mixture, kind=kind)
