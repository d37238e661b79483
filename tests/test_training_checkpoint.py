"""Checkpoints: what is saved comes back to the last bit, on any mesh; what is kept, refused and named."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.training import checkpoint, meta, step_directory
from jaxlm.training.checkpoint import Checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    extra: Any


def make_state(seed=0, width=16, rows=8):
    """A small state with every kind of leaf: nested, bfloat16, scalar, integer, empty, and Optax's own tuples."""
    rng = np.random.default_rng(seed)
    params = {
        "params": {
            "embed": {"kernel": jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)},
            "layers": {"attn": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, width, width)), jnp.float32)}}},
        },
        "lora": {"a": jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    extra = {"seen": jnp.arange(8, dtype=jnp.int8), "none": jnp.zeros((0, 3)), "on": jnp.array(True)}
    return State(jnp.int32(seed), params, tx.init(params), None, extra)


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def accept(description):
    assert description["schema"] == meta.SCHEMA


def assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def mesh_of(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(
        shape, ("data", "fsdp")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


def placed(state, mesh, spec):
    """Arrays of two or more dimensions by `spec` on their last two, the others on every device."""

    def place(x):
        fits = x.ndim >= 2 and x.size
        return jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 2), *spec) if fits else P()))

    return jax.tree.map(place, state)


@pytest.fixture
def messages():
    return []


@pytest.fixture
def opened(tmp_path, messages):
    """Checkpoints in a new directory; call it again to open the same ones as the next start of the run would."""
    open_ones = []

    def open_again(**options):
        open_ones.append(Checkpoints(tmp_path / "checkpoints", messages.append, **options))
        return open_ones[-1]

    yield open_again
    for one in open_ones:
        one.close()


def test_a_new_run_has_nothing_to_restore(opened):
    checkpoints = opened()
    assert checkpoints.restore(make_state(), accept) is None
    assert checkpoints.steps() == [] and checkpoints.best() is None


def test_state_and_description_come_back(opened, messages, capfd):
    checkpoints, state = opened(), make_state(3)
    description = {"position": 7, "stopping": {"best": 0.1 + 0.2}, "config": {"model": {"d_model": 16}}}
    checkpoints.save(3, state, description, metric=1.5)
    checkpoints.close()
    restored = opened().restore(abstract_of(state), accept)
    assert_bit_equal(restored.state, state)
    assert restored.step == 3
    assert {key: restored.meta[key] for key in description} == description
    assert restored.meta["versions"]["jax"] == jax.__version__
    assert messages == []
    assert capfd.readouterr() == ("", "")


def test_the_next_step_may_take_the_buffers_of_a_saved_state(opened):
    checkpoints = opened()
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    want = np.array(state["w"])
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    restored = checkpoints.restore(abstract_of(state), accept)
    np.testing.assert_array_equal(restored.state["w"], want)


def test_a_state_moves_between_meshes(opened):
    """8 devices -> 4 with axes exchanged -> 1 -> 8, each time the same bits and the sharding that was asked for."""
    checkpoints, state = opened(keep=9), make_state()
    places = [
        (mesh_of(2, 4), P("data", "fsdp")),
        (mesh_of(4), P(None, "data")),
        (mesh_of(1), P()),
        (mesh_of(8), P("data")),
    ]
    now = placed(state, *places[0])
    for number, place in enumerate(places[1:], 1):
        checkpoints.save(number, now, {})
        target = abstract_of(placed(state, *place))
        now = checkpoints.restore(target, accept).state
        assert_bit_equal(now, state)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, t: x.sharding == t.sharding, now, target)))


def test_the_latest_and_the_best_are_kept(opened, tmp_path):
    checkpoints = opened(keep=2)
    state = {"w": jnp.zeros(4)}
    for step, metric in enumerate([3.0, 1.0, 2.0, 5.0, None, 4.0]):
        checkpoints.save(step, state, {}, metric)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5]
    assert checkpoints.best() == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4", "5"]
    again = opened(keep=2)
    assert again.best() == 1
    again.save(6, state, {}, 0.5)
    again.wait()
    assert again.steps() == [5, 6]


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_a_metric_that_is_no_number_is_never_the_best(opened, mode, best):
    checkpoints = opened(keep=2, mode=mode)
    for step, metric in [(1, float("nan")), (2, 1.0), (3, 2.0), (4, float("nan")), (5, float("-inf")), (6, None)]:
        checkpoints.save(step, {"w": jnp.zeros(4)}, {}, metric)
    checkpoints.wait()
    assert checkpoints.best() == best
    assert checkpoints.steps() == [best, 5, 6]
    assert opened(keep=2, mode=mode).best() == best


def test_a_saved_step_is_left_as_it_is(opened):
    checkpoints = opened()
    checkpoints.save(1, {"w": jnp.zeros(4)}, {})
    checkpoints.save(1, {"w": jnp.ones(4)}, {})
    assert not checkpoints.restore({"w": jnp.zeros(4)}, accept).state["w"].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s._replace(params={**s.params, "lora": {"a": jnp.zeros((8, 16))}}),
            "params/lora/a: bfloat16.*float32",
        ),
        (lambda s: make_state(width=32), r"params/lora/a: bfloat16\[8, 16\] in .*bfloat16\[8, 32\] now"),
        (lambda s: s._replace(ema=s.params), "ema/.*not in the checkpoint"),
        (lambda s: s._replace(extra=None), "extra/.* in the checkpoint but not"),
    ],
)
def test_a_state_of_another_model_is_refused_and_the_leaf_named(opened, messages, change, words):
    checkpoints, state = opened(), make_state()
    checkpoints.save(1, state, {})
    with pytest.raises(ValueError, match=words) as error:
        checkpoints.restore(change(state), accept)
    assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1] and messages == []


def test_a_refusal_of_the_caller_ends_the_restore(opened):
    checkpoints = opened()
    checkpoints.save(1, {"w": jnp.zeros(4)}, {"seed": 1})

    def refuse(description):
        raise ValueError(f"run.seed: {description['seed']} in the checkpoint")

    with pytest.raises(ValueError, match=r"run\.seed: 1"):
        checkpoints.restore({"w": jnp.zeros(4)}, refuse)
    assert checkpoints.steps() == [1]


def test_a_step_can_be_asked_for(opened):
    checkpoints = opened()
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.full(4, step)}, {})
    assert checkpoints.restore({"w": jnp.zeros(4, jnp.int32)}, accept, step=1).step == 1
    with pytest.raises(ValueError, match=r"no step 7; there are \[1, 2\]"):
        checkpoints.restore({"w": jnp.zeros(4, jnp.int32)}, accept, step=7)


def test_parts_are_read_without_the_rest(opened, tmp_path):
    checkpoints, state = opened(), make_state()
    checkpoints.save(5, state, {"position": 1})
    checkpoints.wait()
    found = checkpoint.read(tmp_path / "checkpoints", print)
    assert found.step == 5 and found.meta["position"] == 1
    assert_bit_equal(found.state, {"params": state.params})
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.read(tmp_path / "elsewhere", print)


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "run").write_text("a file where the directory should be")
    with pytest.raises(ValueError, match=r"run/checkpoints: cannot be written \(Not a directory\)"):
        Checkpoints(tmp_path / "run" / "checkpoints", print)


def test_a_disk_without_room_is_an_error_before_anything_is_written(opened, monkeypatch):
    checkpoints, state = opened(), {"w": jnp.zeros(1000)}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    usage = type("Usage", (), {"free": 4100})
    monkeypatch.setattr(step_directory.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        checkpoint.SaveFailed, match=r"2: could not be saved: no space left on device .*step 1 is the last"
    ):
        checkpoints.save(2, state, {})
    assert checkpoints.steps() == [1]
    monkeypatch.undo()
    checkpoints.save(2, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_an_error_in_the_background_is_raised_at_the_next_check(opened, monkeypatch, capfd):
    checkpoints, state = opened(), {"w": jnp.zeros(1000)}
    checkpoints.save(1, state, {})
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.integrity, "seal", full)
        checkpoints.save(2, state, {})
        with pytest.raises(
            checkpoint.SaveFailed, match="/2: could not be saved: no space left on device; step 1 is"
        ) as error:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                checkpoints.check()
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]
    checkpoints.save(3, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert capfd.readouterr().err == ""


def test_a_step_of_a_newer_layout_is_refused_and_left_alone(opened, monkeypatch):
    checkpoints = opened()
    with monkeypatch.context() as patch:
        patch.setattr(meta, "SCHEMA", meta.SCHEMA + 1)
        checkpoints.save(1, {"w": jnp.zeros(4)}, {})
    with pytest.raises(ValueError, match=r"/1: written by a newer version \(layout 2, this one knows 1\)"):
        checkpoints.restore({"w": jnp.zeros(4)}, accept)
    assert checkpoints.steps() == [1]


def test_a_description_that_is_not_json_is_an_error(opened):
    checkpoints = opened()
    with pytest.raises(
        checkpoint.SaveFailed, match=r"/1: could not be saved: .*not JSON serializable; no step has been"
    ):
        checkpoints.save(1, {"w": jnp.zeros(4)}, {"position": {1, 2}})
    assert list(checkpoints.directory.iterdir()) == []


def test_too_few_steps_to_fall_back_to_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep 1"):
        Checkpoints(tmp_path, print, keep=1)
