"""The coordinate check: flat under muP, not under the standard parametrisation, nor where an ingredient is off."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.config import load
from jaxlm.evals import coordinate_report, coordinates, plots
from jaxlm.evals.activations import ACTIVATION_NAMES, activations
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.kernels.attention import AttentionMask, attention
from jaxlm.params import mup
from jaxlm.params.config import MupBase, MupConfig

WIDTHS = (32, 128)
HIDDEN = [name for name in ACTIVATION_NAMES if not name.endswith("logits")]

CONFIG = """
model: {d_model: 128, n_layers: 2, n_heads: null, head_dim: 16, vocab_size: 300, tie_embeddings: false}
data: {path: text.txt, sequence_length: 32}
train: {batch_size: 8}
mup: {base: {d_model: 32}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coordinates")
    words = np.random.default_rng(0).integers(0, 200, 6000)
    (path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (path / "run.yaml").write_text(CONFIG.replace("text.txt", str(path / "text.txt")))
    return path


def settings(folder, *overrides):
    return coordinates.fill(load(folder / "run.yaml", overrides), {"model.tie_embeddings"})[0]


def measure(config, sizes=WIDTHS, over=coordinates.WIDTH):
    return coordinates.check(config, over, sizes, lambda line: None)


@pytest.fixture(scope="module")
def checked(folder):
    return measure(settings(folder))


def failures(check):
    return {verdict.activation for verdict in coordinate_report.verdicts(check) if not verdict.passed}


def test_mup_passes_and_the_standard_parametrisation_does_not(checked):
    assert not failures(checked)
    assert checked.slope("sp", "final_residual", 3) >= coordinate_report.GROWTH
    assert coordinate_report.discriminates(checked)
    sp = {v.activation for v in coordinate_report.verdicts(checked, "sp") if not v.passed}
    assert {"attention_out", "mlp_out", "final_residual", "logits"} <= sp


def test_both_parametrisations_agree_at_the_base(checked):
    for name in ACTIVATION_NAMES:
        np.testing.assert_allclose(checked.changes["mup", name][0], checked.changes["sp", name][0], rtol=1e-5)


def off(field, value):
    """A plan in which one ingredient is switched off."""

    def plan(tree, target, base, settings_, optimizer):
        whole = _plan(tree, target, base, settings_, optimizer)
        column = getattr(whole, field)
        ones = value if isinstance(column, float) else jax.tree.map(lambda _: value, column)
        return dataclasses.replace(whole, **{field: ones})

    return plan


_plan, _init = mup.plan_tree, mup.init


@pytest.fixture
def single(folder, monkeypatch):
    """A measurement of a model of one layer under muP alone; what is patched before holds."""
    monkeypatch.setattr(coordinates, "PARAMETRISATIONS", ("mup",))
    return lambda: measure(settings(folder, "model.n_layers=1"))


def test_without_rate_multipliers_hidden_activations_fail(single, monkeypatch):
    monkeypatch.setattr(mup, "plan_tree", off("learning_rate", 1.0))
    assert {"attention_out", "mlp_hidden", "mlp_out", "final_residual"} <= failures(single())


def test_without_the_logits_factor_logits_fail_first(single, monkeypatch):
    monkeypatch.setattr(mup, "plan_tree", off("logits", 1.0))
    found = single()
    assert "logits" in failures(found)
    assert found.slope("mup", "logits", 1) > coordinate_report.LOGITS[1]
    assert all(abs(found.slope("mup", name, 1)) <= coordinate_report.LIMIT for name in HIDDEN)


def test_without_the_rescaled_head_only_logits_fail(single, monkeypatch):
    monkeypatch.setattr(mup, "init", lambda cfg, base, key: transformer.init(cfg, key))
    assert failures(single()) == {"logits"}


def test_the_depth_factor_keeps_deep_models_still(folder):
    config = dataclasses.replace(settings(folder, "model.d_model=32"), mup=MupConfig(MupBase(n_layers=1), 1.0))
    found = measure(config, (1, 3), coordinates.DEPTH)
    assert not failures(found) and coordinate_report.discriminates(found)


MODELS = {
    "rope, grouped heads": {"n_kv_heads": 2},
    "norms of queries and keys": {"qk_norm": "head", "positions": "learned"},
    "projection norm, softcap, window": {"qk_norm": "projection", "attention_softcap": 3.0, "window": 5},
    "norms behind": {"norm_placement": "both", "gated": False, "clip_qkv": 1.0},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_activations_are_those_of_the_model(fields):
    cfg = ModelConfig(
        d_model=32, n_layers=2, n_heads=4, vocab_size=40, tie_embeddings=False, max_length=16, attention_multiplier=0.7,
        residual_multiplier=0.5, **fields,
    )  # fmt: skip
    variables = transformer.init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
    segments = jnp.array([[1] * 12, [1] * 5 + [2] * 7])
    positions = jnp.array([list(range(12)), [*range(5), *range(7)]])
    found = jax.jit(functools.partial(activations, cfg))(
        variables, {"tokens": tokens, "segments": segments, "positions": positions}
    )
    assert set(found) == set(ACTIVATION_NAMES)
    whole = transformer.logits(cfg, variables, tokens, positions, segments)
    np.testing.assert_allclose(found["logits"], whole, atol=1e-5)
    layer = jax.tree.map(lambda w: w[-1], variables["params"]["layers"])
    down = found["mlp_hidden"] @ layer["mlp"]["down"]["kernel"]
    if cfg.norm_placement == "pre":
        np.testing.assert_allclose(found["mlp_out"], down, atol=1e-4)
    assert found["attention_logits"].shape == (2, 4, 12, 12)
    np.testing.assert_array_equal(found["attention_logits"][1, :, 6:, :5], 0.0)


def test_attention_logits_are_what_the_kernel_weighs_with(monkeypatch):
    seen = {}

    def spy(q, k, v, **options):
        seen.update(q=q, k=k, **options)
        return attention(q, k, v, **options)

    monkeypatch.setattr("jaxlm.nn.attention.attention", spy)
    cfg = ModelConfig(d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=40, qk_norm="head", max_length=16)
    variables = transformer.init(cfg, jax.random.key(0))
    row = jnp.arange(10)[None]
    found = activations(cfg, variables, {"tokens": row, "segments": jnp.ones_like(row), "positions": row})
    assert isinstance(seen["mask"], AttentionMask)
    k = jnp.repeat(seen["k"], 2, axis=2)
    scores = jnp.einsum("blhk,bshk->bhls", seen["q"], k) * seen["scale"]
    np.testing.assert_allclose(found["attention_logits"], jnp.tril(scores), atol=1e-5)


def test_the_family_keeps_heads_and_proportions():
    base = ModelConfig(d_model=96, n_heads=4, n_kv_heads=2, d_ff=160)
    wide = coordinates.member(base, coordinates.WIDTH, 384)
    assert (wide.D, wide.K, wide.H, wide.G, wide.F, wide.N) == (384, 24, 16, 8, 640, base.N)
    single = coordinates.member(dataclasses.replace(base, n_kv_heads=1), coordinates.WIDTH, 144)
    assert (single.H, single.G) == (6, 1)
    with pytest.raises(ValueError, match=r"model.d_model: 100 is 1.04167 times the base's 96"):
        coordinates.member(base, coordinates.WIDTH, 100)


def test_widths_are_powers_of_two_times_the_base():
    base = ModelConfig(d_model=96)
    for target, widths in ((96, (96, 192, 384)), (384, (96, 192, 384)), (4096, (96, 192, 384, 768))):
        assert coordinates.widths_of(base, dataclasses.replace(base, d_model=target)) == widths


def test_defaults_are_filled_and_said(folder):
    plain = load(folder / "run.yaml", ["model.tie_embeddings=true"])
    filled, notes = coordinates.fill(plain, set())
    assert filled.optimizer.learning_rate == 2.0**-6 and not filled.model.tie_embeddings
    assert "model.tie_embeddings" in notes[0]
    same, notes = coordinates.fill(plain, {"optimizer.learning_rate", "model.tie_embeddings"})
    assert same == plain and len(notes) == 1


def test_the_command_writes_its_files(folder, capsys, monkeypatch):
    fixed = {
        (p, name): np.array([[1.0, 1.0, 1.0], [1.0 + grow, 1.0 + grow, 2.0]])
        for p, grow in (("mup", 0.0), ("sp", 1.0))
        for name in ACTIVATION_NAMES
    }
    monkeypatch.setattr(coordinates, "check", lambda c, over, sizes, r: coordinates.Check(over, sizes, fixed, 0.01))
    run = folder / "run"
    code = main(["coord-check", str(folder / "run.yaml"), f"run.dir={run}", "model.d_model=64,32"])
    out = capsys.readouterr().out
    assert code == 0 and "final_residual" in out and "FAILS: +1.00" in out
    report = json.loads((run / "coord_check.json").read_text())
    assert report["widths"] == [32, 64]
    rows = {(r["parametrisation"], r["activation"], r["step"]): r["slope"] for r in report["slopes"]}
    assert set(rows) == {(p, a, s) for p in ("mup", "sp") for a in ACTIVATION_NAMES for s in (1, 2, 3)}
    assert rows["sp", "logits", 1] == pytest.approx(1.0) and rows["mup", "logits", 1] == pytest.approx(0.0)
    assert (run / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (run / "coord_check.html").read_text()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a.png: matplotlib is not installed; install jaxlm\[plots\]"):
        plots.write(tmp_path / "a.png", [])


REFUSED = {
    "not a size": (["model.d_model=64,wide"], "model.d_model: 64, wide: not all are sizes"),
    "another field": (["train.steps=1,2"], "train.steps: a coordinate check grows either model.d_model or"),
    "both": (["model.d_model=32,64", "model.n_layers=1,2"], "model.n_layers: a coordinate check grows either"),
    "a directory": (["model.path=some/where"], "model.path: the coordinate check draws"),
    "experts": (["model.moe={experts: 4}"], "model.moe: the coordinate check draws dense models"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(folder, capsys, overrides, message):
    code = main(["coord-check", str(folder / "run.yaml"), f"run.dir={folder / 'refused'}", *overrides])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and f"jaxlm: error: {message}" in err
    assert not (folder / "refused").exists()
