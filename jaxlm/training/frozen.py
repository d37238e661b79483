"""The trees that a run uses and does not train: the base under adapters, a reference, teachers and reward models."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.dist import rules
from jaxlm.interop import peft_config
from jaxlm.interop.load import load, load_config, load_routing, model_directory, stored_kind
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig
from jaxlm.params import lora, vocabulary
from jaxlm.params.quantize import quantize
from jaxlm.params.upcycle import upcycle
from jaxlm.training.rewards import model_directory_of
from jaxlm.types import Array, Tree, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig

Models = dict[str, ModelConfig]


def directories(config: "RunConfig") -> dict[str, str]:
    """Model directories that the objective needs besides the trained model, by name."""
    teacher = getattr(config.objective, "teacher", None)
    reward = model_directory_of(getattr(config.objective, "rewards", ()))
    return {name: path for name, path in (("teacher", teacher), ("reward", reward)) if path}


def others(config: "RunConfig") -> Models:
    """The architectures of `directories`.

    Raises:
      FileNotFoundError, ValueError: naming the field.
    """
    found = {}
    for name, path in directories(config).items():
        try:
            found[name] = load_config(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"objective.{name}: {error}") from None
    return found


def teacher_runs(config: "RunConfig") -> bool:
    """Whether a teacher itself runs beside the student; if not, its weights are not loaded for training."""
    objective: Any = config.objective
    if objective.kind != "distill":
        return False
    layers = objective.hidden_weight > 0 or objective.attention_weight > 0
    return layers or objective.on_policy > 0 or (objective.kd_weight > 0 and objective.cache is None)


def reference_kind(config: "RunConfig") -> str | None:
    """What log-probabilities are compared with; None for objectives without a reference.

    Raises:
      ValueError: `adapter-off` without adapters, or with ones whose base alone is not the model that was started from.
    """
    objective = config.objective
    if not hasattr(objective, "reference") or (objective.kind == "grpo" and not getattr(objective, "beta", 0.0)):
        return None
    kind: str = objective.reference or ("copy" if config.lora is None or config.lora.init == "pissa" else "adapter-off")
    if kind == "adapter-off" and config.lora is not None and config.lora.init == "pissa":
        raise ValueError(
            "objective.reference: adapter-off, but lora.init pissa takes the adapters out of the base, so without them "
            "it is another model; use copy"
        )
    if kind == "adapter-off" and config.lora is None:
        raise ValueError(
            "objective.reference: adapter-off, but lora is null, so there are no adapters to turn off; set lora or use "
            "copy"
        )
    return kind


def abstract(config: "RunConfig", cfg: ModelConfig, models: Models, mesh: Mesh) -> Variables:
    """The frozen trees with shapes, dtypes and shardings, without arrays.

    Args:
      config: the run.
      cfg: the trained model.
      models: the other models' architectures (`others`).
      mesh: where they shall lie.
    """
    dtype = frozen_dtype(mesh)
    used = {name: other for name, other in models.items() if name != "teacher" or teacher_runs(config)}
    trees: Variables = {name: _abstract_model(other, dtype) for name, other in used.items()}
    base = _abstract_model(cfg, dtype)["params"]
    if reference_kind(config) == "copy":
        trees["reference"] = {"params": base, **routing(config)}
    if config.lora is not None:
        if (kind := config.quantize or stored_kind(config.model.path)) is not None:
            base = jax.eval_shape(functools.partial(stored, kind=kind), base)
        trees["params"] = base
    return {name: _placed(tree, mesh) for name, tree in trees.items()}


def routing(config: "RunConfig") -> Variables:
    """What the directory that a run starts from says of its routers besides their weights, see `load_routing`."""
    return {} if config.model.path is None else load_routing(config.model.path)


def make(config: "RunConfig", cfg: ModelConfig, wanted: Variables, mesh: Mesh, fresh: Tree) -> Variables:
    """The frozen trees on the mesh, with the structure of `wanted` (`abstract`).

    Args:
      config, cfg, wanted, mesh: as in `abstract`.
      fresh: `() -> params`, what a base without a directory starts from.

    Raises:
      FileNotFoundError, ValueError: as `interop.load.load`.
    """
    dtype = frozen_dtype(mesh)
    found: Variables = {}
    for name, directory in directories(config).items():
        if name in wanted:
            found[name] = load(directory, dtype, mesh=mesh)[1]
            if name == "reward" and not {"score"} & {part for tree in found[name].values() for part in tree}:
                raise ValueError(
                    f"objective.rewards: {directory}: is no reward model, as its weights have no score head; train one "
                    "(objective.kind reward), or name a function as path/file.py:function"
                )
    path = config.model.path
    if "params" in wanted:
        found["params"] = whole(path, dtype, mesh, config.quantize) if path else _fresh_base(config, wanted, fresh)
    if "reference" in wanted:
        if path is None:
            shardings = jax.tree.map(lambda x: x.sharding, wanted["reference"]["params"])
            found["reference"] = {"params": jax.jit(fresh, out_shardings=shardings)()}
        elif "params" in found and config.quantize is None:
            found["reference"] = {"params": found["params"]}
        else:
            found["reference"] = {"params": fitted(cfg, whole(path, dtype, mesh), config.run.seed)}
        found["reference"] |= jax.device_put(routing(config), NamedSharding(mesh, PartitionSpec()))
    return found


def model_tokenizer(path: str | None, directory: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a model directory or a run, if it has one, ending documents as the model does."""
    folders = (Path(path or ""), Path(path or "") / "hf")
    folder = next((f for f in folders if (f / "tokenizer.json").is_file()), None)
    ends = directory.eos_token_id
    return None if folder is None else load_tokenizer(str(folder), ends[0] if isinstance(ends, tuple) else ends)


def whole(path: str, dtype: str, mesh: Mesh, kind: str | None = None) -> Tree:
    """The parameters of a directory, adapters of a run merged into them, quantised after that."""
    adapted = load_config(path).lora is not None
    cfg, variables = load(path, dtype, quantize=None if adapted else kind, mesh=mesh)
    if "lora" not in variables:
        return variables["params"]
    return stored(lora.merge(cfg, variables["params"], variables["lora"]), kind)


def stored(params: Tree, kind: str | None) -> Tree:
    """The parameters of a base as the field `quantize` asks for them."""
    return params if kind is None else quantize(params, kind)


def fitted(cfg: ModelConfig, params: Tree, seed: int) -> Tree:
    """A directory's parameters as `cfg` asks for them: with rows for more tokens, with experts out of a dense model."""
    params = vocabulary.extended(params, cfg.V)
    if cfg.moe is None or "router" in params["layers"]["mlp"]:
        return params
    dense = dataclasses.replace(cfg, moe=None, d_ff=cfg.moe.d_ff)
    return upcycle(params, dense, cfg, jax.random.key(seed))


def frozen_dtype(mesh: Mesh) -> str:
    """What is not trained is kept in the dtype of the computation."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def content(config: "RunConfig") -> dict[str, str]:
    """SHA-256 of the directories that a run starts from or uses, by name; what a checkpoint is checked against."""
    paths = {"model": config.model.path, **directories(config)}
    return {name: directory_hash(path) for name, path in paths.items() if path is not None}


def directory_hash(path: str) -> str:
    """SHA-256 of a model directory's configuration, weights and adapter, of their bytes alone."""
    directory, whole = peft_config.find(path) or model_directory(path), hashlib.sha256()
    names = ("config.json", "adapter_config.json")
    for file in sorted(
        [*(directory / n for n in names if (directory / n).is_file()), *directory.glob("*.safetensors")]
    ):
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _fresh_base(config: "RunConfig", wanted: Variables, fresh: Any) -> Tree:
    shardings = jax.tree.map(lambda x: x.sharding, wanted["params"])

    return jax.jit(lambda: stored(fresh(), config.quantize), out_shardings=shardings)()


def _abstract_model(cfg: ModelConfig, dtype: str) -> Variables:
    """The parameters of a model that is loaded. Adapters beside them, of a teacher that is a run of them, are small."""

    def build(key: Array) -> Variables:
        params = transformer.init(cfg, key)["params"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return {"params": jax.eval_shape(build, jax.random.key(0))}


def _placed(tree: Tree, mesh: Mesh) -> Tree:
    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, rules.shardings(tree, mesh))
