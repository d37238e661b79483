"""Layer-wise learning rates, and the table of effective values that shows them."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import tree as trees
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.optim import layers
from jaxlm.optim.config import LayerLrConfig, OptimizerConfig
from jaxlm.optim.effective import effective
from jaxlm.params import mup
from jaxlm.params.config import MupConfig

MODEL = ModelConfig(d_model=8, n_layers=3, n_heads=2, d_ff=16, vocab_size=10, tie_embeddings=False)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


TREE = {
    "params": {
        "embed": {"kernel": leaf(10, 8)},
        "layers": {"attn": {"q": {"kernel": leaf(3, 8, 8)}, "norm": {"scale": leaf(3, 8)}}},
        "norm": {"scale": leaf(8)},
        "unembed": {"kernel": leaf(8, 10)},
    }
}


def by_layer(config, tree=TREE, model=MODEL):
    return {
        path: np.ravel(value).tolist() for path, value in trees.leaves(layers.multipliers(config, model, tree)).items()
    }


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (LayerLrConfig("decay_to_input", 0.8), [0.4096, 0.512, 0.64, 0.8, 1.0]),
        (LayerLrConfig("decay_to_output", 0.8), [1.0, 0.8, 0.64, 0.512, 0.4096]),
        (LayerLrConfig("list", factors=(0.0, 0.1, 0.2, 0.3, 2.0)), [0.0, 0.1, 0.2, 0.3, 2.0]),
    ],
)
def test_values_from_the_embedding_to_the_head(config, values):
    found = by_layer(config)
    assert found["params/embed/kernel"] == pytest.approx(values[:1])
    assert found["params/layers/attn/q/kernel"] == pytest.approx(values[1:4])
    assert found["params/layers/attn/norm/scale"] == pytest.approx(values[1:4])
    assert found["params/norm/scale"] == found["params/unembed/kernel"] == pytest.approx(values[4:])
    arrays = trees.leaves(layers.multipliers(config, MODEL, TREE))
    assert arrays["params/layers/attn/q/kernel"].shape == (3, 1, 1)
    assert arrays["params/layers/attn/norm/scale"].shape == (3, 1)


def test_experts_dense_layers_and_adapters_have_their_layers_factor():
    model = dataclasses.replace(MODEL, moe=MoEConfig(experts=4, dense_layers=(1,)))
    config = LayerLrConfig("decay_to_input", 0.5)
    tree = {
        "params": {
            "layers": {"mlp": {"up": {"kernel": leaf(2, 4, 8, 16)}}},
            "dense_layers": {"mlp": {"up": {"kernel": leaf(1, 8, 16)}}},
        }
    }
    found = by_layer(config, tree, model)
    assert found["params/layers/mlp/up/kernel"] == [1 / 8, 1 / 2]
    assert found["params/dense_layers/mlp/up/kernel"] == [1 / 4]
    lora = {"lora": {"layers": {"attn": {"q": {"a": leaf(3, 8, 2), "b": leaf(3, 2, 8)}}}}}
    assert set(map(tuple, by_layer(config, lora).values())) == {(1 / 8, 1 / 4, 1 / 2)}
    assert by_layer(config, {"score": {"kernel": leaf(8, 1)}}) == {"score/kernel": [1.0]}


def test_wrong_lists_are_refused():
    with pytest.raises(ValueError, match=r"optimizer\.layer_lr\.factors: 2 numbers for 3 layers; give 5"):
        by_layer(LayerLrConfig("list", factors=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"factors: missing, but optimizer\.layer_lr\.mode is list"):
        LayerLrConfig("list").validate()
    with pytest.raises(ValueError, match=r"factors: given, but optimizer\.layer_lr\.mode is decay_to_input"):
        OptimizerConfig(layer_lr=LayerLrConfig(factors=(1.0,))).validate()


def test_effective_table_shows_each_layer_only_where_layers_differ():
    same = effective(OptimizerConfig(), MODEL, TREE)
    assert [row.leaf for row in same] == ["embed", "layers.0.attn.norm", "layers.0.attn.q", "norm", "unembed"]
    q = same[2]
    assert (q.shape, q.kind, q.learning_rate, q.weight_decay, q.eps) == ((8, 8), "matrix", 3e-3, 0.1, 1e-8)
    assert q.init_std == pytest.approx(8**-0.5)
    assert (same[0].init_std, same[1].weight_decay, q.optimizer) == (1.0, 0.0, "adamw")
    other = effective(OptimizerConfig(layer_lr=LayerLrConfig(rate=0.5)), MODEL, TREE)
    rates = {row.leaf: row.learning_rate for row in other if row.leaf.endswith("attn.q")}
    assert rates == pytest.approx(
        {"layers.0.attn.q": 3e-3 / 8, "layers.1.attn.q": 3e-3 / 4, "layers.2.attn.q": 3e-3 / 2}
    )
    assert [row.leaf for row in other if "norm" in row.leaf] == [f"layers.{i}.attn.norm" for i in range(3)] + ["norm"]


def test_effective_table_under_mup_and_for_frozen_leaves():
    base = dataclasses.replace(MODEL, d_model=4)
    plan = mup.plan_tree(TREE, MODEL, base, MupConfig())
    lora = {"lora": {"layers": {"attn": {"q": {"a": leaf(3, 8, 2), "b": leaf(3, 2, 8)}}}}}
    rows = {row.leaf: row for row in effective(OptimizerConfig(), MODEL, TREE, plan)}
    q = rows["layers.0.attn.q"]
    assert (q.learning_rate, q.weight_decay, q.eps) == (1.5e-3, 0.2, 5e-9)
    assert q.init_std == pytest.approx(8**-0.5)
    assert rows["unembed"].init_std == 0.5  # that of the base
    rows = {row.leaf: row for row in effective(OptimizerConfig(), MODEL, lora, frozen=TREE)}
    assert rows["layers.0.attn.q"].frozen and rows["layers.0.attn.q"].learning_rate == 0.0
    assert not rows["layers.0.attn.q.a"].frozen
    assert rows["layers.0.attn.q.a"].weight_decay == rows["layers.0.attn.q.b"].init_std == 0.0
    assert effective(OptimizerConfig(name="sgd"), MODEL, lora)[0].eps is None
