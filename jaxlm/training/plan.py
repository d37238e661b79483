"""`jaxlm plan`: what a run will need, as text, before any array is made."""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxlm import tree
from jaxlm.data.supply import LABELLED, PAIRS, PROMPTS
from jaxlm.data.tokenizer import DEFAULT_VOCABULARY, load_tokenizer
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place
from jaxlm.interop.load import load_config
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.qtensor import outline
from jaxlm.objectives.completions import reward_column
from jaxlm.objectives.distill import COLUMNS
from jaxlm.optim.effective import Row, effective
from jaxlm.params import lora
from jaxlm.training import setup, throughput
from jaxlm.training.memory import GB, Load, Memory, activation_bytes, dequantised_bytes, device_bytes, logits_bytes
from jaxlm.training.setup import Program
from jaxlm.training.step import train_step
from jaxlm.types import Batch

if TYPE_CHECKING:
    from jaxlm.config import RunConfig


class Plan(NamedTuple):
    """What is known of a run before it starts.

    Attributes:
      parameters, trainable: numbers of weights. active: those that a token passes, without the experts not chosen.
      flops: model FLOPs of one optimiser step, over all devices.
      memory: bytes per device by formula. compiled: by the compiler's own account of the step, or None.
      rows: what every leaf is given.
      attention: the attention backend of the step. experts: that of the experts' products, or None without experts.
    """

    parameters: int
    trainable: int
    active: int
    flops: float
    memory: Memory
    compiled: int | None
    rows: list[Row]
    attention: str
    experts: str | None


def make_plan(config: "RunConfig", compiled: bool = True) -> Plan:
    """Plan a run on as many devices as its mesh asks for; without them, on simulated ones.

    Reads no weights and no data; writes nothing.

    Args:
      config: the run.
      compiled: whether to compile the step and ask the compiler for its memory.

    Raises:
      ValueError: as `setup.assemble`.
    """
    program = setup.assemble(config, _architecture(config), meshes.make(config.mesh, _devices(config)))
    return of_program(config, program, compiled)


def of_program(config: "RunConfig", program: Program, compiled: bool = False) -> Plan:
    """The plan of a program that is put together already.

    Args:
      config, program: the run, and what it compiles to.
      compiled: as in `make_plan`.
    """
    trained, base = program.abstract.params, outline(program.frozen.get("params", {}))
    count = lora.trained(program.cfg, trained)
    length = config.data.sequence_length
    flops = throughput.flops_per_token(program.cfg, length) * abstract_batch(config, program)["tokens"].size
    return Plan(
        parameters=count + tree.count(base),
        trainable=count,
        active=count + tree.count(base) - throughput.idle_parameters(program.cfg),
        flops=flops,
        memory=memory(config, program),
        compiled=_compiled_bytes(config, program) if compiled else None,
        rows=effective(config.optimizer, program.cfg, trained, program.plan, base or None),
        attention=setup.attention_backend(config, program.cfg, program.compute),
        experts=None if program.cfg.moe is None else program.compute.grouped or grouped_matmul.choose(),
    )


def memory(config: "RunConfig", program: Program) -> Memory:
    """Memory per device by formula."""
    sizes, state, cfg = program.mesh.shape, program.abstract, program.cfg
    groups = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    accumulation = config.train.accumulation
    load = Load(
        rows=step_rows(config) // (groups * accumulation),
        positions=config.data.sequence_length // sizes["context"],
    )
    trained = device_bytes(state.params)
    activations = activation_bytes(cfg, program.compute, load, sizes["tensor"])
    return Memory(
        parameters=trained + device_bytes(program.frozen),
        moments=device_bytes(state.opt_state),
        average=device_bytes(state.ema),
        gradients=trained * (2 if accumulation > 1 else 1),
        activations=activations + dequantised_bytes(program.frozen, program.compute, sizes["tensor"]),
        logits=logits_bytes(cfg, load, sizes["tensor"]),
    )


def check_limit(config: "RunConfig", program: Program) -> None:
    """Refuse a run that needs more memory per device than `train.memory_limit`.

    Raises:
      ValueError: with the parts of the estimate.
    """
    refuse(config, memory(config, program))


def refuse(config: "RunConfig", needed: Memory) -> None:
    """`check_limit` of an estimate that is there already."""
    limit = config.train.memory_limit
    if limit is not None and needed.total > limit * GB:
        raise ValueError(
            f"train.memory_limit: {limit:g} GB, but the run needs {_size(needed.total)} per device ({_parts(needed)}); "
            "lower train.batch_size, raise train.accumulation, set train.remat, or spread over more devices (mesh.fsdp)"
        )


def step_rows(config: "RunConfig") -> int:
    """Rows of a step's batch; of a prompt, as many as completions are drawn."""
    return config.train.batch_size * getattr(config.objective, "group_size", 1)


def abstract_batch(config: "RunConfig", program: Program) -> Batch:
    """The batch of a step, without arrays; pairs have one more axis, and completions are as long as they can get."""
    pair = (2,) if config.objective.kind in PAIRS else ()
    shape = (step_rows(config), *pair, config.data.sequence_length)
    sharding = place.batch_sharding(program.mesh, len(shape), len(shape) - 1)
    names = {"tokens": "int32", "targets": "int32", "mask": "float32", "segments": "int32", "positions": "int32"}
    abstract: Any = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
    batch = {name: abstract(dtype) for name, dtype in names.items()}
    if config.objective.kind in LABELLED:
        for name in ("label", "row"):
            alone = place.batch_sharding(program.mesh, 1)
            batch[name] = jax.ShapeDtypeStruct(shape[:1], "int32", sharding=alone)
    if config.objective.kind == "dpo" and getattr(config.objective, "reference", None) == "precomputed":
        rows = place.batch_sharding(program.mesh, len(shape) - 1, len(shape))
        batch["reference_log_probs"] = jax.ShapeDtypeStruct(shape[:-1], "float32", sharding=rows)
    if getattr(config.objective, "cache", None) is not None:
        k = config.objective.top_k  # type: ignore[attr-defined]
        for name, dtype, width in zip(COLUMNS, ("uint16", "float16"), (k, k + 1), strict=True):
            batch[name] = jax.ShapeDtypeStruct((*shape, width), dtype, sharding=place.batch_sharding(program.mesh, 3))
    if config.objective.kind in PROMPTS:
        entries = range(len(getattr(config.objective, "rewards", ())))
        flat = jax.ShapeDtypeStruct(shape[:1], "float32", sharding=place.batch_sharding(program.mesh, 1))
        batch |= {"ended": flat} | {reward_column(index): flat for index in entries}
    return batch


def text(plan: Plan) -> str:
    """A plan as a table for a terminal."""
    lines = [
        f"parameters       {plan.parameters:>18,}",
        *([f"active per token {plan.active:>18,}"] if plan.active != plan.parameters else []),
        f"trainable        {plan.trainable:>18,}",
        f"FLOPs per step   {plan.flops:>18.3g}",
        f"attention        {plan.attention:>18}",
        *([f"experts          {plan.experts:>18}"] if plan.experts else []),
        f"memory per device  total  {_size(plan.memory.total)}   ({_parts(plan.memory)})",
    ]
    if plan.compiled is not None:
        lines.append(f"memory by the XLA compiler  {_size(plan.compiled)}")
    header = ("leaf", "shape", "init std", "learning rate", "weight decay", "eps", "class", "optimizer")
    table = [header, *(_cells(row) for row in plan.rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    eps = "-" if row.eps is None else f"{row.eps:.6g}"
    numbers = (f"{row.init_std:.6g}", f"{row.learning_rate:.6g}", f"{row.weight_decay:.6g}", eps)
    return (row.leaf, str(list(row.shape)), *numbers, row.kind, row.optimizer)


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _parts(parts: Memory) -> str:
    return ", ".join(f"{name} {_size(value)}" for name, value in parts._asdict().items() if value or name != "average")


def _architecture(config: "RunConfig") -> ModelConfig:
    """The model by configuration alone; of a directory only config.json is read, if it is there."""
    path = config.model.path
    if path is not None and Path(path).is_dir():
        return setup.of_directory(config, load_config(path))
    vocabulary = config.model.vocab_size
    if vocabulary is None and config.data.tokenizer is not None:
        vocabulary = load_tokenizer(config.data.tokenizer).size
    return config.architecture(vocabulary or DEFAULT_VOCABULARY)


def _devices(config: "RunConfig") -> list[jax.Device] | None:
    """Simulated CPU devices where the mesh asks for more than there are; None: those that there are."""
    wanted = math.prod(size for size in dataclasses.astuple(config.mesh) if size > 0)
    if wanted > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # too late: JAX has counted its devices
            jax.config.update("jax_num_cpu_devices", wanted)
    if len(jax.devices()) >= wanted:
        return None
    simulated = jax.devices("cpu")[:wanted]
    return simulated if len(simulated) == wanted else None


def _compiled_bytes(config: "RunConfig", program: Program) -> int | None:
    """Arguments, temporaries and outputs that are no arguments of the compiled step, on one device."""
    step = jax.jit(
        functools.partial(train_step, program.recipe), donate_argnums=0, out_shardings=(program.shardings, None)
    )
    with jax.set_mesh(program.mesh):
        compiled = step.lower(program.abstract, program.frozen, abstract_batch(config, program)).compile()
    account = compiled.memory_analysis()
    if account is None:
        return None
    held = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    return int(held + account.temp_size_in_bytes)
