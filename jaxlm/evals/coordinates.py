"""The coordinate check: whether a few steps of training move activations by the same amount at every size.

Yang, Hu et al., Tensor Programs V (2203.03466), appendix D.1. Under muP mean |x_t - x_0| does not depend on width;
under the standard parametrisation it grows.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.loader import Loader
from jaxlm.data.supply import Data, open_data
from jaxlm.dist import mesh as meshes
from jaxlm.evals.activations import ACTIVATION_NAMES, activations
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.params import mup
from jaxlm.params.config import MupBase, MupConfig
from jaxlm.training import setup
from jaxlm.training.step import State, init_state, train_step
from jaxlm.types import Array, Batch, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig

Parametrisation = Literal["mup", "sp"]
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("mup", "sp")
WIDTH, DEPTH = "model.d_model", "model.n_layers"

STEPS = 3
SEEDS = 2
TOKENS = 512
"""Tokens of the batch, at most: more would only average the same numbers better."""

MOST_SIZES = 4
LEARNING_RATES = {"adam": 2.0**-6, "muon": 2.0**-4, "adafactor": 2.0**-3, "sgd": 2.0}
"""By family of optimizers, far above what one would train with, so that three steps show what thousands would."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What was measured.

    Attributes:
      over: the field that grows, `model.d_model` or `model.n_layers`.
      sizes: its values, ascending.
      changes: mean |x_t - x_0| by parametrisation and activation, float64 [sizes, steps], averaged over seeds.
      learning_rate: of all models, constant.
    """

    over: str
    sizes: tuple[int, ...]
    changes: dict[tuple[Parametrisation, str], np.ndarray]
    learning_rate: float

    def slope(self, parametrisation: Parametrisation, activation: str, step: int) -> float:
        """Least-squares slope of log2 mean |x_t - x_0| on log2 size after `step` updates; nan if nothing moved."""
        values = self.changes[parametrisation, activation][:, step - 1]
        if not (np.isfinite(values).all() and (values > 0).all()):
            return float("nan")
        return float(np.polyfit(np.log2(self.sizes), np.log2(values), 1)[0])


def family(lists: Mapping[str, Sequence[Any]]) -> tuple[str, tuple[int, ...]]:
    """What grows, and its values in ascending order (none: to be chosen), from the lists in a command line.

    Raises:
      ValueError: another field, several of them, or values that are no sizes.
    """
    if not lists:
        return WIDTH, ()
    field, values = next(iter(lists.items()))
    if len(lists) > 1 or field not in (WIDTH, DEPTH):
        raise ValueError(
            f"{list(lists)[-1]}: a coordinate check grows either {WIDTH} or {DEPTH}; give a list for one of these"
        )
    if not all(type(value) is int and value > 0 for value in values):
        raise ValueError(f"{field}: {', '.join(map(str, values))}: not all are sizes; use whole numbers from 1 up")
    return field, tuple(sorted(values))


def widths_of(base: ModelConfig, target: ModelConfig) -> tuple[int, ...]:
    """The base's width times powers of two: three of them, four if the target is as wide as the fourth."""
    widths = [base.D * 2**i for i in range(MOST_SIZES)]
    return tuple(width for width in widths if width <= max(target.D, 4 * base.D))


def member(base: ModelConfig, over: str, size: int) -> ModelConfig:
    """The model of a family: the base with another depth, or with another width and its own head width.

    Heads, key/value heads and feed-forward width grow as the width does; key/value heads stay where they would not
    come out whole.

    Raises:
      ValueError: heads or feed-forward width do not come out whole.
    """
    if over == DEPTH:
        return dataclasses.replace(base, n_layers=size)
    heads, kv_heads, d_ff = (value * size / base.D for value in (base.H, base.G, base.F))
    for name, value in (("n_heads", heads), ("d_ff", d_ff)):
        if not value.is_integer():
            raise ValueError(
                f"{WIDTH}: {size} is {size / base.D:g} times the base's {base.D}, which would make {name} {value:g}; "
                "choose a multiple"
            )
    grows = kv_heads.is_integer() and heads % kv_heads == 0
    return dataclasses.replace(
        base, d_model=size, n_heads=int(heads), n_kv_heads=int(kv_heads) if grows else base.G, d_ff=int(d_ff),
        head_dim=base.K,
    )  # fmt: skip


def fill(config: "RunConfig", given: Container[str]) -> tuple["RunConfig", list[str]]:
    """The run with what a check needs in place of defaults, and what the user should be told.

    Args:
      config: the run.
      given: dotted names of the fields that the configuration gives itself; these stay.
    """
    notes = []
    if "optimizer.learning_rate" not in given:
        rate = LEARNING_RATES[mup.FAMILIES[config.optimizer.name]]
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
    if config.model.tie_embeddings and "model.tie_embeddings" not in given:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=False))
        notes.append(
            "model.tie_embeddings: not given, so embeddings were untied; train with model.tie_embeddings=false too, as "
            "muP transfers poorly with tied ones"
        )
    elif config.model.tie_embeddings:
        notes.append(
            "model.tie_embeddings: true; tied embeddings start too small and move too slowly for muP to transfer well; "
            "use false"
        )
    return config, notes


def check(config: "RunConfig", over: str, sizes: Sequence[int], report: Callable[[str], None]) -> Check:
    """Train small models of all sizes under muP and the standard parametrisation for a few steps, and measure.

    Args:
      config: the run; `mup.base` gives the base shape, without `mup` it is the model's own.
      over: `model.d_model` or `model.n_layers`.
      sizes: values of it; empty: chosen by `widths_of`.
      report: told how far it is.

    Raises:
      ValueError: `where: what; what to do`.
    """
    _refuse(config)
    data = open_data(config.data, kind=config.objective.kind, vocab_size=config.model.vocab_size)
    target = setup.model_config(config, None, data.tokenizer)
    base = target if config.mup is None else config.mup.base_of(target)
    sizes = tuple(sizes) or widths_of(base, target)
    config = _plain_steps(config)
    models = [member(base, over, size) for size in sizes]
    batches = _batches(config, data)
    changes: dict[tuple[Parametrisation, str], list[np.ndarray]] = {}
    for parametrisation in PARAMETRISATIONS:
        for i, model in enumerate(models):
            done = PARAMETRISATIONS.index(parametrisation) * len(models) + i
            report(f"{done + 1}/{2 * len(models)}  {parametrisation}  {over}={sizes[i]}")
            measured = _measure(config, model, base if parametrisation == "mup" else None, batches)
            for name in ACTIVATION_NAMES:
                changes.setdefault((parametrisation, name), []).append(measured[name])
    return Check(over, sizes, {key: np.stack(rows) for key, rows in changes.items()}, config.optimizer.learning_rate)


def _refuse(config: "RunConfig") -> None:
    """ValueError for what the check does not know."""
    for field, wrong in (
        ("model.path", config.model.path is not None),
        ("lora", config.lora is not None),
        ("model.moe", config.model.moe is not None),
    ):
        if wrong:
            raise ValueError(f"{field}: the coordinate check draws dense models and trains all of them; set it to null")
    if config.objective.kind not in ("next_token", "sft"):
        raise ValueError(
            f"objective.kind: {config.objective.kind} needs more than one model; use next_token for a coordinate check"
        )


def _plain_steps(config: "RunConfig") -> "RunConfig":
    """The run with the peak rate from the first step on, in full precision, on one device, without dropout."""
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup=0.0, end=0.0)
    length = min(config.data.sequence_length, TOKENS)
    train = dataclasses.replace(
        config.train, steps=STEPS, batch_size=max(1, min(config.train.batch_size, TOKENS // length)), accumulation=1,
        dropout=0.0, ema=None, dtype="float32", remat="none", scan=False, attention=None,
    )  # fmt: skip
    return dataclasses.replace(config, optimizer=optimizer, train=train, mesh=meshes.MeshConfig(data=1))


def _batches(config: "RunConfig", data: Data) -> list[Batch]:
    """A batch for each seed."""
    loaders = [Loader(data.train, config.train.batch_size, config.run.seed + seed) for seed in range(SEEDS)]
    batches = [data.train.batch(loader.rows(0)) for loader in loaders]
    return [{name: jnp.asarray(column[:, :TOKENS]) for name, column in batch.items()} for batch in batches]


def _measure(
    config: "RunConfig", model: ModelConfig, base: ModelConfig | None, batches: list[Batch]
) -> dict[str, np.ndarray]:
    """mean |x_t - x_0| of each activation, [steps], of one model."""
    settings = None
    if base is not None:
        shape = MupBase(base.D, base.N, base.H, base.G, base.K, base.F)
        settings = dataclasses.replace(config.mup or MupConfig(), base=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mesh = meshes.make(config.mesh, jax.devices()[:1])
        program = setup.assemble(dataclasses.replace(config, mup=settings), model, mesh)

    def follow(params: Variables, batch: Batch) -> dict[str, Array]:
        """[STEPS + 1] of each activation; a step too many is made, so that the model is compiled into one place."""

        def step(carry: tuple[State, dict[str, Array] | None], first: Array) -> tuple[Any, dict[str, Array]]:
            state, start = carry
            now = activations(program.cfg, state.params, batch)
            start = jax.tree.map(lambda x, y: jnp.where(first, x, y), now, start)
            moved = jax.tree.map(lambda x, y: jnp.mean(jnp.abs(x - y)), now, start)
            return (train_step(program.recipe, state, {}, batch)[0], start), moved

        shapes = jax.eval_shape(functools.partial(activations, program.cfg), params, batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        carry = (init_state(program.recipe, params), nothing)
        return jax.lax.scan(step, carry, jnp.arange(STEPS + 1) == 0)[1]

    run, rows = jax.jit(follow), []
    for seed, batch in enumerate(batches):
        key = jax.random.key(config.run.seed + seed)
        rows.append(run(transformer.init(model, key) if base is None else mup.init(model, base, key), batch))
    return {name: np.mean([np.asarray(row[name], np.float64)[1:] for row in rows], axis=0) for name in ACTIVATION_NAMES}
