"""The axis table against the trees of real models."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree as trees
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.params import axes

PLAIN = ModelConfig(d_model=10, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=14, vocab_size=9)
MIXED = MoEConfig(experts=5, top_k=2, d_ff=22, dense_layers=(1,))
MODELS = {
    "plain": PLAIN,
    "untied, learned positions, layernorm": dataclasses.replace(
        PLAIN, tie_embeddings=False, positions="learned", max_length=11, norm="layernorm", gated=False
    ),
    "biases, both norms": dataclasses.replace(
        PLAIN, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="projection", norm_placement="both"
    ),
    "experts and dense layers": dataclasses.replace(PLAIN, moe=MIXED, qk_norm="head", norm_placement="post"),
}


def shapes(cfg):
    return jax.eval_shape(partial(transformer.init, cfg), jax.random.key(0))["params"]


@pytest.mark.parametrize("name", MODELS)
def test_axes_have_the_sizes_that_roles_say(name):
    cfg = MODELS[name]
    tree = shapes(cfg)
    for path, role in axes.roles(tree).items():
        shape = trees.leaves(tree)[path].shape
        own = shape[len(shape) - role.rank :]
        if role.fan_out is not None:
            assert own[-1] == axes.size(cfg, role.fan_out), path
        if role.fan_in is not None:
            assert own[-2] == axes.size(cfg, role.fan_in), path
        batch = shape[: len(shape) - role.rank]
        layers = {"layers": 2 if cfg.moe else 3, "dense_layers": 1, None: 0}[axes.stack_name(path)]
        experts = 5 if "layers/mlp/" in path and path[0] == "l" and role.kind == "matrix" and cfg.moe else 0
        assert batch == tuple(n for n in (layers, experts) if n), path


@pytest.mark.parametrize("name", MODELS)
def test_decay_is_by_name_and_never_by_rank(name):
    mask = trees.leaves(axes.decay_mask(shapes(MODELS[name])))
    assert {path for path, decayed in mask.items() if decayed} == {path for path in mask if path.endswith("kernel")}


def test_layer_ids_follow_the_order_of_layers_through_all_stacks():
    cfg = MODELS["experts and dense layers"]
    ids = trees.leaves(axes.layer_ids({"params": shapes(cfg)}, cfg))
    assert ids["params/embed/kernel"] == 0
    assert ids["params/layers/mlp/router/kernel"].tolist() == [1, 3]
    assert ids["params/dense_layers/mlp/up/kernel"].tolist() == [2]
    assert ids["params/norm/scale"] == 4


def test_adapters_and_heads_have_roles():
    lora = {"attn": {"q": {"a": 0, "b": 0}, "o": {"a": 0, "b": 0}}, "mlp": {"down": {"a": 0, "b": 0}}}
    tree = {"lora": {"layers": lora}, "score": {"kernel": 0}, "value": {"kernel": 0, "bias": 0}}
    roles = axes.roles(tree)
    assert roles["lora/layers/mlp/down/a"] == axes.Role("lora_a", "expert")
    assert roles["lora/layers/attn/o/b"].fan_out == "D"
    assert roles["score/kernel"].kind == roles["value/kernel"].kind == "output"
    assert not any(role.decayed for path, role in roles.items() if path.startswith("lora"))
    assert axes.layer_ids(tree, PLAIN)["lora"]["layers"]["attn"]["q"]["a"].tolist() == [1, 2, 3]
    assert axes.layer_ids(tree, PLAIN)["value"]["kernel"] == 4


def test_unknown_leaf_is_named():
    with pytest.raises(ValueError, match="axis roles: no rule covers layers/attn/z/kernel"):
        axes.roles({"layers": {"attn": {"z": {"kernel": jnp.zeros((1, 2, 2))}}}, "norm": {"scale": np.zeros(2)}})
