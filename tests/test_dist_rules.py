"""The sharding table: it covers every tree, cuts what it should, names what it cannot, and states follow parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import tree as trees
from jaxlm.dist import mesh as meshes
from jaxlm.dist import place, rules
from jaxlm.dist.mesh import MeshConfig
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=24, max_length=8)
MESH = MeshConfig(data=1, fsdp=2, tensor=2, expert=2)


def shapes(**fields):
    return jax.eval_shape(lambda: transformer.init(dataclasses.replace(CFG, **fields), jax.random.key(0)))["params"]


def lora(params, rank=2):
    """An adapter tree beside every kernel of the layers, by shape."""
    made: dict = {}
    for path, leaf in trees.leaves(params["layers"]).items():
        *module, last = path.split("/")
        if last == "kernel" and "router" not in module:
            node = made
            for part in module:
                node = node.setdefault(part, {})
            lead = leaf.shape[:-2]
            node["a"] = jax.ShapeDtypeStruct((*lead, leaf.shape[-2], rank), jnp.float32)
            node["b"] = jax.ShapeDtypeStruct((*lead, rank, leaf.shape[-1]), jnp.float32)
    return {"layers": made}


def specs(tree, config=MESH, **kwargs):
    placed = rules.shardings(tree, meshes.make(config), **kwargs)
    return {path: sharding.spec for path, sharding in trees.leaves(placed).items()}


VARIANTS = {
    "llama": {},
    "gpt2": {
        "norm": "layernorm", "positions": "learned", "qkv_bias": True, "o_bias": True, "mlp_bias": True, "gated": False,
    },
    "gemma": {"norm_placement": "both", "qk_norm": "head", "tie_embeddings": False},
    "olmo": {"norm_placement": "post", "qk_norm": "projection"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_leaf_of_every_architecture_is_covered(variant):
    params = shapes(**VARIANTS[variant])
    tree = {"params": params, "lora": lora(params)}
    found = specs(tree)
    assert all(len(found[path]) == leaf.ndim for path, leaf in trees.leaves(tree).items())
    kernels = [path for path in found if path.endswith(("kernel", "/a", "/b"))]
    assert all(any(found[path]) for path in kernels), "a matrix that no axis cuts"


def test_projections_are_cut_as_megatron_and_fsdp_say():
    found = specs(shapes(qkv_bias=True, tie_embeddings=False))
    assert found["embed/kernel"] == P("tensor", "fsdp")
    assert found["unembed/kernel"] == P("fsdp", "tensor")
    for name in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
        assert found[f"layers/{name}/kernel"] == P(None, "fsdp", "tensor")
    for name in ("attn/o", "mlp/down"):
        assert found[f"layers/{name}/kernel"] == P(None, "tensor", "fsdp")
    assert found["layers/attn/q/bias"] == P(None, "tensor")
    assert found["layers/attn/norm/scale"] == P(None, None)


EXPERTS = {
    "layers": {
        "mlp": {
            "router": {"kernel": jnp.zeros((2, 16, 4))},
            "gate": {"kernel": jnp.zeros((2, 4, 16, 32))},
            "up": {"kernel": jnp.zeros((2, 4, 16, 32))},
            "down": {"kernel": jnp.zeros((2, 4, 32, 16))},
        }
    }
}


def test_experts_are_spread_whether_layers_are_stacked_or_not():
    found = specs(EXPERTS)
    assert found["layers/mlp/gate/kernel"] == P(None, "expert", "fsdp", "tensor")
    assert found["layers/mlp/down/kernel"] == P(None, "expert", "tensor", "fsdp")
    assert found["layers/mlp/router/kernel"] == P(None, "fsdp", None)
    single = specs({"layers": tuple(trees.unstack(EXPERTS["layers"]))})
    assert single["layers/1/mlp/gate/kernel"] == P("expert", "fsdp", "tensor")
    dense_layers = specs({"dense_layers": {"mlp": {"up": {"kernel": jnp.zeros((3, 16, 32))}}}})
    assert dense_layers == {"dense_layers/mlp/up/kernel": P(None, "fsdp", "tensor")}


def test_adapters_take_the_cut_of_the_kernel_beside_them():
    params = shapes() | {"layers": shapes()["layers"] | {"mlp": EXPERTS["layers"]["mlp"]}}
    kernels, adapters = specs(params), specs({"lora": lora(params)})
    for path, spec in adapters.items():
        kernel = kernels[path.removeprefix("lora/").rpartition("/")[0] + "/kernel"]
        *lead, rows, columns = kernel
        expected = P(*lead, rows, None) if path.endswith("/a") else P(*lead, None, columns)
        assert spec == expected, path


@pytest.mark.parametrize(
    ("tree", "table", "words"),
    [
        ({"foo": {"kernel": (4, 4)}}, rules.RULES, ["foo/kernel", "no rule"]),
        ({"layers": {"attn": {"q": {"kernel": (2, 15, 4)}}}}, rules.RULES,
         ["layers/attn/q/kernel", "dimension 1", "15", "mesh.fsdp 2"]),
        ({"w": (4, 4)}, [("w", ("model", None))], ["w", "'model'", "tensor"]),
        ({"w": (4, 4)}, [("w", ("fsdp", "fsdp"))], ["w", "'fsdp'", "twice"]),
        ({"w": (4, 6)}, [("w", (None, ("fsdp", "tensor")))], ["w", "6", "mesh.fsdp 2 x mesh.tensor 2"]),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_named(tree, table, words):
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError) as error:
        specs(tree, rules=table)
    assert all(word in str(error.value) for word in words), error.value


def label(params):
    return trees.map_with_path(lambda path, _: "a" if "attn" in path else "b", params)


def sam_like(inner):
    """A wrapper that keeps a perturbation of the parameters beside the inner state."""

    def init(params):
        return {"inner": inner.init(params), "perturbation": jax.tree.map(jnp.zeros_like, params)}

    return optax.GradientTransformationExtraArgs(init, inner.update)


OPTIMIZERS = {
    "adamw": (optax.adamw(1e-3), 2),
    "lion": (optax.lion(1e-3), 1),
    "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=4, momentum=0.9), 1),
    "muon": (optax.contrib.muon(1e-3), 1),
    "partition": (optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)}, label), 1),
    "masked": (optax.chain(optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))), 1),
    "multi_steps": (optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(), 3),
    "sam": (sam_like(optax.adamw(1e-3)), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_spread_as_their_parameters(name):
    tx, copies = OPTIMIZERS[name]
    mesh = meshes.make(MeshConfig(fsdp=4, tensor=2))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes())
    params = place.put(params, rules.shardings(params, mesh))
    state = place.build(tx.init, params, mesh=mesh, params=params)
    placed = trees.leaves(rules.shardings(params, mesh))
    counted = 0
    for path, leaf in trees.leaves(state).items():
        owner = next((p for p in sorted(placed, key=len, reverse=True) if f"/{path}".endswith(f"/{p}")), None)
        if owner is not None and leaf.shape == trees.leaves(params)[owner].shape:
            assert leaf.sharding == placed[owner], path
            counted += owner == "layers/attn/q/kernel"
        else:
            assert leaf.sharding.is_fully_replicated, path
    assert counted >= copies
    kernel = params["layers"]["attn"]["q"]["kernel"]
    moments = [leaf for path, leaf in trees.leaves(state).items() if path.endswith("attn/q/kernel")]
    moments = [leaf for leaf in moments if leaf.shape == kernel.shape]
    assert all(leaf.addressable_shards[0].data.size * 8 == kernel.size for leaf in moments)


def test_a_built_tree_equals_the_same_tree_on_one_device():
    mesh = meshes.make(MeshConfig(fsdp=4, tensor=2))
    key = jax.random.key(3)
    spread = place.build(lambda k: transformer.init(CFG, k), key, mesh=mesh)
    single = jax.jit(lambda k: transformer.init(CFG, k))(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), place.gather(spread), single)
