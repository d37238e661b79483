"""Makes a checkpoint of a 7B model's shape with random weights on disk, loads it, and prints time and peak host memory.

    python scripts/bench/load_checkpoint.py DIR [--layers 32] [--dtype bfloat16] [--mesh-fsdp 1]

The peak is that of the process's private memory beyond what the result itself takes on the host (all of it on CPU,
nothing on an accelerator), sampled every few milliseconds, next to the largest tensor of the file.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHAPE = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


def make(directory: Path, layers: int) -> None:
    """Writes the checkpoint in bfloat16, one tensor in memory at a time."""
    from jaxlm.interop import hf, names
    from jaxlm.interop.safetensors import Tensor, write_directory

    raw = SHAPE | {"num_hidden_layers": layers, "dtype": "bfloat16"}
    cfg = hf.read_config(raw)
    targets = names.targets(cfg, hf.FAMILIES["mistral"].table(cfg), names.abstract(cfg))
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(block, shape)

    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = [Tensor(name, dtype, t.shape, lambda t=t: fill(t.shape)) for name, t in targets.items()]
    write_directory(directory, tensors, 5_000_000_000)
    (directory / "config.json").write_text(json.dumps(raw))


def resident() -> tuple[int, int]:
    """(all, file-backed) resident bytes of this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile"))  # type: ignore[return-value]


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh-fsdp", type=int, default=1)
    settings = parser.parse_args()
    if not (settings.directory / "config.json").is_file():
        make(settings.directory, settings.layers)

    import jax

    from jaxlm.dist.mesh import MeshConfig
    from jaxlm.dist.mesh import make as make_mesh
    from jaxlm.interop import safetensors
    from jaxlm.interop.load import load

    entries = safetensors.open_directory(settings.directory).values()
    largest = max(int(np.prod(e.shape)) * e.dtype.itemsize for e in entries)
    mesh = make_mesh(MeshConfig(data=1, fsdp=settings.mesh_fsdp)) if settings.mesh_fsdp > 1 else None
    jax.block_until_ready(jax.numpy.zeros(8))
    before, peak, stop = resident()[0], [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident()[0])
            time.sleep(0.003)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    _, variables = load(settings.directory, dtype=settings.dtype, mesh=mesh)
    jax.block_until_ready(variables)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    on_host = size if jax.default_backend() == "cpu" else 0
    beyond = peak[0] - before - on_host
    print(
        f"{jax.default_backend()}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s), "
        f"peak host memory beyond the result {beyond / 1e9:.2f} GB = {beyond / largest:.2f} x the largest tensor"
    )


if __name__ == "__main__":
    main()
