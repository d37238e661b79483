"""A forward pass exported as one program for all platforms, read back in a process without the model's code."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.interop.export import export_forward, read_forward, write_forward
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig, RopeConfig

CFG = ModelConfig(
    d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=31, window=3, max_length=8,
    layer_types=("sliding", "full"), rope=RopeConfig(kind="dynamic", factor=2.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: transformer.init(CFG, key))(jax.random.key(0))["params"]


def inputs(rows, length):
    tokens = np.random.default_rng(length).integers(0, 31, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, :2] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return tokens, positions, segments


def test_one_program_for_every_shape_and_platform(params, tmp_path):
    """Also for a length beyond the original context, where the wavelengths change."""
    write_forward(tmp_path / "forward.bin", CFG)
    program = read_forward(tmp_path / "forward.bin")
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    for rows, length in ((2, 7), (3, 12)):
        tokens, positions, segments = inputs(rows, length)
        got = program.call(params, tokens, positions, segments)
        want = transformer.logits(
            CFG,
            {"params": params},
            jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            segments=jnp.asarray(segments),
        )
        assert got.shape == (rows, length, 31) and got.dtype == jnp.float32
        np.testing.assert_allclose(got[segments == 1], want[segments == 1], atol=1e-5)


def test_program_needs_no_jaxlm(params, tmp_path):
    write_forward(tmp_path / "forward.bin", CFG)
    flat, _ = jax.tree.flatten(params)
    tokens, positions, segments = inputs(2, 7)
    np.savez(tmp_path / "x.npz", *flat, t=tokens, p=positions, s=segments)
    code = """
import sys, jax, jax.export, numpy as np
sys.modules["jaxlm"] = None
program = jax.export.deserialize(bytearray(open(sys.argv[1] + "/forward.bin", "rb").read()))
x = np.load(sys.argv[1] + "/x.npz")
flat = [x[f"arr_{i}"] for i in range(len(x.files) - 3)] + [x["t"], x["p"], x["s"]]
args, _ = jax.tree.unflatten(program.in_tree, flat)
np.save(sys.argv[1] + "/y.npy", program.call(*args))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    want = export_forward(CFG).call(params, tokens, positions, segments)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-6)


def test_what_is_no_program_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope.bin: no such file"):
        read_forward(tmp_path / "nope.bin")
    (tmp_path / "bad.bin").write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match=r"bad.bin: not an exported program"):
        read_forward(tmp_path / "bad.bin")
