"""Quantised kernels: bitsandbytes' numbers to the bit, models that compute with them, and what they cost in memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxlm
from jaxlm import config as configs
from jaxlm import tree
from jaxlm.dist import collectives, place, rules
from jaxlm.dist import mesh as meshes
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import LoraConfig, ModelConfig, MoEConfig
from jaxlm.nn.kernels.matmul import matmul
from jaxlm.nn.qtensor import (
    INT8_STEP,
    KINDS,
    NF4,
    QTensor,
    dequantise,
    dequantise_rows,
    dynamic_map,
    is_qtensor,
    outline,
    scales_of,
)
from jaxlm.params import lora
from jaxlm.params.quantize import (
    dequantize,
    is_projection,
    merged_with_gap,
    quantize,
    quantize_kernel,
    refuse_quantised,
)
from jaxlm.params.summation import torch_sum
from jaxlm.training import checkpoint, plan, setup

functional = pytest.importorskip("bitsandbytes.functional")

DENSE = ModelConfig(d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=96, vocab_size=32)
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig(experts=4, top_k=2, d_ff=64, balance="none"))
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8)).astype(np.int32)


def params_of(cfg):
    return jaxlm.init(cfg, jax.random.key(0))["params"]


# --- the numbers, against bitsandbytes -------------------------------------------------------------------------------

SHAPES = [(128, 128), (96, 320), (48, 40), (33, 7), (3, 64), (640, 1024)]


def weight(shape, seed=0, dtype="float32"):
    """A torch weight [out, in] with a row of zeros and rows of very different size."""
    rng = np.random.default_rng(seed)
    w = 0.02 * rng.standard_normal(shape, "float32") * rng.lognormal(0, 1, (shape[0], 1)).astype("float32")
    w[shape[0] // 2] = 0
    return torch.from_numpy(w).to(getattr(torch, dtype))


def ours(w, kind):
    return quantize_kernel(jnp.asarray(w.float().numpy().T).astype(str(w.dtype).removeprefix("torch.")), kind)


def flat(x):
    return np.ravel(np.asarray(x))


def test_tables_are_bitsandbytes_own():
    np.testing.assert_array_equal(dynamic_map(), functional.create_dynamic_map().numpy())
    np.testing.assert_array_equal(np.array(NF4, np.float32), functional.get_4bit_type("nf4", "cpu").numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    w = weight(shape, dtype=dtype)
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    q = ours(w, "nf4")
    np.testing.assert_array_equal(flat(q.codes), flat(codes))
    np.testing.assert_array_equal(flat(q.absmax), flat(state.absmax))
    # The peer's own dequantisation is wrong on some processors where blocks run over the ends of rows.
    indices = np.stack([flat(codes) >> 4, flat(codes) & 15], -1).reshape(-1)[: w.numel()]
    values = np.array(NF4, np.float32)[indices] * np.repeat(state.absmax.numpy(), 64)[: w.numel()]
    expected = torch.from_numpy(values.reshape(shape)).to(w.dtype).float().numpy()
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantise_rows)(q).astype("float32")), expected)
    if shape[1] % 64 == 0:
        np.testing.assert_array_equal(expected, functional.dequantize_4bit(codes, state).float().numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantisation_is_that_of_bitsandbytes(shape):
    w = weight(shape, seed=1)
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    q = ours(w, "nf4-double")
    np.testing.assert_array_equal(flat(q.codes), flat(codes))
    theirs = dataclasses.replace(
        q,
        absmax=jnp.asarray(state.absmax.numpy().reshape(q.absmax.shape)),
        nested=jnp.asarray(state.state2.absmax.numpy()),
        offset=jnp.float32(state.offset.item()),
    )
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        jax.tree.map(np.testing.assert_array_equal, q, theirs)
    np.testing.assert_allclose(float(q.offset), float(state.offset), rtol=3e-7)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    np.testing.assert_array_equal(flat(jax.jit(scales_of)(theirs)), flat(absmax))
    if shape[1] % 64 == 0:
        values = jax.jit(dequantise_rows)(theirs)
        np.testing.assert_array_equal(values, functional.dequantize_4bit(codes, state).numpy())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch adds in another order"
)
@pytest.mark.parametrize("size", [1, 5, 48, 777, 20000, 32768])
def test_sum_in_the_order_of_torch(size):
    x = np.random.default_rng(size).lognormal(0, 2, size).astype(np.float32)
    assert float(torch_sum(jnp.asarray(x))) == float(torch.from_numpy(x).sum())


def test_long_sum():
    x = np.random.default_rng(0).lognormal(0, 2, 200_003).astype(np.float32)
    np.testing.assert_allclose(float(jax.jit(torch_sum)(x)), x.astype(np.float64).sum(), rtol=1e-6)


def test_scales_of_scales_are_rounded_on_bitsandbytes_grid():
    """The whole range, so that every boundary between 8-bit numbers is crossed."""
    absmax = np.abs(np.random.default_rng(2).standard_normal(256 * 64)).astype(np.float32)
    w = np.zeros((absmax.size, 64), np.float32)
    w[:, 5] = absmax
    q = quantize_kernel(jnp.asarray(w.T), "nf4-double")
    codes, state = functional.quantize_blockwise(torch.from_numpy(absmax) - float(q.offset), blocksize=256)
    np.testing.assert_array_equal(flat(q.absmax), flat(codes))
    np.testing.assert_array_equal(flat(q.nested), flat(state.absmax))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_that_of_bitsandbytes(shape):
    w = weight(shape, seed=3)
    codes, scales, _ = functional.int8_vectorwise_quant(w.clone())
    q = ours(w, "int8")
    peer = codes.numpy()
    peer[shape[0] // 2] = 0  # it divides zero by zero there
    np.testing.assert_array_equal(np.asarray(q.codes), peer)
    np.testing.assert_array_equal(flat(q.absmax), flat(scales))
    values = functional.int8_vectorwise_dequant(torch.from_numpy(peer), scales)
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantise_rows)(q)), values.numpy())
    assert np.float32(INT8_STEP) == np.float32(1 / 127)


def test_error_of_normal_weights():
    """Relative root mean square errors that the literature and the peer have for Gaussian weights."""
    w = jax.random.normal(jax.random.key(0), (512, 512))
    for kind, largest in {"nf4": 0.0930, "nf4-double": 0.0931, "int8": 0.0078}.items():
        error = dequantise(quantize_kernel(w, kind)) - w
        assert 0.9 * largest < float(jnp.sqrt(jnp.mean(error**2))) < largest, kind


# --- in the model ----------------------------------------------------------------------------------------------------


def test_what_is_quantised_and_what_is_refused():
    params = params_of(SPARSE)
    quantised = quantize(params, "nf4")
    found = tree.leaves(quantised, is_leaf=is_qtensor)
    assert {path for path, leaf in found.items() if is_qtensor(leaf)} == {
        *(f"layers/attn/{name}/kernel" for name in "qkvo"), *(f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")),
    }  # fmt: skip
    assert jax.tree.structure(dequantize(quantised)) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, dequantize(quantised)) == jax.tree.map(jnp.shape, params)
    shapes = jax.eval_shape(lambda p: quantize(p, "nf4"), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(quantised)
    for path, leaf in tree.leaves(quantised).items():
        assert (leaf.shape, leaf.dtype) == (tree.leaves(shapes)[path].shape, tree.leaves(shapes)[path].dtype), path
    assert tree.count(outline(quantised)) == tree.count(params)
    with pytest.raises(ValueError, match="'nf3' is unknown; the known ones are nf4, nf4-double, int8"):
        quantize(params, "nf3")
    with pytest.raises(ValueError, match="layers/attn/k/kernel: quantised already, as nf4"):
        quantize(quantised, "nf4")
    with pytest.raises(ValueError, match="no projection of a layer among norm/scale"):
        quantize({"norm": params["norm"]}, "nf4")


def trained(cfg, params, adapters, compute):
    """Value and gradients by adapter and embedding, which lie before and beside the quantised weights."""

    def value(free, params):
        whole = {"params": {**params, "embed": free["embed"]}, "lora": free["lora"]}
        return jnp.sum(jnp.sin(transformer.apply(cfg, whole, TOKENS, compute=compute).hidden))

    return jax.jit(jax.value_and_grad(value))({"embed": params["embed"], "lora": adapters}, params)


@pytest.mark.parametrize(
    ("cfg", "kind", "compute"),
    [
        (DENSE, "nf4", Compute(remat="full")),
        (DENSE, "nf4-double", Compute(remat="dots", scan=False)),
        (DENSE, "int8", Compute()),
        (SPARSE, "nf4", Compute(remat="block")),
    ],
    ids=["nf4", "double", "int8", "experts"],
)
def test_model_and_gradients_are_those_of_the_dequantised_weights(cfg, kind, compute):
    cfg = dataclasses.replace(cfg, lora=LoraConfig(r=2, targets=("q_proj", "o_proj")))
    quantised = quantize(params_of(cfg), kind)
    plain = dequantize(quantised)
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(cfg, jax.random.key(1), plain))
    value, gradients = trained(cfg, quantised, adapters, compute)
    expected, wanted = trained(cfg, plain, adapters, compute)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * jnp.max(jnp.abs(b))), gradients, wanted
    )


def test_generation_takes_quantised_weights():
    quantised = quantize(params_of(DENSE), "nf4-double")
    prompts = [[1, 2, 3]]
    ids = jaxlm.generate(DENSE, {"params": quantised}, prompts, max_new_tokens=4)
    assert ids == jaxlm.generate(DENSE, {"params": dequantize(quantised)}, prompts, max_new_tokens=4)


def test_product_with_a_quantised_kernel():
    """One row of low precision too, which takes another path on CPU."""
    q = quantize_kernel(jax.random.normal(jax.random.key(0), (64, 16)), "nf4")
    w = dequantise(q, "bfloat16")
    for rows in (1, 3):
        x = jax.random.normal(jax.random.key(1), (rows, 64)).astype("bfloat16")
        for backend in ("own", "reference"):
            y, back = jax.vjp(lambda x: matmul(x, q, backend=backend), x)  # noqa: B023
            expected, wanted = jax.vjp(lambda x: matmul(x, w), x)
            np.testing.assert_array_equal(np.float32(y), np.float32(expected))
            np.testing.assert_allclose(np.float32(back(y)[0]), np.float32(wanted(y)[0]), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="a quantised w cannot be transposed"):
        matmul(jnp.ones((1, 16)), q, transposed=True)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "data": 2}, {"tensor": 2, "fsdp": 2, "data": 2}], ids=str)
def test_sharded_is_single(sizes):
    quantised = quantize(params_of(DENSE), "nf4-double")
    mesh = meshes.make(meshes.MeshConfig(**sizes))
    placed = place.put(quantised, rules.shardings(quantised, mesh))
    attn = placed["layers"]["attn"]
    assert attn["q"]["kernel"].codes.addressable_shards[0].data.size < attn["q"]["kernel"].codes.size
    tokens = np.tile(TOKENS, (4, 1))

    def value(embed, params, compute):
        output = transformer.apply(DENSE, {"params": {**params, "embed": embed}}, tokens, compute=compute)
        return jnp.sum(jnp.sin(output.hidden))

    run = jax.jit(jax.value_and_grad(value), static_argnums=2)
    expected, wanted = run(quantised["embed"], quantised, Compute())
    with jax.set_mesh(mesh):
        compiled = run.lower(placed["embed"], placed, Compute(constrain=place.constrain(mesh), mesh=mesh)).compile()
        got, gradient = compiled(placed["embed"], placed)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient["kernel"], wanted["kernel"], rtol=1e-3, atol=1e-4)
    # Codes and scales travel, once forward and once backward, not the values that they stand for.
    packed = sum(leaf.nbytes for leaf in jax.tree.leaves(quantised["layers"]))
    plain = 4 * tree.count(outline(quantised["layers"]))
    assert collectives.totals(compiled.as_text())["all-gather"].bytes < 2 * packed + plain // 4


def test_experts_are_spread_and_odd_parts_are_whole():
    mesh = meshes.make(meshes.MeshConfig(expert=2, tensor=2, fsdp=2))
    quantised = jax.eval_shape(lambda: quantize(params_of(dataclasses.replace(SPARSE, d_ff=96)), "nf4"))
    specs = {path: tuple(s.spec) for path, s in tree.leaves(rules.shardings(quantised, mesh)).items()}
    assert specs["layers/mlp/up/kernel/codes"] == (None, "expert", "tensor", "fsdp")
    assert specs["layers/mlp/up/kernel/absmax"] == (None, "expert", "tensor", None)
    assert specs["layers/attn/o/kernel/codes"] == (None, "fsdp", "tensor")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_holds_quantised_weights(kind, tmp_path):
    state = {"params": {"layers": {"mlp": {"up": {"kernel": quantize_kernel(jnp.ones((2, 64, 8)) * 0.1, kind)}}}}}
    saved = checkpoint.Checkpoints(tmp_path, print)
    saved.save(1, state, {})
    saved.close()
    again = checkpoint.Checkpoints(tmp_path, print)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = again.restore(abstract, lambda _: None)
    again.close()
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found.state, state)


def test_an_adapter_is_merged_into_the_dequantised_weights():
    cfg = dataclasses.replace(DENSE, lora=LoraConfig(r=2, targets=("q_proj", "down_proj")))
    params = params_of(cfg)
    quantised = quantize(params, "nf4")
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(cfg, jax.random.key(1), params))
    whole, variables, gap = merged_with_gap(cfg, {"params": quantised, "lora": adapters})
    assert whole.lora is None and not any(map(is_qtensor, jax.tree.leaves(variables, is_leaf=is_qtensor)))
    expected = dequantize(quantised)["layers"]["attn"]
    np.testing.assert_array_equal(variables["params"]["layers"]["attn"]["v"]["kernel"], expected["v"]["kernel"])
    assert jnp.any(variables["params"]["layers"]["attn"]["q"]["kernel"] != expected["q"]["kernel"])
    assert float(re.search(r"move by (\S+) at most", gap)[1]) < 1e-3
    with pytest.raises(ValueError, match="here: quantised as nf4, so it cannot be trained; set lora"):
        refuse_quantised(quantised, "here")
    refuse_quantised(params, "here")


# --- memory ----------------------------------------------------------------------------------------------------------

MISTRAL_7B = {
    "model": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336, "vocab_size": 32000,
              "tie_embeddings": False},
    "data": {"sequence_length": 512},
    "train": {"batch_size": 8, "accumulation": 2, "remat": "full", "dtype": "bfloat16"},
    "optimizer": {"name": "adamw8bit", "learning_rate": 2.0e-4},
    "lora": {"r": 16, "alpha": 16},
    "quantize": "nf4",
}  # fmt: skip


def test_quantised_7b_trains_adapters_in_16_gigabytes():
    config = configs.build(MISTRAL_7B)
    program = setup.assemble(config, config.architecture(32000), meshes.make(config.mesh, jax.devices()[:1]))
    made = plan.of_program(config, program, compiled=True)
    assert made.trainable == 41_943_040
    assert made.parameters == 7_241_732_096 + 41_943_040
    assert made.memory.total < 10e9
    # Were all layers' kernels dequantised at once, they alone would be 14 GB in bfloat16.
    assert made.compiled < 10e9, made.compiled


def test_one_layer_is_dequantised_at_a_time():
    """What the compiler sets aside does not grow by a layer's weights with every layer."""
    cfg = ModelConfig(d_model=256, n_layers=2, n_heads=4, d_ff=1024, vocab_size=64, lora=LoraConfig(r=2))
    tokens = jnp.zeros((1, 16), jnp.int32)

    def temporary(layers):
        deep = dataclasses.replace(cfg, n_layers=layers)
        params = jax.eval_shape(lambda: quantize(params_of(deep), "nf4-double"))
        adapters = jax.eval_shape(lambda p: lora.init(deep, jax.random.key(0), p), params)

        def value(adapters, params):
            variables = {"params": params, "lora": adapters}
            output = transformer.apply(deep, variables, tokens, compute=Compute(dtype="bfloat16", remat="full"))
            return jnp.sum(output.hidden.astype(jnp.float32))

        return jax.jit(jax.grad(value)).lower(adapters, params).compile().memory_analysis().temp_size_in_bytes

    one_layer = 4 * 256 * (4 * 256 + 3 * 1024)
    assert (temporary(10) - temporary(2)) / 8 < 0.2 * one_layer


def test_projections_by_path():
    assert is_projection("layers/mlp/shared/gate/kernel") and is_projection("dense_layers/attn/k/kernel")
    assert not any(
        map(is_projection, ("embed/kernel", "layers/mlp/router/kernel", "score/kernel", "layers/attn/q/bias"))
    )


def test_a_kernel_of_another_shape_is_named():
    quantised = quantize(params_of(DENSE), "nf4")
    with pytest.raises(ValueError, match=r"attn/q/kernel: quantised \(64, 64\), but the model asks for \(64, 128\)"):
        jaxlm.logits(dataclasses.replace(DENSE, head_dim=64), {"params": quantised}, TOKENS)
    assert isinstance(quantised["layers"]["attn"]["q"]["kernel"], QTensor)
