"""Teachers of a run: which ones fit, a student made out of one, and what one says kept on disk."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives.divergence import with_tail
from jaxlm.params.select import select
from jaxlm.training import on_policy, rollout, teacher, teacher_cache
from jaxlm.training.setup import global_batch, load_frozen, prepare, start

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
TEACHER = ModelConfig(d_model=24, n_layers=2, n_heads=3, d_ff=32, vocab_size=272, max_length=8)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A text, and directories of teachers: one that fits, one with another tokenizer, one with too few tokens."""
    root = tmp_path_factory.mktemp("teachers")
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(40))
    (root / "text.txt").write_text(text)
    for name, of in (("own", text), ("other", text.upper())):
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(train_tokenizer([of], 270).json)
    variables = jaxlm.init(TEACHER, jax.random.key(0))
    for name in ("own", "other"):
        jaxlm.save(root / f"with {name}", TEACHER, variables, tokenizer=root / name)
    small = dataclasses.replace(TEACHER, vocab_size=200)
    jaxlm.save(root / "small", small, jaxlm.init(small, jax.random.key(0)))
    return root


SMALL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8, "d_ff": 24}


def opened(places, model=types.MappingProxyType({}), **objective):
    raw = {
        "run": {"dir": str(places / "run")},
        "model": {"path": model["path"]} if "path" in model else SMALL | dict(model),
        "data": {"path": str(places / "text.txt"), "sequence_length": 8},
        "objective": {"kind": "distill", "teacher": str(places / "with own")} | objective,
        "train": {"steps": 2, "batch_size": 8, "attention": "reference", "scan": False},
    }
    return prepare(configs.build(raw))


def test_the_student_takes_the_tokenizer_of_its_teacher(places):
    setup = opened(places)
    assert setup.data.tokenizer.json == (places / "own" / "tokenizer.json").read_text()
    assert setup.program.cfg.V == 270
    assert set(setup.program.frozen) == {"teacher"}


def test_a_teacher_that_is_not_needed_is_not_loaded(places):
    assert not opened(places, kd_weight=0.0).program.frozen
    assert not opened(places, cache="somewhere").program.frozen
    assert opened(places, cache="somewhere", hidden_weight=1.0).program.frozen
    assert not prepare(opened(places, teacher="", kd_weight=0.0).config).program.frozen


REFUSED = {
    "missing": ({"teacher": "runs/nowhere"}, "objective.teacher: runs/nowhere"),
    "none": ({"teacher": ""}, "objective.teacher: not given"),
    "cache of new samples": ({"cache": "x", "on_policy": 0.5}, "objective.on_policy"),
    "two origins": ({"init": "teacher", "model": {"path": "with own"}}, "model.path"),
    "too wide a student": ({"init": "teacher", "model": {"d_model": 32}}, "model.d_model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_are_refused(name, places):
    changes, where = REFUSED[name]
    model = dict(changes.get("model", {}))
    if "path" in model:
        model = {"path": str(places / model["path"])}
    with pytest.raises((ValueError, FileNotFoundError), match=where):
        opened(places, model=model, **{k: v for k, v in changes.items() if k != "model"})


@pytest.mark.parametrize(("name", "what"), [("with other", "another tokenizer"), ("small", "vocabulary of 200")])
def test_a_teacher_of_other_tokens_is_refused(name, what, places):
    setup = opened(places)
    tokenizer = str(places / "own" / "tokenizer.json")
    data = dataclasses.replace(setup.config.data, tokenizer=tokenizer)
    objective = dataclasses.replace(setup.config.objective, teacher=str(places / name))
    with pytest.raises(ValueError, match=what):
        prepare(dataclasses.replace(setup.config, data=data, objective=objective))


def test_a_student_starts_as_a_part_of_its_teacher(places):
    setup = opened(places, init="teacher")
    with jax.set_mesh(setup.program.mesh):
        frozen = load_frozen(setup.config, setup.program)
        state = start(None, setup.program, frozen, teacher.student(setup.config, setup.program, frozen))
    cfg, variables = jaxlm.load(places / "with own")
    expected = select(cfg, setup.program.cfg, variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params["params"], expected)


def test_what_a_teacher_says_is_kept_and_found_again(places):
    folder = places / "cache"
    setup, told = opened(places, cache=str(folder), top_k=5, temperature=2.0), []
    with jax.set_mesh(setup.program.mesh):
        taught = teacher_cache.taught(setup, told.append)
        batch = global_batch(taught.data.train, taught.loader.rows(1), setup.program.mesh)
        teacher_cache.taught(setup, told.append)
    assert len(told) == 1 and str(folder) in told[0]
    cfg, variables = jaxlm.load(places / "with own")
    logits = jaxlm.logits(cfg, variables, batch["tokens"], batch["positions"], batch["segments"])[..., :270]
    log_p = jax.nn.log_softmax(logits / 2.0)
    ids = jax.lax.top_k(log_p, 5)[1]
    np.testing.assert_array_equal(batch["teacher_ids"], ids)
    np.testing.assert_allclose(np.float32(batch["teacher_log_probs"]), with_tail(log_p, ids), atol=0.01)
    assert taught.data.train.fingerprint == setup.data.train.fingerprint
    for changes, what in (({"temperature": 1.0}, "temperature"), ({"temperature": 2.0, "top_k": 6}, "top_k")):
        with pytest.raises(ValueError, match=f"another {what}"):
            teacher_cache.taught(opened(places, cache=str(folder), **{"top_k": 5} | changes), told.append)
    (folder / "ids.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        teacher_cache.taught(setup, told.append)


def test_a_folder_of_other_things_is_left_alone(places):
    folder = places / "precious"
    folder.mkdir()
    (folder / "thesis.json").write_text(json.dumps("irreplaceable"))
    with pytest.raises(ValueError, match="no cache of a teacher"):
        teacher_cache.taught(opened(places, cache=str(folder)), print)
    assert (folder / "thesis.json").exists()


def test_what_the_student_goes_on_from():
    tokens, one = np.arange(10, 18), np.ones(8, np.int32)
    asked = np.array([0, 0, 1, 1, 1, 0, 0, 0], np.float32)
    assert on_policy.prompt_of(tokens, one, asked, 8) == [10, 11, 12]
    assert on_policy.prompt_of(tokens, one, asked, 2) == [11, 12]
    assert on_policy.prompt_of(tokens, one, np.ones(8, np.float32), 8) == [10, 11, 12, 13]
    packed = np.array([1, 1, 2, 2, 2, 2, 0, 0], np.int32)
    assert on_policy.prompt_of(tokens, packed, np.ones(8) * (packed > 0), 8) == [10]
    assert on_policy.prompt_of(tokens, packed, np.array([0, 0, 0, 1, 1, 0, 0, 0]), 8) == [12, 13]
    assert len(on_policy.prompt_of(0 * tokens, 0 * one, np.zeros(8), 4)) == 4


def test_some_steps_are_on_the_students_own_samples(places):
    setup = opened(places, on_policy=0.5, kd_weight=0.5)
    roll, objective = rollout.make(setup), setup.program.recipe.objective
    with jax.set_mesh(setup.program.mesh):
        frozen = load_frozen(setup.config, setup.program)
        params = start(None, setup.program, frozen).params
        batch = global_batch(setup.data.train, setup.loader.rows(0), setup.program.mesh)
        rolled = [roll(params, frozen, batch, step) for step in range(4)]
        again = roll(params, frozen, batch, 3)
        own = [bool(r["own"].all()) for r in rolled]
        mine = jax.device_get(rolled[own.index(True)])

        @jax.jit
        def metrics(batch):
            batch = objective.prepare(setup.program.recipe.apply, params, frozen, batch, None)
            return objective.loss(setup.program.recipe.apply, params, frozen, batch, objective.weights(batch), None)

        (loss, found), data = metrics(rolled[own.index(True)]), metrics(rolled[own.index(False)])[1]
    assert sorted(set(own)) == [False, True]
    jax.tree.map(np.testing.assert_array_equal, again, rolled[3])
    assert mine["tokens"].shape == batch["tokens"].shape
    starts = jax.device_get(batch["tokens"][:, :2])
    np.testing.assert_array_equal(mine["tokens"][:, :2], starts)
    assert np.all(mine["mask"].sum(1) >= 1) and np.all(mine["mask"].sum(1) <= 4)
    assert found["distill/cross_entropy"] == 0.0 and data["distill/cross_entropy"] > 0.0
    assert loss == pytest.approx(0.5 * float(found["distill/kd"]), rel=1e-6)
