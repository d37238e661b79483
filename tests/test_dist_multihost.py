"""Several processes: what the environment says, clear failures, agreement, and the same numbers as one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlm.dist import multihost, rendezvous

ROOT = Path(__file__).parent.parent
SLURM = {"SLURM_JOB_ID": "4097", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}


def launch(source, tmp_path, *flags, wait=90):
    """Run a Python source as the processes of one job; (exit code, stdout, stderr)."""
    script = tmp_path / "worker.py"
    script.write_text(source)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/launch_local.py", *flags, "--", sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=wait)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NODELIST": "node[007-015,020],gpu1"}, ("node007:61441", 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "host-a,host-b"}, ("host-a:61441", 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "solo"}, ("solo:61441", 4, 1)),
        (SLURM | {"JAXLM_COORDINATOR": "h:1", "JAXLM_NUM_PROCESSES": "2", "JAXLM_PROCESS_ID": "0"}, ("h:1", 2, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, (None, None, None)),
    ],
)
def test_the_environment_says_whether_there_are_others(environ, expected):
    join = multihost.find_join(environ)
    assert (join if join is None else join[1:]) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("h:1", None, None), "JAXLM_NUM_PROCESSES: not set"),
        (("h:1", "two", "0"), "JAXLM_NUM_PROCESSES: 'two'"),
        (("h:1", "2", "2"), r"JAXLM_PROCESS_ID: 2 .*0\.\.1"),
        (("host", "2", "0"), "JAXLM_COORDINATOR: 'host'"),
    ],
)
def test_wrong_variables_are_named(values, words):
    names = (multihost.COORDINATOR, multihost.COUNT, multihost.INDEX)
    environ = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    with pytest.raises(ValueError, match=words):
        multihost.initialize(environ)


def test_alone_nothing_is_joined():
    assert multihost.initialize({}) is False
    assert multihost.is_main()
    multihost.barrier("nothing to wait for")
    multihost.agree("config", b"anything")
    assert multihost.anywhere(True) and not multihost.anywhere(False)


@pytest.mark.parametrize(("index", "words"), [(1, "process 0 did not answer"), (0, "process 1, 2 of 3 did not come")])
def test_others_that_do_not_come_are_named_with_the_address(index, words):
    port = free_port()
    environ = {"JAXLM_COORDINATOR": f"127.0.0.1:{port}", "JAXLM_NUM_PROCESSES": "3", "JAXLM_PROCESS_ID": str(index)}
    with pytest.raises(RuntimeError, match=f"within 0.6 s: 127.0.0.1:{port}: {words}"):
        multihost.initialize(environ, timeout=0.6)


def free_port():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import launch_local
    finally:
        sys.path.pop(0)
    return launch_local.free_port()


def test_a_meeting_waits_for_the_last_and_ignores_strangers():
    import socket

    address, came = f"127.0.0.1:{free_port()}", []
    guests = [threading.Thread(target=lambda i=i: (rendezvous.meet(address, 3, i, 20), came.append(i))) for i in (1, 2)]
    guests[0].start()
    host = threading.Thread(target=lambda: (rendezvous.meet(address, 3, 0, 20), came.append(0)))
    host.start()
    time.sleep(0.5)
    with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert came == []
    guests[1].start()
    for thread in (host, *guests):
        thread.join(20)
    assert sorted(came) == [0, 1, 2]


TRAIN = """
import numpy as np, jax, jax.numpy as jnp
from jaxlm.dist import multihost, place, mesh as meshes, rules
joined = multihost.initialize()
mesh = meshes.make(meshes.MeshConfig({mesh}))
w = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
tree = {{"unembed": {{"kernel": w}}}}
params = place.put(tree, rules.shardings(tree, mesh))

@jax.jit
def step(params, batch):
    def loss(p):
        y = jnp.einsum("bld,df->blf", batch["x"], p["unembed"]["kernel"])
        return jnp.mean(jnp.square(y - batch["y"][:, :, None]))
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

for i in range(4):
    rng = np.random.default_rng(i)
    whole = {{"x": rng.normal(size=(8, 4, 6)).astype(np.float32), "y": rng.normal(size=(8, 4)).astype(np.float32)}}
    rows = place.host_rows(mesh, 8)
    batch = place.place_batch({{k: v[rows] for k, v in whole.items()}}, mesh, 8)
    assert (place.gather(batch["x"]) == whole["x"]).all()
    params, value = step(params, batch)
    if multihost.is_main():
        print("loss", repr(float(value)), flush=True)
if multihost.is_main():
    print("rows", len(rows), "sum", repr(float(place.gather(params)["unembed"]["kernel"].sum())), flush=True)
else:
    place.gather(params)
multihost.agree("config", b"same")
assert multihost.anywhere(jax.process_index() == jax.process_count() - 1)
"""


@pytest.mark.parametrize(
    ("mesh", "rows"), [("data=2, fsdp=2", 4), ("data=1, fsdp=1, tensor=4", 8), ("data=1, context=4", 8)]
)
def test_two_processes_train_as_one(tmp_path, mesh, rows):
    numbers = []
    for flags in (["-n", "2", "--devices", "2"], ["-n", "1", "--devices", "4"]):
        code, out, err = launch(TRAIN.format(mesh=mesh), tmp_path, *flags)
        assert code == 0, err
        lines = [line.removeprefix("[0] ").split() for line in out.splitlines() if " loss " in line or " rows " in line]
        numbers.append([float(line[-1]) for line in lines])
        assert len(numbers[-1]) == 5
        if flags[1] == "2":
            assert lines[-1][1] == str(rows)
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)


def test_a_process_that_differs_is_named_by_all(tmp_path):
    source = """
import jax
from jaxlm.dist import multihost
multihost.initialize()
try:
    multihost.agree("config", b"lr 1" if jax.process_index() < 2 else b"lr 2")
except ValueError as error:
    print("refused", error)
"""
    code, out, err = launch(source, tmp_path, "-n", "3", "--devices", "1")
    assert code == 0, err
    refused = [line for line in out.splitlines() if "refused config: process 2 differs from process 0" in line]
    assert len(refused) == 3, out


def test_the_launcher_stops_the_rest_when_one_fails(tmp_path):
    source = """
import os, sys, time
if os.environ["JAXLM_PROCESS_ID"] == "1":
    sys.exit("no data here")
time.sleep(60)
"""
    started = time.monotonic()
    code, _, err = launch(source, tmp_path, "-n", "3", "--grace", "5")
    assert code == 1 and "[1] no data here" in err
    assert time.monotonic() - started < 20


def test_the_launcher_passes_signals_on(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(60)
""")
    command = [sys.executable, "scripts/launch_local.py", "-n", "2", "--", sys.executable, str(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert "ready" in process.stdout.readline() and "ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
