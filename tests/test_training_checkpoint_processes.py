"""Two processes of one run: one checkpoint, the same verdict on damage, the same last step after a signal."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent

SHAPE = (16, 24)

WORKER = """
import os, signal, sys, time
from jaxlm.dist import multihost
assert multihost.initialize()
import jax, numpy as np
from test_training_checkpoint_faults import biggest_file, flip_bit
from test_training_checkpoint_processes import P, Checkpoints, contents, placed
from jaxlm.training import lock, signals

def say(text):
    print(text, flush=True)

directory, me = sys.argv[1], jax.process_index()
rows, columns = placed(contents(0), P("data")), placed(contents(0), P(None, "data"))
with lock.hold(directory, say):
    checkpoints = Checkpoints(directory, say)
    assert checkpoints.restore(rows, lambda _: None) is None
    for step in (1, 2, 3):
        checkpoints.save(step, placed(contents(step), P("data")), {"position": step})
    checkpoints.wait()
    found = checkpoints.restore(columns, lambda _: None)
    assert found.step == 3 and found.state["w"].sharding == columns["w"].sharding
    for leaf, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(contents(3))):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[shard.index])
    if me == 0:
        flip_bit(biggest_file(checkpoints.directory / "3"))
    multihost.barrier("damaged")
    found = checkpoints.restore(rows, lambda _: None)
    say(f"restored {found.step}")

    with signals.catch(say) as stop:
        for step in range(4, 2000):
            time.sleep(0.01)
            if me == 1 and step == 8:
                os.kill(os.getpid(), getattr(signal, sys.argv[2]))
            if (code := stop(step)) is not None:
                break
    checkpoints.save(step, placed(contents(step), P("data")), {"position": step})
    checkpoints.close()
    say(f"stopped {step} with {code}")
"""


def contents(step):
    """Arrays of one step, in numpy."""
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=SHAPE).astype(np.float32), "step": np.int32(step)}


def placed(arrays, spec, devices=None):
    """Arrays over all devices of all processes, on their last two dimensions by `spec`."""
    count = len(devices or jax.devices())
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def place(x):
        sharding = NamedSharding(mesh, spec if np.ndim(x) == 2 else P())
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, arrays)


@pytest.mark.parametrize(("name", "codes"), [("SIGTERM", {"143"}), ("SIGINT", {"130", "143"})])
def test_two_processes_save_restore_and_stop_as_one(tmp_path, name, codes):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/launch_local.py", "--devices", "2", "--", sys.executable, "-c", WORKER]
    launcher = subprocess.Popen(
        [*command, str(tmp_path), name],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = launcher.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise
    assert launcher.returncode == 0, out + err
    assert out.count("] restored 2\n") == 2
    assert len(re.findall(r"step 3 is damaged: .*\(contents changed\)$", out, re.MULTILINE)) == 1
    stops = re.findall(r"\[(\d)\] stopped (\d+) with (\d+)$", out, re.MULTILINE)
    assert len(stops) == 2 and {code for _, _, code in stops} == codes
    (last,) = {int(step) for _, step, _ in stops}

    checkpoints = Checkpoints(tmp_path, print)
    target = placed(contents(0), P(None, "data"), jax.devices()[:4])
    found = checkpoints.restore(target, lambda _: None)
    checkpoints.close()
    assert found.step == last
    for leaf, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(contents(last))):
        np.testing.assert_array_equal(jnp.asarray(leaf), want)
