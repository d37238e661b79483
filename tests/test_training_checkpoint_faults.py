"""Damage to checkpoints: every kind is refused by step number, the step before is restored, nothing passes silently."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training import checkpoint, integrity, step_directory
from jaxlm.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


def make_state(step, rows=64):
    """Contents that follow from the step alone, so that any process can tell what a step must hold."""
    rng = np.random.default_rng(step)
    w, b = rng.normal(size=(rows, 96)), rng.normal(size=rows)
    return {"params": {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.bfloat16)}, "step": jnp.int32(step)}


def accept(description):
    assert description["position"] >= 0


def restore(directory, messages, rows=64):
    checkpoints = Checkpoints(directory, messages.append)
    try:
        return checkpoints.restore(make_state(0, rows), accept)
    finally:
        checkpoints.close()


def assert_is_step(restored, step, rows=64):
    assert restored.step == step and restored.meta["position"] == 10 * step
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(make_state(step, rows))):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory with steps 1 and 2; tests damage copies of it."""
    directory = tmp_path_factory.mktemp("good") / "checkpoints"
    checkpoints = Checkpoints(directory, print)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"position": 10 * step}, metric=float(step))
    checkpoints.close()
    return directory


@pytest.fixture
def directory(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "checkpoints"))


def biggest_file(root):
    return max((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path, where=0.5):
    contents = bytearray(path.read_bytes())
    contents[int(where * len(contents))] ^= 4
    path.write_bytes(contents)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def test_one_flipped_bit_names_leaf_file_and_step_and_falls_back(directory, capfd):
    messages = []
    data = biggest_file(directory / "2")
    flip_bit(data)
    assert_is_step(restore(directory, messages), 1)
    damage, fallback, moved = messages
    assert re.search(rf"checkpoints/2: step 2 is damaged: .*{data.name} \(contents changed\); leaves params/w$", damage)
    assert "falling back to step 1" in fallback and "2: moved to 2.damaged" in moved
    assert capfd.readouterr() == ("", "")


def test_the_run_goes_on_over_a_damaged_step(directory):
    messages = []
    flip_bit(biggest_file(directory / "2"))
    checkpoints = Checkpoints(directory, messages.append)
    checkpoints.restore(make_state(0), accept)
    checkpoints.save(2, make_state(2), {"position": 20}, metric=0.5)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and checkpoints.best() == 2
    assert_is_step(checkpoints.restore(make_state(0), accept), 2)
    checkpoints.close()


@pytest.mark.parametrize("damage", [flip_bit, truncate, os.remove])
def test_any_damaged_file_is_noticed(good, tmp_path, damage, capfd):
    """Each file of a step in turn: refused by number with the step before restored, unless nothing is read from it."""
    files = sorted(path.relative_to(good / "2") for path in (good / "2").rglob("*") if path.is_file())
    assert len(files) > 8
    for number, file in enumerate(files):
        messages = []
        directory = Path(shutil.copytree(good, tmp_path / str(number)))
        damage(directory / "2" / file)
        restored = restore(directory, messages)
        if str(file) in integrity.UNSEALED:
            assert_is_step(restored, 2)
            continue
        assert_is_step(restored, 1)
        assert "step 2 is damaged" in messages[0] and str(file) in messages[0]
        assert not any("\n" in message for message in messages)
    assert capfd.readouterr() == ("", "")


def test_contents_that_changed_before_they_were_sealed_name_the_leaf(directory):
    """The table of leaves alone: a step whose files are all as they were sealed, but whose arrays are not."""
    messages = []
    sealed = integrity.read(directory / "2")
    flip_bit(biggest_file(directory / "2"))
    (directory / "2" / integrity.FILE).unlink()
    integrity.seal(directory / "2", sealed.leaves, None)
    assert_is_step(restore(directory, messages), 1)
    assert messages[0].endswith("step 2 is damaged: leaves params/w (contents changed)")


def test_without_a_good_step_the_run_refuses_to_start(directory):
    messages = []
    for step in ("1", "2"):
        truncate(biggest_file(directory / step))
    with pytest.raises(ValueError, match=r"none of the steps \[2, 1\] is good") as error:
        restore(directory, messages)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_reading_passes_over_damage_and_moves_nothing(directory):
    messages = []
    flip_bit(biggest_file(directory / "2"))
    assert checkpoint.read(directory, messages.append).step == 1
    assert "step 2 is damaged" in messages[0]
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_foreign_directories_and_leftovers(directory):
    messages = []
    (directory / "999").mkdir()
    (directory / "notes").mkdir()
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    (directory / "3.orbax-checkpoint-tmp" / "state").write_text("half")
    (directory / "0.removed").mkdir()
    assert_is_step(restore(directory, messages), 2)
    assert len(messages) == 1 and re.search("999: not a checkpoint; ignored", messages[0])
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "999", "notes"]


def run(source, *arguments, **options):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], env=env, text=True, **options)


SAVE_FOREVER = """
import itertools, sys
from test_training_checkpoint_faults import Checkpoints, accept, make_state
checkpoints = Checkpoints(sys.argv[1], print)
restored = checkpoints.restore(make_state(0, 4000), accept)
print("ready", flush=True)
for step in itertools.count(1 if restored is None else restored.step + 1):
    checkpoints.save(step, make_state(step, 4000), {"position": 10 * step})
"""


def test_a_run_killed_while_saving_leaves_a_whole_step(tmp_path):
    """SIGKILL at random moments; every next start finds a step that is whole, and no less than was finished before."""
    directory, last = tmp_path / "checkpoints", 0
    moments = random.Random(0)
    for _ in range(4):
        with run(SAVE_FOREVER, directory, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == "ready\n"
            while max(step_directory.steps(directory), default=0) <= last:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.2))
            process.kill()
        messages = []
        restored = restore(directory, messages, rows=4000)
        assert messages == []
        assert restored.step > last
        assert_is_step(restored, restored.step, rows=4000)
        last = restored.step


SAVE_TOO_MUCH = """
import resource, signal, sys, time
from test_training_checkpoint_faults import Checkpoints, checkpoint, make_state
checkpoints = Checkpoints(sys.argv[1], print)
checkpoints.save(1, make_state(1), {"position": 10})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
checkpoints.save(2, make_state(2, 4000), {"position": 20})
try:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        checkpoints.check()
except checkpoint.SaveFailed as error:
    print(error)
checkpoints.save(3, make_state(3), {"position": 30})
checkpoints.close()
"""


def test_a_file_that_cannot_grow_is_reported_and_the_run_can_save_again(tmp_path):
    process = run(SAVE_TOO_MUCH, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=90)
    assert err == ""
    advice = "mend the cause, then the same command again goes on from there"
    assert out == f"{tmp_path}/2: could not be saved: file too large; step 1 is the last good one; {advice}\n"
    assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    assert_is_step(restore(tmp_path, []), 3)
