"""A mixture of experts out of a dense model (sparse upcycling, 2212.05055): the experts start as copies of its
feed-forward layers, so the mixture computes what the dense model does and training goes on from there."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.nn.transformer import init
from jaxlm.nn.walk import layer_slots
from jaxlm.types import Array, Tree

ROUTER_STD = 0.02
PROJECTIONS = ("gate", "up", "down")


def upcycled_config(dense: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """The dense model's configuration with experts of its own width, of no Hugging Face family in particular.

    Raises:
      ValueError: a mixture that copies of the dense layers cannot make exact; the field is named.
    """
    if dense.moe is not None:
        raise ValueError("model.moe: the model has experts already; only a dense model can be upcycled")
    if moe.d_ff not in (None, dense.F):
        raise ValueError(
            f"model.moe.d_ff: experts start as copies of feed-forward layers of width {dense.F}, not {moe.d_ff}; "
            "leave it null"
        )
    if not moe.renormalize or moe.routed_scaling_factor != 1:
        raise ValueError(
            "model.moe.renormalize: gates of copied experts must add up to 1; set it to true, and "
            "model.moe.routed_scaling_factor to 1"
        )
    if moe.n_shared_experts:
        raise ValueError(
            f"model.moe.n_shared_experts: {moe.n_shared_experts} more experts beside the copies would change what the "
            "model computes; set it to 0"
        )
    if dense.mlp_bias:
        raise ValueError("model.mlp_bias: experts have no biases; a model with them cannot be upcycled")
    return dataclasses.replace(dense, moe=dataclasses.replace(moe, d_ff=dense.F), family=None)


def upcycle(params: Tree, dense: ModelConfig, cfg: ModelConfig, key: Array) -> Tree:
    """Parameters of the mixture `cfg` that compute what the dense `params` do.

    {"layers": {"mlp": {"norm": n [N, D], "up": {"kernel": [N, D, F]}, ...}, ...}}
    ->  {"layers": {"mlp": {"norm": n, "router": {"kernel": [N, D, E]}, "up": {"kernel": [N, E, D, F]}, ...}, ...}}

    All experts of a layer are equal, so whichever are chosen, gates that add up to 1 give the dense layer's output, to
    rounding. Layers of `cfg.moe.dense_layers` stay as they are, in a tree of their own.

    Args:
      params: parameters of `dense`, layers stacked; float arrays.
      dense, cfg: the two configurations; `cfg` as `upcycled_config` makes it.
      key: of the routers, drawn from N(0, 0.02^2).

    Raises:
      ValueError: `cfg` is no mixture that can start so, or the parameters are not those of `dense`.
    """
    if cfg.moe is None:
        raise ValueError("model.moe: null; give the number of experts to make of a dense model")
    upcycled_config(dense, cfg.moe)
    sparse = layer_slots(cfg)
    split: Tree = {name: leaf for name, leaf in params.items() if name != "layers"}
    for stack in dict.fromkeys(name for name, _ in sparse):
        mine = jnp.array([i for i, (name, _) in enumerate(sparse) if name == stack])
        whole = len(mine) == cfg.N
        split[stack] = params["layers"] if whole else jax.tree.map(lambda leaf, i=mine: leaf[i], params["layers"])
    if len(cfg.moe.dense_layers) < cfg.N:
        split["layers"] = {**split["layers"], "mlp": _experts(split["layers"]["mlp"], cfg.moe.experts, key)}
    _check(split, cfg)
    return split


def _experts(mlp: Tree, experts: int, key: Array) -> Tree:
    """A stack of dense layers -> a stack of mixtures of copies."""
    copied = {
        name: jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], experts, axis=1), part)
        for name, part in mlp.items()
        if name in PROJECTIONS
    }
    depth, width, _ = mlp["up"]["kernel"].shape
    router = ROUTER_STD * jax.random.normal(key, (depth, width, experts), jnp.float32)
    return {**mlp, **copied, "router": {"kernel": router.astype(mlp["up"]["kernel"].dtype)}}


def _check(params: Tree, cfg: ModelConfig) -> None:
    wanted = trees.leaves(jax.eval_shape(lambda: init(cfg, jax.random.key(0)))["params"])
    found = trees.leaves(params)
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [path for path in wanted if path in found and wanted[path].shape != found[path].shape]
    if wrong:
        raise ValueError(f"params: {', '.join(wrong)}: not what the configuration asks for; is it this model's?")
