"""From a configuration to everything that a run needs before its first step. Writes nothing but caches."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh

from jaxlm import objectives
from jaxlm.data.cache import cache_root
from jaxlm.data.dataset import Dataset
from jaxlm.data.loader import Loader
from jaxlm.data.supply import Data, open_data
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place, rules
from jaxlm.interop import hf, selection
from jaxlm.interop.chat import renderer
from jaxlm.interop.fold import fold
from jaxlm.interop.load import load_config
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.kernels.attention import AttentionMask, choose
from jaxlm.optim import chain, schedules
from jaxlm.params import lora as adapters
from jaxlm.params import mup
from jaxlm.params.quantize import refuse_quantised
from jaxlm.params.upcycle import upcycled_config
from jaxlm.training import balance, penalty
from jaxlm.training import frozen as frozen_trees
from jaxlm.training import teacher as teachers
from jaxlm.training.rewards import load_rewards
from jaxlm.training.step import Recipe, State, init_state
from jaxlm.types import Apply, Array, Batch, Objective, Output, Tree, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig

SCAN_FROM = {"cpu": 13}
"""Layers from which scanning pays: unrolled steps are faster on CPU, scanned ones compile sooner."""


class Program(NamedTuple):
    """What a configuration compiles to, data aside.

    Attributes:
      cfg: the model, with muP's forward factors.
      mesh: the devices.
      compute: precision, memory policy, placement.
      recipe: the step's static parts.
      plan: muP factors of the trained leaves, or None.
      base: `() -> params`, fresh parameters of the model, unplaced.
      fresh: `(base params) -> trained trees of step 0`, unplaced.
      abstract: the state's structure with shapes, dtypes and shardings.
      frozen: that of the trees that are used and not trained.
    """

    cfg: ModelConfig
    mesh: Mesh
    compute: Compute
    recipe: Recipe
    plan: mup.Plan | None
    base: Callable[[], Tree]
    fresh: Callable[[Tree], Variables]
    abstract: State
    frozen: Variables

    @property
    def shardings(self) -> State:
        """How the state lies on the mesh."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


class Setup(NamedTuple):
    """A run, ready to start.

    Attributes:
      config: as given.
      program: what it compiles to.
      data: tokenizer and rows. loader: which rows make up which step.
      identity: what a checkpoint is compared by when the run is resumed; JSON values.
    """

    config: "RunConfig"
    program: Program
    data: Data
    loader: Loader
    identity: dict[str, Any]


def prepare(config: "RunConfig") -> Setup:
    """Check a configuration against data, model directory and devices, and put a run together.

    Raises:
      ValueError, FileNotFoundError: `where: what; what to do`.
    """
    mesh = meshes.make(config.mesh)
    load_rewards(getattr(config.objective, "rewards", ()))
    teacher = teachers.find(config)
    directory = None if config.model.path is None else starting_point(config.model.path)
    tokenizer = None if directory is None else frozen_trees.model_tokenizer(config.model.path, directory)
    data = open_data(
        config.data,
        kind=config.objective.kind,
        tokenizer=tokenizer if teacher is None or directory is not None else teacher.tokenizer,
        vocab_size=config.model.vocab_size if directory is None else of_directory(config, directory).V,
        render=renderer(
            config.data.tokenizer, config.model.path, teacher and teacher.path, template=config.data.template
        ),
        reserve=getattr(config.objective, "max_new_tokens", 0),
    )
    cfg = model_config(config, directory, data.tokenizer)
    if teacher is not None:
        data = data._replace(notes=(*data.notes, *teacher.check(config, cfg, data.tokenizer)))
    if directory is not None and cfg.rope != directory.rope:
        note = "model.rope: other than in the directory; its weights know these positions only after enough training"
        data = data._replace(notes=(*data.notes, note))
    if (own := _own_form(cfg)) is not None:
        data = data._replace(notes=(*data.notes, own))
    loader = Loader(data.train, config.train.batch_size, config.run.seed)
    program = assemble(config, cfg, mesh)
    return Setup(config, program, data, loader, identity(config, data))


def starting_point(path: str) -> ModelConfig:
    """The architecture in the directory that `model.path` names.

    Raises:
      FileNotFoundError, ValueError: as `interop.load.load_config`, with the field where nothing is there.
    """
    try:
        return load_config(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model.path: {error}") from None


def _own_form(cfg: ModelConfig) -> str | None:
    """What to say of a model that only jaxlm will be able to load."""
    try:
        hf.choose(fold(cfg)[1])
    except ValueError as error:
        what = str(error).partition(";")[0]
        return f"{what}; hf/ will be in jaxlm's own form, which jaxlm loads and other programs do not"
    return None


def assemble(config: "RunConfig", cfg: ModelConfig, mesh: Mesh) -> Program:
    """The program of a run on a mesh; makes no array.

    Raises:
      ValueError: sizes that cannot be cut over the mesh, naming both fields; a model that cannot be.
    """
    train = config.train
    meshes.check_batch(mesh.shape, train.batch_size, config.data.sequence_length, train.accumulation)
    meshes.check_model(mesh.shape, cfg)
    base = None if config.mup is None else config.mup.base_of(cfg)
    models = frozen_trees.others(config)
    objective = objectives.make(config.objective)
    frozen = frozen_trees.abstract(config, cfg, models, mesh)
    fresh_base = functools.partial(_fresh_base, cfg, base, config.run.seed)
    fresh = functools.partial(_fresh, cfg, objective, models, config.run.seed)
    trained = jax.eval_shape(fresh, frozen["params"] if "params" in frozen else jax.eval_shape(fresh_base))
    plan = None
    if base is not None and config.mup is not None:
        plan = mup.plan_tree(trained, cfg, base, config.mup, config.optimizer.name)
        # The weights of a directory hold the forward factors already; muP's rates alone are for them.
        cfg = cfg if config.model.path is not None else mup.apply_to(cfg, plan)
    compute = make_compute(config, cfg, mesh)
    attention_backend(config, cfg, compute)
    bias = selection.split(frozen_trees.routing(config))[1]
    passes = getattr(config.objective, "epochs", 1)
    recipe = Recipe(
        objective=objective,
        apply=make_apply({"policy": cfg, **models}, compute),
        optimizer=chain.make(config.optimizer, cfg, trained, train.steps * passes, plan),
        schedule=schedules.make(config.optimizer, train.steps * passes),
        accumulation=train.accumulation,
        ema=train.ema,
        seed=config.run.seed,
        sam=config.optimizer.sam,
        passes=passes,
        extra=penalty.joined([balance.extra(cfg, bias), penalty.extra(config.objective, train.batch_size)]),
    )
    abstract = jax.eval_shape(functools.partial(init_state, recipe), trained)
    shardings = rules.shardings_like(abstract, trained, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return Program(cfg, mesh, compute, recipe, plan, fresh_base, fresh, abstract, frozen)


def load_frozen(config: "RunConfig", program: Program) -> Variables:
    """The trees that are used and not trained, on the mesh."""
    return frozen_trees.make(config, program.cfg, program.frozen, program.mesh, program.base)


def start(path: str | None, program: Program, frozen: Variables | None = None, params: Tree | None = None) -> State:
    """The state of step 0 on the mesh: fresh, or with the weights of the model directory at `path`.

    Args:
      path: a model directory, or null.
      program: the run.
      frozen: `load_frozen` of it, where anything is frozen.
      params: what the model starts from, if it comes from nowhere else (a student out of its teacher).
    """
    base = (frozen or {}).get("params", params)

    def build(params: Tree) -> State:
        params = program.base() if params is None else frozen_trees.fitted(program.cfg, params, program.recipe.seed)
        return init_state(program.recipe, program.fresh(params))

    if base is None and path is not None:
        base = frozen_trees.whole(path, "float32", program.mesh)
        refuse_quantised(base, f"model.path: {path}")
    return jax.jit(build, out_shardings=program.shardings)(base)


def settle(program: Program, frozen: Variables) -> Variables:
    """The frozen trees that go with the adapters of step 0: PiSSA takes what it starts from out of the base."""
    lora = program.cfg.lora
    if lora is None or lora.init != "pissa":
        return frozen

    def rest(params: Tree) -> Tree:
        return adapters.residual(program.cfg, params, program.fresh(params)["lora"])

    shardings = jax.tree.map(lambda x: x.sharding, program.frozen["params"])
    return {**frozen, "params": jax.jit(rest, out_shardings=shardings)(frozen["params"])}


def of_directory(config: "RunConfig", directory: ModelConfig) -> ModelConfig:
    """A model directory's architecture with what the configuration adds to it."""
    section, length = config.model.rope, directory.max_length
    rope = directory.rope if section is None else section.over(directory.rope)
    if rope != directory.rope and rope.factor is not None:
        length = round((rope.original_length or length) * rope.factor)
    size = max(config.model.vocab_size or 0, directory.V)
    if config.lora is not None and size > directory.V:
        raise ValueError(
            f"model.vocab_size: {size} adds tokens to the {directory.V} of {config.model.path}, and lora leaves the "
            "model itself as it is; add them in a run without lora first"
        )
    dropout, lora = config.train.dropout, config.lora
    directory = dataclasses.replace(directory, rope=rope, max_length=length, vocab_size=size)
    if (moe := config.model.moe) is not None:
        if lora is not None and directory.moe is None:
            raise ValueError(
                f"model.moe: makes experts out of {config.model.path}, which is dense, and lora leaves the model as it "
                "is; do that in a run without lora first"
            )
        directory = dataclasses.replace(directory, moe=moe) if directory.moe else upcycled_config(directory, moe)
    return dataclasses.replace(directory, dropout=dropout, lora=lora)


def model_config(config: "RunConfig", directory: ModelConfig | None, tokenizer: Tokenizer) -> ModelConfig:
    """The architecture: of the model directory, or of the configuration with the tokenizer's vocabulary."""
    if directory is not None:
        cfg = of_directory(config, directory)
        if config.data.tokenizer is not None and tokenizer.size > cfg.V:
            raise ValueError(
                f"data.tokenizer: {tokenizer.size} tokens, and {config.model.path} has {cfg.V}; use the model's own, "
                f"or set model.vocab_size to {tokenizer.size} or more, and tokens are added"
            )
        return cfg
    cfg = config.architecture(tokenizer.size)
    if tokenizer.size > cfg.V:
        raise ValueError(
            f"model.vocab_size: {cfg.V} is smaller than the tokenizer's {tokenizer.size}; raise it or leave it out"
        )
    return dataclasses.replace(cfg, eos_token_id=tokenizer.eos_id)


def make_compute(config: "RunConfig", cfg: ModelConfig, mesh: Mesh) -> Compute:
    """Run-time choices, with what the configuration leaves open decided by platform and depth."""
    train, platform = config.train, mesh.devices.flat[0].platform
    # Unrolled, the gathers of the forward and the backward pass are merged: whole weights would stay on every device.
    # And XLA on CPU merges what is computed again with what was computed before, so that remat would save nothing.
    scan = cfg.N >= SCAN_FROM.get(platform, 0) or mesh.shape["fsdp"] > 1 or train.remat != "none"
    return Compute(
        dtype=train.dtype or ("float32" if platform == "cpu" else "bfloat16"),
        remat=train.remat,
        scan=scan if train.scan is None else train.scan,
        attention=train.attention,
        grouped=train.experts,
        constrain=place.constrain(mesh),
        mesh=mesh,
    )


def attention_backend(config: "RunConfig", cfg: ModelConfig, compute: Compute) -> str:
    """The attention backend that the training step's shapes get.

    Raises:
      ValueError: `train.attention` names one that cannot do what the model asks.
    """
    length = config.data.sequence_length
    q, k = (cast(Array, jax.ShapeDtypeStruct((1, length, heads, cfg.K), compute.dtype)) for heads in (cfg.H, cfg.G))
    ids: Any = jax.ShapeDtypeStruct((1, length), "int32")
    window = cfg.window if any(cfg.layer_type(i) == "sliding" for i in range(cfg.N)) else None
    mask = AttentionMask(window=window, segments_BxL=ids, segments_BxS=ids)
    try:
        return choose(q, k, mask=mask, softcap=cfg.attention_softcap, backend=compute.attention)
    except ValueError as error:
        raise ValueError(f"train.attention: {error}") from None


def make_apply(models: dict[str, ModelConfig], compute: Compute) -> Apply:
    """The models as objectives call them, by name."""

    def apply(variables: Variables, tokens: jax.Array, *, model: str = "policy", **inputs: Any) -> Output:
        return transformer.apply(models[model], variables, tokens, compute=compute, **inputs)

    return apply


def identity(config: "RunConfig", data: Data) -> dict[str, Any]:
    """What a checkpoint of this run says about it (`meta.compare_meta`)."""
    return {
        "config": msgspec.to_builtins(config),
        "tokenizer": data.tokenizer.sha256,
        "data": data.train.identity,
        "base": frozen_trees.content(config),
    }


def global_batch(dataset: Dataset, rows: np.ndarray, mesh: Mesh) -> Batch:
    """Rows of these numbers (-1: padding) as a batch on the mesh; each process reads only what its devices hold."""
    mine = rows[place.host_rows(mesh, len(rows))]
    return place.place_batch(dataset.batch(mine), mesh, len(rows))


def use_compilation_cache() -> None:
    """Keep compiled programs between starts, unless the user has said where (or that not) to."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values.get("jax_compilation_cache_dir"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _fresh_base(cfg: ModelConfig, base: ModelConfig | None, seed: int) -> Tree:
    key = jax.random.key(seed)
    return (transformer.init(cfg, key) if base is None else mup.init(cfg, base, key))["params"]


def _fresh(
    cfg: ModelConfig, objective: Objective, models: dict[str, ModelConfig], seed: int, params: Tree
) -> Variables:
    """What is trained: adapters of `params`, or `params`; and the objective's own trees, which lie beside them."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    name, trained = ("params", params) if cfg.lora is None else ("lora", adapters.init(cfg, key, params))
    own = objective.init({"policy": cfg, **models}, jax.random.fold_in(key, 1))
    # A new head is a part of the model; if the directory came with one, it starts from that.
    heads = {head: params.get(head, tree) for head, tree in own.pop("params", {}).items()}
    return {name: {**heads, **trained}, **own}
