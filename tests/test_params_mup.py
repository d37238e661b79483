"""muP factors against the mup package and the rules, fresh variables against both, and identity at the base shape."""

import dataclasses
import itertools
import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import mup as peer
import numpy as np
import pytest
import torch

from jaxlm import tree as trees
from jaxlm.nn import transformer
from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.optim import chain
from jaxlm.optim.config import OptimizerConfig
from jaxlm.params import axes, mup
from jaxlm.params.config import MupBase, MupConfig

BASE = ModelConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, vocab_size=40, tie_embeddings=False,
    qkv_bias=True, o_bias=True, mlp_bias=True, norm="layernorm", qk_norm="head",
)  # fmt: skip
EVEN = dataclasses.replace(BASE, d_model=128, n_heads=8, n_kv_heads=4, d_ff=192)
UNEVEN = dataclasses.replace(BASE, d_model=96, n_heads=10, n_kv_heads=2, head_dim=24, d_ff=336, n_layers=4)
TARGETS = {"even": EVEN, "uneven": UNEVEN}


def shapes(cfg):
    return jax.eval_shape(partial(transformer.init, cfg), jax.random.key(0))["params"]


class Reference(torch.nn.Module):
    """One layer in torch with our leaves' names and shapes (out, in); heads folded into one axis."""

    def __init__(self, cfg):
        super().__init__()
        tied = cfg.tie_embeddings
        sizes = {"q": cfg.H * cfg.K, "k": cfg.G * cfg.K, "v": cfg.G * cfg.K}
        self.embed = torch.nn.Embedding(cfg.V, cfg.D)
        self.norm = torch.nn.LayerNorm(cfg.D)
        self.attn = torch.nn.ModuleDict({name: torch.nn.Linear(cfg.D, size) for name, size in sizes.items()})
        self.attn["o"] = torch.nn.Linear(cfg.H * cfg.K, cfg.D)
        self.attn["norm"] = torch.nn.LayerNorm(cfg.D)
        self.attn["q_norm"] = torch.nn.RMSNorm(cfg.K)
        self.mlp = torch.nn.ModuleDict({name: torch.nn.Linear(cfg.D, cfg.F) for name in ("gate", "up")})
        self.mlp["down"] = torch.nn.Linear(cfg.F, cfg.D)
        if tied:
            self.unembed = peer.MuSharedReadout(self.embed.weight, bias=False)
        else:
            self.unembed = peer.MuReadout(cfg.D, cfg.V, bias=False)


def reference(target, base):
    """The torch model with base shapes set; a third shape tells the package which dimensions may grow."""
    delta = dataclasses.replace(base, d_model=64, n_heads=6, n_kv_heads=3, d_ff=80, head_dim=32)
    model = Reference(target)
    peer.set_base_shapes(model, Reference(base), rescale_params=False, delta=Reference(delta))
    return model


def name_of(path):
    """layers/attn/q/kernel -> attn.q.weight"""
    return path.removeprefix("layers/").replace("/", ".").replace("kernel", "weight").replace("scale", "weight")


@pytest.mark.parametrize(("growth", "tied"), list(itertools.product(TARGETS, (False, True))))
def test_factors_equal_the_mup_package(growth, tied):
    target, base = (dataclasses.replace(cfg, tie_embeddings=tied) for cfg in (TARGETS[growth], BASE))
    model = reference(target, base)
    weights = dict(model.named_parameters())
    groups = {}
    for optimizer, make in (("adamw", peer.MuAdamW), ("sgd", peer.MuSGD)):
        for group in make(model.parameters(), lr=1.0, weight_decay=1.0).param_groups:
            groups |= {(optimizer, id(p)): (group["lr"], group["weight_decay"]) for p in group["params"]}
    adam, sgd = mup.plan(target, base), mup.plan(target, base, "sgd")
    assert adam.logits == pytest.approx(1 / model.unembed.width_mult(), rel=1e-12)
    compared = 0
    for path, rate in trees.leaves(adam.learning_rate).items():
        weight = weights.get(name_of(path))
        if weight is None:
            continue
        compared += 1
        theirs, decay = groups["adamw", id(weight)]
        assert rate == pytest.approx(theirs, rel=1e-12), path
        assert trees.leaves(sgd.learning_rate)[path] == pytest.approx(groups["sgd", id(weight)][0], rel=1e-12), path
        decayed = 1.0 if path.endswith("kernel") else 0.0
        assert trees.leaves(adam.weight_decay)[path] == pytest.approx(decayed * decay, rel=1e-12), path
        assert trees.leaves(adam.init_std)[path] == pytest.approx(init_factor(weight), rel=1e-12), path
    assert compared == 20 + (not tied)


def init_factor(weight):
    """What mup's own initialiser does to the deviation that it is asked for."""
    torch.manual_seed(0)
    plain = torch.nn.init.normal_(torch.empty(weight.shape, dtype=torch.float64), std=1.0)
    torch.manual_seed(0)
    weight.data = weight.data.double()
    peer.init.normal_(weight, std=1.0)
    return float((weight.data / plain).flatten()[0])


def test_every_factor_is_one_at_the_base_shape():
    for optimizer, alpha, exponent in itertools.product(mup.FAMILIES, (0, 0.5, 1), (0, 0.5, 1)):
        plan = mup.plan_tree(shapes(BASE), BASE, BASE, MupConfig(MupBase(), alpha, exponent), optimizer)
        for column in (plan.init_std, plan.learning_rate, plan.eps):
            assert set(jax.tree.leaves(column)) == {1.0}
        mask = axes.decay_mask(shapes(BASE))
        assert plan.weight_decay == plan.decay == jax.tree.map(float, mask)
        assert all(type(x) is float for x in jax.tree.leaves(plan.learning_rate))
        assert (plan.logits, plan.attention, plan.residual) == (1.0, 1.0, 1.0)
        assert mup.apply_to(BASE, plan) == BASE


def test_variables_and_updates_are_the_same_bits_at_the_base_shape():
    tree = {"embed": shapes(BASE)["embed"], "layers": {"mlp": {"down": shapes(BASE)["layers"]["mlp"]["down"]}}}
    start = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), tree)
    rescaled = mup.rescale(mup.Fresh(BASE, {"params": start}), BASE)["params"]
    assert all(a is b for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(rescaled), strict=True))
    results = []
    for plan in (None, mup.plan_tree(tree, BASE, BASE, MupConfig(depth_alpha=1.0))):
        tx = chain.make(OptimizerConfig(warmup=0.0), BASE, start, 10, plan)
        updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.sin, start), tx.init(start), start)
        results.append(trees.leaves(updates))
    for path, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][path], err_msg=path)


def test_each_leaf_has_its_own_ratio_when_growth_is_uneven():
    plan = mup.plan(UNEVEN, BASE, decay_exponent=0.5)
    layers = plan.learning_rate["layers"]
    assert layers["attn"]["q"]["kernel"] == pytest.approx(32 / 96, rel=1e-12)
    assert layers["attn"]["o"]["kernel"] == pytest.approx(32 / 240, rel=1e-12)
    assert layers["mlp"]["down"]["kernel"] == pytest.approx(48 / 336, rel=1e-12)
    decay = plan.weight_decay["layers"]
    assert decay["mlp"]["down"]["kernel"] == pytest.approx(math.sqrt(336 / 48), rel=1e-12)
    assert decay["mlp"]["down"]["bias"] == 0.0
    assert plan.logits == pytest.approx(1 / 3, rel=1e-12)
    assert set(jax.tree.leaves(plan.eps)) == {32 / 96}


def test_depth_and_head_width():
    target = dataclasses.replace(BASE, n_layers=8, head_dim=64)
    for alpha, block, eps, residual in ((0.0, 1, 1, 1), (0.5, 4**-0.5, 4**-0.5, 4**-0.5), (1.0, 1, 1 / 4, 1 / 4)):
        plan = mup.plan(target, BASE, depth_alpha=alpha)
        assert plan.residual == pytest.approx(residual, rel=1e-12)
        assert plan.attention == pytest.approx(0.5, rel=1e-12)
        assert plan.learning_rate["layers"]["attn"]["norm"]["scale"] == pytest.approx(block, rel=1e-12)
        assert plan.learning_rate["norm"]["scale"] == plan.learning_rate["embed"]["kernel"] == 1.0
        assert plan.eps["layers"]["mlp"]["up"]["kernel"] == pytest.approx(eps, rel=1e-12)
        assert plan.eps["unembed"]["kernel"] == 1.0
        assert plan.weight_decay["layers"]["mlp"]["up"]["kernel"] == 1.0
        assert plan.init_std["layers"]["mlp"]["down"]["kernel"] == 1.0


@pytest.mark.parametrize("optimizer", mup.FAMILIES)
def test_rate_times_decay_is_constant_over_width(optimizer):
    for width in (64, 128, 512):
        target = dataclasses.replace(BASE, d_model=width, n_heads=width // 16, n_kv_heads=width // 32, d_ff=3 * width)
        plan = mup.plan(target, BASE, optimizer)
        assert set(jax.tree.leaves(plan.decay)) == {0.0, 1.0}


def test_routers_experts_and_adapters():
    moe = MoEConfig(experts=4, top_k=2, d_ff=40, dense_layers=(0,))
    base = dataclasses.replace(BASE, moe=moe, mlp_bias=False, lora=LoraConfig())
    target = dataclasses.replace(base, d_model=64, n_heads=4, n_kv_heads=2, d_ff=144)
    tree = {"params": shapes(target), "lora": {"layers": {"attn": {"o": {"a": jnp.zeros((1, 64, 2)), "b": None}}}}}
    tree["lora"]["layers"]["attn"]["o"]["b"] = jnp.zeros((1, 2, 64))
    plan = mup.plan_tree(tree, target, base, MupConfig())
    sgd = mup.plan_tree(tree, target, base, MupConfig(), "sgd")
    experts, dense = plan.learning_rate["params"]["layers"]["mlp"], plan.learning_rate["params"]["dense_layers"]["mlp"]
    assert experts["up"]["kernel"] == 1 / 2 and experts["down"]["kernel"] == 1.0  # the experts did not grow
    assert dense["up"]["kernel"] == 1 / 2 and dense["down"]["kernel"] == pytest.approx(1 / 3)
    assert experts["router"]["kernel"] == 1 / 2
    assert plan.init_std["params"]["layers"]["mlp"]["router"]["kernel"] == 1 / 2
    assert sgd.learning_rate["params"]["layers"]["mlp"]["router"]["kernel"] == 1 / 2
    adapter = {part: getattr(plan, part)["lora"]["layers"]["attn"]["o"] for part in ("learning_rate", "weight_decay")}
    assert adapter == {"learning_rate": {"a": 1 / 2, "b": 1.0}, "weight_decay": {"a": 0.0, "b": 0.0}}


def test_muon_moves_features_alike_at_every_shape():
    """Its update has spectral norm 0.2 sqrt(max(in, out)); transfer wants sqrt(out / in)."""

    def moved(cfg, plan):
        rate = plan.learning_rate["layers"]["mlp"]
        up = rate["up"]["kernel"] * max(cfg.D, cfg.F) ** 0.5 / (cfg.F / cfg.D) ** 0.5
        return up, rate["down"]["kernel"] * max(cfg.D, cfg.F) ** 0.5 / (cfg.D / cfg.F) ** 0.5

    assert moved(UNEVEN, mup.plan(UNEVEN, BASE, "muon")) == pytest.approx(moved(BASE, mup.plan(BASE, BASE, "muon")))
    assert mup.plan(UNEVEN, BASE, "muon").learning_rate["norm"]["scale"] == 1.0


WIDE = ModelConfig(
    d_model=64, n_layers=2, n_heads=4, d_ff=128, vocab_size=512, tie_embeddings=False, qk_norm="head",
    moe=MoEConfig(experts=8, top_k=1), positions="learned", max_length=64,
)  # fmt: skip


def test_fresh_deviations_are_those_of_the_tables():
    """Of the standard parametrisation, and of muP: the base's value times the plan's factor."""
    cfg, base = WIDE, dataclasses.replace(WIDE, d_model=16, n_layers=1, d_ff=32)
    plan = mup.plan(cfg, base)
    drawn = jax.jit(lambda key: mup.draw(cfg, key).variables)(jax.random.key(0))
    rescaled = jax.jit(lambda v: mup.rescale(mup.Fresh(cfg, v), base))(drawn)
    for variables, source, factors in ((drawn, cfg, None), (rescaled, base, trees.leaves(plan.init_std))):
        for path, role in axes.roles(variables["params"]).items():
            wanted = axes.standard_std(source, path, role) * (factors[path] if factors else 1.0)
            found = float(jnp.std(trees.leaves(variables["params"])[path]))
            # A relative error of 1 / sqrt(2n): three of them.
            size = trees.leaves(variables["params"])[path].size
            assert found == pytest.approx(wanted, rel=3 / math.sqrt(2 * size), abs=1e-9), path
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    assert axes.standard_std(tied, "embed/kernel", axes.roles({"embed": {"kernel": 0}})["embed/kernel"]) == 0.02


def test_rescaling_happens_once():
    fresh = mup.Fresh(EVEN, {"params": {"unembed": {"kernel": jnp.ones((128, 40))}}})
    variables = mup.rescale(fresh, BASE)
    np.testing.assert_allclose(variables["params"]["unembed"]["kernel"], 2.0)
    for wrong in (variables, fresh.variables, variables["params"]):
        with pytest.raises(ValueError, match=r"mup\.rescale: .*rescaled already or come from a checkpoint"):
            mup.rescale(wrong, BASE)
    abstract = jax.eval_shape(partial(mup.init, EVEN, BASE), jax.random.key(0))
    assert abstract == jax.eval_shape(partial(transformer.init, EVEN), jax.random.key(0))


def test_small_embeddings_are_warned_about():
    tied = dataclasses.replace(EVEN, tie_embeddings=True)
    with pytest.warns(UserWarning, match=r"model\.tie_embeddings: true: muP transfers poorly"):
        mup.apply_to(tied, mup.plan(tied, dataclasses.replace(BASE, tie_embeddings=True)))
    with pytest.warns(UserWarning, match=r"model\.embed_std: 0\.02"):
        mup.apply_to(dataclasses.replace(EVEN, embed_std=0.02), mup.plan(EVEN, BASE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mup.apply_to(EVEN, mup.plan(EVEN, BASE)).logits_multiplier == 0.25


def test_unknown_names_and_base_of_a_model():
    with pytest.raises(ValueError, match="optimizer: 'adam' has no muP rule; the known ones are adamw"):
        mup.plan(EVEN, BASE, "adam")
    model = ModelConfig(d_model=256, n_heads=4, vocab_size=10)
    base = MupConfig(MupBase(d_model=64)).base_of(model)
    assert (base.D, base.K, base.F) == (64, 16, 192)
