"""A model's forward pass as one portable StableHLO program (`jax.export`), for any batch size and length."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.interop.names import abstract, nest
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.transformer import logits
from jaxlm.types import Array, Tree

PLATFORMS = ("cpu", "cuda", "tpu")


def export_forward(
    cfg: ModelConfig, *, dtype: str = "float32", platforms: Sequence[str] = PLATFORMS
) -> jax.export.Exported:
    """The program `(params, tokens, positions, segments) -> logits` with open batch size B and length L.

    Args:
      cfg: the model; adapters are not part of the program.
      dtype: of the parameters and of the computation.
      platforms: those that the program can run on.

    Returns:
      An exported function of params (the tree of `init`, in `dtype`) and three int32 [B, L], giving float32 [B, L, V].
      `serialize()` makes bytes of it, and `jax.export.deserialize(bytes).call(...)` runs them, where jaxlm is not
      installed too.
    """
    # The plain attention holds no Python decision about sizes, so it can be traced with symbolic ones.
    compute = Compute(dtype=dtype, attention="reference")

    def forward(params: Tree, tokens: Array, positions: Array, segments: Array) -> Array:
        variables = {"params": params}
        return logits(cfg, variables, tokens, positions=positions, segments=segments, compute=compute)

    batch, length = jax.export.symbolic_shape("B, L")
    rows = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    params = nest({path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in abstract(cfg).items()})
    return jax.export.export(jax.jit(forward), platforms=platforms)(params, rows, rows, rows)


def write_forward(path: str | Path, cfg: ModelConfig, dtype: str = "float32") -> None:
    """Writes the bytes of `export_forward` to a file.

    Raises:
      ValueError: the package that JAX serialises with is not installed.
    """
    program = export_forward(cfg, dtype=dtype)
    try:
        data = program.serialize()
    except ImportError:
        raise ValueError(f"{path}: writing programs needs an optional package; pip install 'jaxlm[export]'") from None
    Path(path).write_bytes(data)


def read_forward(path: str | Path) -> jax.export.Exported:
    """The program in a file; run it with `.call(params, tokens, positions, segments)`.

    Raises:
      FileNotFoundError, ValueError: naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # whatever the reader trips over, the file is not such a program
        raise ValueError(f"{path}: not an exported program; export it again") from error
