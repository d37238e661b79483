"""Adapters by their properties: of no effect when fresh, the same merged or not, PEFT's counts, errors that help."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from jaxlm import tree as trees
from jaxlm.decode import generate
from jaxlm.decode.loop import unstack
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place, rules
from jaxlm.nn import transformer
from jaxlm.nn.adapters import resolved
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.nn.targets import modules, resolve
from jaxlm.optim import chain
from jaxlm.optim.config import LayerLrConfig, OptimizerConfig
from jaxlm.params import axes, mup
from jaxlm.params import lora as adapters
from jaxlm.params.config import MupConfig
from jaxlm.params.quantize import quantize

SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=32, max_length=32)
UNTIED = dataclasses.replace(SMALL, tie_embeddings=False)
GPT2 = dataclasses.replace(
    SMALL, norm="layernorm", positions="learned", gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, n_kv_heads=4
)
MOE = dataclasses.replace(UNTIED, moe=MoEConfig(experts=3, top_k=2, d_ff=12, dense_layers=(1,)))
PATTERNS = {"rank_pattern": {r"layers\.1\..*": 2, "o_proj": 5}, "alpha_pattern": {"q_proj": 3.0}}
CASES = {
    "all linear": (SMALL, {"r": 4}),
    "patterns, rslora": (UNTIED, {"r": 3, "rslora": True} | PATTERNS),
    "dora in some layers": (SMALL, {"r": 3, "dora": True, "targets": ["layers.1.self_attn.q_proj", "down_proj"]}),
    "fused, dora": (GPT2, {"r": 3, "dora": True}),
    "embedding and head of a tied model": (SMALL, {"r": 3, "targets": ["embed_tokens", "lm_head", "k"], "dora": True}),
    "whole modules": (SMALL, {"r": 2, "targets": ["q_proj"], "modules_to_save": ["embed_tokens", "layers.attn.norm"]}),
    "experts": (MOE, {"r": 2, "dora": True}),
    "experts, patterns": (MOE, {"r": 2, "rank_pattern": {r"experts\.2\.up_proj": 1}, "targets": ["up", "gate"]}),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
FAST = Compute(attention="reference", scan=False)
logits = functools.partial(transformer.logits, compute=FAST)


def model(cfg, lora, seed=0):
    """A base with every leaf random, and a fresh adapter."""
    key = jax.random.key(seed)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), transformer.init(cfg, key)["params"])
    cfg = dataclasses.replace(cfg, lora=LoraConfig(**lora))
    return cfg, params, adapters.init(cfg, jax.random.key(seed + 1), params)


def moved(cfg, tree, size=0.1):
    """The adapter after a step away from where it began; what has no gradient stays."""
    slots = resolve(cfg)

    def move(path, x):
        parent, _, name = path.rpartition("/")
        noise = size * jax.random.normal(jax.random.key(len(path)), x.shape)
        if parent not in slots or name == "magnitude":
            return x + noise
        used = np.arange(slots[parent].rank) < slots[parent].ranks[..., None]
        return x + noise * (used[..., None, :] if name == "a" else used[..., :, None])

    return trees.map_with_path(move, tree)


@pytest.mark.parametrize("case", CASES)
def test_nothing_at_first_and_the_same_merged(case):
    cfg, params, tree = model(*CASES[case])
    base = logits(dataclasses.replace(cfg, lora=None), {"params": params}, TOKENS)
    np.testing.assert_allclose(logits(cfg, {"params": params, "lora": tree}, TOKENS), base, atol=2e-6)
    tree = moved(cfg, tree)
    active = logits(cfg, {"params": params, "lora": tree}, TOKENS)
    assert np.abs(active - base).max() > 0.01
    merged = adapters.merge(cfg, params, tree)
    plain = logits(adapters.merged_config(cfg, merged), {"params": merged}, TOKENS)
    np.testing.assert_allclose(plain, active, atol=1e-5)
    untouched(cfg, params, merged, tree)


def untouched(cfg, params, merged, tree):
    """What is no target is the very array; layers that are none keep their bits."""
    slots, (_, found) = resolve(cfg), resolved(cfg, params, tree)
    touched = {*found, *(path.rpartition("/")[0] for path in trees.leaves(tree))}
    for path, leaf in trees.leaves(params).items():
        parent = path.rpartition("/")[0]
        if parent not in touched:
            assert trees.leaves(merged)[path] is leaf, path
        if parent in slots and path.endswith("kernel"):
            none = slots[parent].ranks == 0
            np.testing.assert_array_equal(np.asarray(leaf)[none], np.asarray(trees.leaves(merged)[path])[none])


def test_the_7b_case_has_pefts_count():
    cfg = ModelConfig(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336, vocab_size=32000, tie_embeddings=False,
        family="mistral", lora=LoraConfig(r=16),
    )  # fmt: skip
    params = jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))["params"]
    tree = jax.eval_shape(lambda key: adapters.init(cfg, key, params), jax.random.key(0))
    assert adapters.count(cfg, tree) == trees.count(tree) == 41_943_040
    attention = dataclasses.replace(cfg, lora=LoraConfig(r=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")))
    tree = jax.eval_shape(lambda key: adapters.init(attention, key, params), jax.random.key(0))
    assert adapters.count(attention, tree) == 13_631_488


def test_what_is_beyond_a_rank_stays_zero_and_is_not_counted():
    """A smaller rank within a stacked leaf is padding: no gradient, no update, no count."""
    cfg, params, tree = model(UNTIED, {"r": 4, "targets": ["q_proj", "up_proj"], "rank_pattern": {"1.self.*": 2}})
    slots = resolve(cfg)
    assert slots["layers/attn/q"].ranks.tolist() == [4, 2]
    assert adapters.count(cfg, tree) == (4 + 2) * (16 + 16) + 2 * 4 * (16 + 24) < trees.count(tree)
    assert adapters.trained(cfg, {"lora": tree, "value": {"bias": jnp.zeros(3)}}) == adapters.count(cfg, tree) + 3
    tx = optax.adamw(0.1, weight_decay=0.1)

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return jnp.sum(jnp.square(logits(cfg, {"params": params, "lora": tree}, TOKENS)))

        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for _ in range(3):
        tree, state = step(tree, state)
    q = tree["layers"]["attn"]["q"]
    assert not q["a"][1, :, 2:].any() and not q["b"][1, 2:].any()
    assert np.all(np.asarray(q["a"][1, :, :2])) and np.all(np.asarray(q["b"][0]))


def test_fresh_adapters_are_pefts():
    cfg, _, tree = model(UNTIED, {"r": 8, "targets": ["q_proj", "down_proj", "embed_tokens"]})
    down = tree["layers"]["mlp"]["down"]
    assert 0.9 * 24**-0.5 < np.abs(down["a"]).max() <= 24**-0.5 and not down["b"].any()
    assert not tree["embed"]["a"].any() and 0.8 < tree["embed"]["b"].std() < 1.2
    again = adapters.init(cfg, jax.random.key(1), model(UNTIED, {})[1])
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_pissa_takes_the_largest_components_out_of_the_base():
    lora = {"r": 3, "targets": ["v_proj", "up_proj"], "init": "pissa", "alpha": 6.0, "dora": True}
    cfg, params, tree = model(UNTIED, lora)
    rest = adapters.residual(cfg, params, tree)
    active = logits(cfg, {"params": rest, "lora": tree}, TOKENS)
    np.testing.assert_allclose(active, logits(UNTIED, {"params": params}, TOKENS), atol=1e-5)
    kernel, left = params["layers"]["mlp"]["up"]["kernel"][1], rest["layers"]["mlp"]["up"]["kernel"][1]
    values = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(left, compute_uv=False)[: len(values) - 3], values[3:], atol=1e-5)
    with pytest.raises(ValueError, match=r"lora\.init: pissa"):
        adapters.residual(cfg, quantize(params, "int8"), tree)


WRONG = {
    "misspelt": ({"targets": ["q_prj"]}, r"lora\.targets: 'q_prj' is no module.*did you mean q_proj"),
    "of another family": ({"targets": ["c_attn"]}, r"lora\.targets: 'c_attn' is no module .*known are .*q_proj"),
    "no target": ({"targets": []}, r"lora\.targets: no module is adapted"),
    "idle pattern": (
        {"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}},
        r"lora\.rank_pattern: 'k_proj' matches no",
    ),
    "idle scale": ({"alpha_pattern": {"layers.9.*": 2.0}}, r"lora\.alpha_pattern: 'layers.9"),
    "no such part": ({"modules_to_save": ["lm_haed"]}, r"lora\.modules_to_save: 'lm_haed'.*did you mean lm_head"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_change_nothing_are_refused(case):
    lora, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        model(SMALL, lora)


def test_adapters_need_their_settings():
    cfg, params, tree = model(SMALL, {"targets": ["q_proj"]})
    with pytest.raises(ValueError, match="the configuration has none"):
        logits(SMALL, {"params": params, "lora": tree}, TOKENS)
    other = dataclasses.replace(cfg, lora=LoraConfig(targets=("k_proj",)))
    with pytest.raises(ValueError, match=r"layers/attn/q, which lora\.targets does not name"):
        logits(other, {"params": params, "lora": tree}, TOKENS)


def test_rows_of_a_batch_have_adapters_of_their_own():
    settings = [{"r": 2, "targets": ["q_proj", "embed_tokens"], "alpha": 5.0}, {"r": 4, "rslora": True} | PATTERNS]
    found = [model(UNTIED, lora, seed=0) for lora in settings]
    params = found[0][1]
    singles = [(cfg.lora, moved(cfg, tree)) for cfg, _, tree in found]
    cfg, tree = adapters.stack(UNTIED, [singles[0], None, singles[1]])
    rows = [2, 0, 1, 2]
    batch = jnp.concatenate([TOKENS, TOKENS[::-1]])
    run = jax.jit(transformer.apply, static_argnames=("cfg", "compute"))
    variables = {"params": params, "lora": tree}
    hidden = run(cfg, variables, batch, adapters=rows, compute=FAST).hidden
    for row, which in enumerate(rows):
        alone = {"params": params}
        single = UNTIED
        if which != 1:
            lora, own = singles[which // 2]
            single, alone = dataclasses.replace(UNTIED, lora=lora), alone | {"lora": own}
        wanted = run(single, alone, batch, compute=FAST).hidden[row]
        np.testing.assert_allclose(hidden[row], wanted, atol=1e-5)
    cfg, _, dora = model(UNTIED, {"dora": True, "targets": ["q_proj"]})
    with pytest.raises(ValueError, match="cannot differ from row to row"):
        adapters.stack(UNTIED, [(cfg.lora, dora)])


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        (SMALL, {"dora": True, "targets": ["q_proj", "layers.1.mlp.down_proj"]}),
        (MOE, {"targets": ["model.layers.1.mlp.up_proj"]}),
        (dataclasses.replace(SMALL, family="phi3"), {"targets": ["qkv_proj", "lm_head"]}),
    ],
    ids=["some layers", "the dense layer of a mixture", "a fused module"],
)
def test_decoding_uses_the_adapter(base, lora):
    cfg, params, tree = model(base, lora)
    tree = moved(cfg, tree, 1.0)
    prompt = np.asarray(TOKENS[0, :5]).tolist()
    variables = {"params": params, "lora": tree}
    ids = generate(cfg, variables, [prompt], max_new_tokens=3)[0]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert "lora" in unstack(cfg, {"params": half, "lora": tree})  # kept apart where merging would round it away
    merged = adapters.merge(cfg, params, tree)
    assert ids == generate(adapters.merged_config(cfg, merged), {"params": merged}, [prompt], max_new_tokens=3)[0]
    tokens = jnp.asarray([prompt + ids[:-1]])
    scores = logits(cfg, variables, tokens)[0, len(prompt) - 1 :]
    assert np.argmax(scores, axis=-1).tolist() == ids


def test_dropout_is_the_adapters_alone():
    cfg, params, tree = model(SMALL, {"dropout": 0.5, "targets": ["q_proj", "down_proj"]})

    def run(tree, key):
        return transformer.apply(cfg, {"params": params, "lora": tree}, TOKENS, key=key, compute=FAST).hidden

    still, key = run(tree, None), jax.random.key(0)
    np.testing.assert_array_equal(run(tree, key), still)
    tree = moved(cfg, tree)
    first, second = run(tree, key), run(tree, jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(run(tree, key), first)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_adapted_and_merged_as_what_it_stands_for(kind):
    cfg, params, tree = model(UNTIED, {"r": 2, "dora": True})
    quantised = quantize(params, kind)
    fresh = adapters.init(cfg, jax.random.key(1), quantised)
    base = logits(UNTIED, {"params": quantised}, TOKENS)
    np.testing.assert_allclose(logits(cfg, {"params": quantised, "lora": fresh}, TOKENS), base, atol=1e-5)
    tree = moved(cfg, fresh)
    merged = adapters.merge(cfg, quantised, tree)
    active = logits(cfg, {"params": quantised, "lora": tree}, TOKENS)
    np.testing.assert_allclose(logits(UNTIED, {"params": merged}, TOKENS), active, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_has_its_place_and_part(case):
    """Sharding rules, roles, layer ids, decay and muP know every adapter."""
    cfg, _, tree = model(*CASES[case])
    mesh = AbstractMesh((1, 2, 2, 1, 1), ("data", "fsdp", "tensor", "expert", "context"))
    values = trees.apply_rules(rules.RULES, {"lora": tree}, name="sharding rules")
    for path, leaf in trees.leaves({"lora": tree}).items():
        axes_ = functools.reduce(lambda node, part: node[part], path.split("/"), values)
        assert len(rules.spec(path, leaf.shape, axes_, dict(mesh.shape))) == leaf.ndim
    roles = axes.roles({"lora": tree})
    factors = [role for path, role in roles.items() if path.rpartition("/")[2] in ("a", "b", "magnitude")]
    assert factors and not any(role.decayed for role in factors)
    wide = dataclasses.replace(cfg, d_model=32, n_heads=8, n_kv_heads=8 if cfg.norm == "layernorm" else 4, d_ff=48)
    plan = mup.plan_tree(tree, wide, cfg, MupConfig())
    assert list(trees.leaves(plan.learning_rate)) == list(trees.leaves(tree))
    ids = trees.leaves(axes.layer_ids(tree, cfg))
    assert all(np.size(ids[path]) in (1, leaf.shape[0]) for path, leaf in trees.leaves(tree).items())


def test_b_learns_faster_with_a_ratio():
    cfg, _, tree = model(SMALL, {"r": 2, "targets": ["q_proj"], "plus_ratio": 16.0, "modules_to_save": ["norm"]})
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, weight_decay=0.0, clip=None, schedule="constant", warmup=0.0,
        layer_lr=LayerLrConfig(rate=0.5),
    )  # fmt: skip
    ones = jax.tree.map(jnp.ones_like, tree)
    tx = chain.make(config, cfg, tree, 10)
    updates, _ = tx.update(ones, tx.init(tree), tree)
    q = updates["layers"]["attn"]["q"]
    assert q["a"][:, 0, 0].tolist() == [-(0.5**2), -0.5]
    np.testing.assert_allclose(q["b"][:, 0, 0], 16.0 * q["a"][:, 0, 0])
    assert updates["norm"]["scale"][0] == -1.0


def test_names_of_modules_are_those_of_the_families_files():
    from jaxlm.interop import hf, names

    for family in hf.FAMILIES.values():
        cfg = {"gpt2": GPT2, "mixtral": MOE, "qwen3_moe": MOE, "olmoe": MOE}.get(family.model_type, SMALL)
        if cfg is MOE:
            cfg = dataclasses.replace(cfg, moe=dataclasses.replace(MOE.moe, dense_layers=()))
        cfg = dataclasses.replace(cfg, family=family.model_type, lora=None)
        table = family.table(cfg)
        layer = table.sparse if cfg.moe else table.dense
        rows = {row.theirs for row in layer if row.ours[0].endswith("kernel")}
        theirs = {table.layer.format(i=0) + name.format(e=0) for name in rows}
        ours = {m.name for m in modules(cfg) if m.index and m.index[0] == 0 and m.index[1:] in ((), (0,))}
        assert {name.removesuffix(".weight") for name in theirs} == ours, family.model_type
        assert names.abstract(cfg)


def test_scanned_and_spread_over_devices_it_is_the_same():
    """Weight-decomposed adapters of two ranks in all projections, embedding and head: value and gradients."""
    targets = ["q", "k", "v", "o", "gate", "up", "down", "embed_tokens", "lm_head"]
    lora = {"r": 4, "dora": True, "targets": targets, "rank_pattern": {r"layers\.1\..*": 2}}
    cfg, params, tree = model(UNTIED, lora)
    tree = moved(cfg, tree)
    batch = jnp.concatenate([TOKENS, TOKENS[::-1]])

    def loss(tree, params, compute):
        return jnp.mean(jnp.sin(transformer.logits(cfg, {"params": params, "lora": tree}, batch, compute=compute)))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    wanted = run(tree, params, FAST)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, run(tree, params, dataclasses.replace(FAST, scan=True, remat="full")), wanted)
    mesh = meshes.make(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
    spread = [place.put(x, rules.shardings(x, mesh)) for x in (tree, params)]
    with jax.set_mesh(mesh):
        jax.tree.map(close, run(*spread, dataclasses.replace(FAST, constrain=place.constrain(mesh), mesh=mesh)), wanted)
