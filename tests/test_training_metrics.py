"""Metrics file, throughput and progress: nothing is lost, nothing is invented."""

import dataclasses
import io
import itertools
import json
import math
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.training import metrics, progress, throughput
from jaxlm.training.metrics import MetricsFile

ROWS = [{"step": s, "loss": 3.0 / s, "grad_norm": math.inf, "note": "é\n"} for s in range(1, 5)]


def written(path, rows):
    with MetricsFile(path) as file:
        for row in rows:
            file.write(row)
    return path


@given(st.lists(st.dictionaries(st.text(max_size=8), st.floats() | st.integers() | st.text(max_size=5)), max_size=5))
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows):
    rows = [{"step": i, **{k: v for k, v in row.items() if k != "step"}} for i, row in enumerate(rows)]
    path = written(tmp_path_factory.mktemp("run") / "metrics.jsonl", rows)
    assert repr(metrics.read(path)) == repr(rows)
    assert repr([json.loads(line) for line in path.read_text().splitlines()]) == repr(rows)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), 0.10000000149011612),
        (jnp.float32(0.1), 0.10000000149011612),
        (jnp.bfloat16(0.1), 0.10009765625),
        (np.int64(7), 7),
        (jnp.int32(7), 7),
        (np.bool_(True), True),
        (np.array([2.5]), 2.5),
        (1e-300, 1e-300),
    ],
)
def test_scalars_of_any_library_keep_every_bit(tmp_path, value, plain):
    (row,) = metrics.read(written(tmp_path / "m", [{"step": 1, "x": value}]))
    assert row["x"] == plain and type(row["x"]) is type(plain)


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1, "x": np.zeros(3)}, {"step": 1, "x": [1]}])
def test_rows_that_are_none_are_refused_and_leave_nothing(tmp_path, row):
    with pytest.raises(ValueError, match=r"step|not a scalar"):
        written(tmp_path / "m", [row])
    assert (tmp_path / "m").read_bytes() == b""


def test_every_row_can_be_read_while_the_file_is_open(tmp_path):
    with MetricsFile(tmp_path / "m") as file:
        for count, row in enumerate(ROWS, start=1):
            file.write(row)
            assert metrics.read(tmp_path / "m") == ROWS[:count]


def test_a_file_cut_anywhere_reads_as_its_whole_rows_and_can_be_continued(tmp_path):
    whole = written(tmp_path / "whole", ROWS).read_bytes()
    ends = [0, *itertools.accumulate(len(line) + 1 for line in whole.split(b"\n")[:-1])]
    for length in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        # A row without its newline is whole too.
        kept = sum(length >= end - 1 for end in ends[1:])
        assert metrics.read(path) == ROWS[:kept]
        assert metrics.read(written(path, ROWS[-1:])) == [*ROWS[:kept], ROWS[-1]]


def test_a_broken_line_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*mend or remove"):
        metrics.read(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        metrics.read(tmp_path / "missing")


def test_a_full_disk_is_reported_with_the_path_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(path) as file:
        file.write(ROWS[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            with pytest.raises(OSError, match=r"metrics\.jsonl"):
                file.write(ROWS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert metrics.read(path) == ROWS[:1]
        file.write(ROWS[2])
    assert metrics.read(path) == [ROWS[0], ROWS[2]]


def test_columns_are_ordered_and_of_a_repeated_step_the_last_counts():
    rows = [{"step": 2, "a": 1}, {"step": 1, "a": 5.0, "b": "text"}, {"step": 2, "a": 7.0}, {"step": 3, "c": math.nan}]
    found = metrics.columns(rows)
    assert found["a"] == {1: 5.0, 2: 7.0} and list(found["a"]) == [1, 2]
    assert set(found) == {"a", "c"}


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_the_meter_leaves_out_compilation_and_pauses():
    clock = Clock()
    meter = throughput.Meter(total=10, flops_per_token=2.0, peak=1000.0, now=clock)
    clock.time += 60  # compilation
    assert meter.tick(1, 100) == {"seconds": 60.0}
    clock.time += 2
    assert meter.tick(2, 200) == {
        "seconds": 62.0,
        "tokens_per_second": 50.0,
        "peak_fraction": 0.1,
        "eta": 16.0,
    }
    with meter.paused():
        clock.time += 30
    clock.time += 2
    values = meter.tick(3, 300)
    assert values["tokens_per_second"] == 50.0
    assert values["eta"] == 34 / 2 * 7  # what is left will have its pauses too


def test_the_meter_forgets_what_lies_before_its_window():
    clock = Clock()
    meter = throughput.Meter(total=1000, window=10.0, now=clock)
    for step in range(1, 200):
        clock.time += 1.0 if step < 100 else 0.5
        values = meter.tick(step, step * 8)
    assert values["tokens_per_second"] == 16.0


CONFIGS = {
    "dense": ModelConfig(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50, d_ff=80, tie_embeddings=False),
    "plain": ModelConfig(d_model=32, n_layers=2, n_heads=2, head_dim=8, vocab_size=50, gated=False, window=5),
    "experts": ModelConfig(
        d_model=16, n_layers=3, n_heads=2, vocab_size=40, moe=MoEConfig(experts=4, top_k=4, d_ff=24, dense_layers=(1,))
    ),
}


CONFIGS["shared"] = dataclasses.replace(
    CONFIGS["experts"], moe=MoEConfig(experts=4, top_k=4, d_ff=24, n_shared_experts=2, dense_layers=(1,))
)


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_weights_are_those_of_the_model(name):
    from jaxlm.nn.transformer import init

    cfg = CONFIGS[name]
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))["params"]
    matrices = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in str(path))
    lookup = 0 if cfg.tie_embeddings else cfg.V * cfg.D
    assert sum(throughput.matmul_parameters(cfg).values()) == matrices - lookup


def test_experts_count_as_far_as_they_are_active():
    counts = throughput.matmul_parameters(CONFIGS["experts"])
    assert counts["up"] == 2 * 4 * 16 * 24 + 16 * CONFIGS["experts"].F
    assert counts["router"] == 2 * 16 * 4
    assert throughput.idle_parameters(CONFIGS["experts"]) == 0 == throughput.idle_parameters(CONFIGS["dense"])
    two = dataclasses.replace(CONFIGS["experts"], moe=MoEConfig(experts=4, top_k=2, d_ff=24, dense_layers=(1,)))
    idle = sum(counts.values()) - sum(throughput.matmul_parameters(two).values())
    assert throughput.idle_parameters(two) == idle == 2 * 2 * 3 * 16 * 24


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 1), (7, 20)])
def test_visible_keys_are_those_of_the_mask(length, window):
    cfg = ModelConfig(n_layers=2, window=window)
    mask = np.tril(np.ones((length, length)))
    if window is not None:
        mask *= np.triu(np.ones((length, length)), 1 - window)
    assert throughput.visible_keys(cfg, length) == pytest.approx(2 * mask.sum() / length)


def test_flops_are_six_per_weight_and_attention_with_its_causal_half():
    cfg = CONFIGS["dense"]
    weights = sum(throughput.matmul_parameters(cfg).values())
    attention = 12 * cfg.N * cfg.H * cfg.K * (16 + 1) / 2
    assert throughput.flops_per_token(cfg, 16) == 6 * weights + attention
    assert throughput.flops_per_token(cfg, 16, training=False) == (6 * weights + attention) / 3


def test_adapters_cost_less_than_full_training_and_grow_with_what_they_adapt():
    cfg = ModelConfig(d_model=32, n_layers=3, n_heads=4, vocab_size=50)
    costs = [
        throughput.flops_per_token(ModelConfig(d_model=32, n_layers=3, n_heads=4, vocab_size=50, lora=lora), 16)
        for lora in (LoraConfig(r=2, targets=("q_proj",)), LoraConfig(r=2), LoraConfig(r=4))
    ]
    assert costs == sorted(costs) and costs[-1] < throughput.flops_per_token(cfg, 16)
    one = 6 * 2 * (cfg.D + cfg.H * cfg.K) * cfg.N
    frozen = 4 * sum(throughput.matmul_parameters(cfg).values()) + 12 * cfg.N * cfg.H * cfg.K * 17 / 2
    assert costs[0] == frozen + one


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA H200", "float32", None),
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_the_peak_is_known_or_not_and_never_guessed(kind, dtype, peak):
    assert throughput.peak_flops(kind, dtype) == peak


def test_memory_is_that_of_this_process_where_the_device_does_not_count():
    before = throughput.memory_bytes(jax.devices()[0])
    held = np.ones(50_000_000, np.uint8)
    after = throughput.memory_bytes()
    assert 20e6 < before < after and after - before > 0.5 * held.nbytes


READING = {
    "loss": 5.12345,
    "learning_rate": 3e-4,
    "grad_norm": 1.234,
    "tokens_per_second": 12345.0,
    "peak_fraction": 0.41,
    "eta": 83.0,
    "memory": 1.2e9,
}


def test_a_step_line_says_all_it_knows_and_nothing_else():
    assert progress.step_line(10, 1000, READING) == (
        "step 10/1000  loss 5.1235  lr 3.00e-04  grad_norm 1.23  12.3k tok/s  41.0% of peak  eta 1:23  mem 1.2 GB"
    )
    assert progress.step_line(1, 5, {"loss": math.nan}) == "step 1/5  loss nan"


def test_a_log_has_the_first_and_the_last_step_and_ever_fewer_between():
    clock, stream = Clock(), io.StringIO()
    shown = progress.Plain(10_000, stream, now=clock)
    shown.status("compiling")
    for step in range(1, 10_001):
        shown.step(step, {"loss": math.nan if step == 5 else 1.0})
        clock.time += 1.0
    lines = stream.getvalue().splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:]]
    assert lines[0] == "compiling ..." and all("loss" in line for line in lines[1:])
    assert steps[:4] == [1, 5, 10, 15] and steps[-1] == 10_000
    gaps = np.diff(steps[2:-1])
    assert (np.diff(gaps) >= 0).all() and gaps[-1] == 60 and len(lines) < 500


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO(), "xterm"), (Terminal(), "dumb"), (Terminal(), "xterm")])
def test_every_display_names_step_and_loss(monkeypatch, stream, term):
    monkeypatch.setenv("TERM", term)
    shown = progress.open_progress(20, stream=stream)
    live = isinstance(stream, Terminal) and term != "dumb"
    assert isinstance(shown, progress.Live) == live
    shown.status("compiling the step")
    shown.step(1, READING)
    shown.message("a [line] kept")
    shown.step(20, READING)
    shown.close()
    shown.close()
    text = stream.getvalue()
    assert "step 20/20  loss 5.1235" in text and "a [line] kept" in text
    assert ("\x1b[" in text) == live


def test_other_processes_are_quiet_and_a_closed_log_does_not_stop_a_run(capsys):
    quiet = progress.open_progress(3, enabled=False)
    for shown in (quiet, progress.Plain(3, closed := io.StringIO())):
        closed.close()
        shown.status("x")
        shown.step(1, READING)
        shown.message("y")
        shown.close()
    assert capsys.readouterr() == ("", "")


def test_evaluations_and_samples_take_one_line_each():
    assert progress.evaluation_line(5, 9, {"step": 5, "eval/loss": 4.21}) == "eval 5/9  loss 4.2100"
    line = progress.sample_line(5, 9, 'a "b"', "c\nd\x1b[2J" + "e" * 500)
    assert line.startswith('sample 5/9  "a "b"" -> "c\\nd\\x1b[2J') and line.isprintable() and len(line) < 220
