"""The model of a run directory, finished or not, as a Hugging Face directory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.dist import mesh as meshes
from jaxlm.dist.mesh import MeshConfig
from jaxlm.interop.load import load, load_config
from jaxlm.interop.save import save
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import is_qtensor
from jaxlm.objectives.forward import policy
from jaxlm.params.quantize import merged_with_gap
from jaxlm.training import checkpoint
from jaxlm.training.frozen import directory_hash, stored, whole
from jaxlm.training.setup import assemble, model_config
from jaxlm.types import Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig


def export(run: str | Path, out: str | Path, config: "RunConfig | None", report: Callable[[str], None]) -> None:
    """Write the model of a run, or of any model directory, with its tokenizer to `out`.

    Args:
      run: a run directory or a Hugging Face directory.
      out: where to write; an existing model directory is replaced.
      config: the run's resolved configuration, for a run that is not finished: its newest good checkpoint is taken.
      report: told which checkpoint that is.

    Raises:
      ValueError, FileNotFoundError: `where: what; what to do`; also where adapters are left without their base.
    """
    run = Path(run)
    finished = (run / "config.json").is_file() or (run / "hf" / "config.json").is_file()
    cfg, variables = load(run, "auto") if finished or config is None else latest(run, config, report)
    if "lora" in variables and any(map(is_qtensor, jax.tree.leaves(variables["params"], is_leaf=is_qtensor))):
        cfg, variables, gap = merged_with_gap(cfg, variables)
        report(f"{run}: the adapter goes into the dequantised weights; {gap}")
    folder = next((f for f in (run, run / "hf") if (f / "tokenizer.json").is_file()), None)
    save(out, cfg, variables, tokenizer=folder)


def latest(run: Path, config: "RunConfig", report: Callable[[str], None]) -> tuple[ModelConfig, Variables]:
    """Configuration and weights of a run's newest good checkpoint; the average where one is kept."""
    restored = checkpoint.read(run / "checkpoints", report, ("params", "ema", "extra"))
    directory = None if config.model.path is None else load_config(config.model.path)
    cfg = model_config(config, directory, load_tokenizer(str(run)))
    alone = dataclasses.replace(config, mesh=MeshConfig())
    program = assemble(alone, cfg, meshes.make(MeshConfig(), jax.devices()[:1]))
    report(f"{run}: the model of step {restored.step}")
    trained = restored.state.get("ema") or restored.state["params"]
    kept = restored.state.get("extra", {})
    if cfg.lora is None:
        return program.cfg, policy(trained, kept)
    path = config.model.path
    base_hash = (restored.meta.get("base") or {}).get("model")
    if path is not None and base_hash not in (None, directory_hash(path)):
        raise ValueError(
            f"{path}: is not the base model any more that {run} was trained on; put that one back, as its adapters fit "
            "no other"
        )
    fresh = jax.jit(lambda: stored(program.base(), config.quantize))
    base = fresh() if path is None else whole(path, "auto", program.mesh, config.quantize)
    return program.cfg, policy(trained, {**kept, "params": base})
