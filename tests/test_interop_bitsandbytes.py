"""Quantised weights in files: bitsandbytes' own are read to the bit, and what is written it reads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxlm import cli, tree
from jaxlm.dist import mesh as meshes
from jaxlm.dist import rules
from jaxlm.interop import names
from jaxlm.interop.load import load, load_config, stored_kind
from jaxlm.interop.save import save
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.nn.qtensor import KINDS, dequantise_rows, is_qtensor
from jaxlm.params.quantize import dequantize, is_projection, quantize

functional = pytest.importorskip("bitsandbytes.functional")

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 96, "vocab_size": 32, "eos_token_id": 2}
CFG = ModelConfig(**SHAPE)
MODELS = {
    "llama": CFG,
    "odd": ModelConfig(**SHAPE | {"d_model": 24, "head_dim": 6, "d_ff": 30}),
    "gpt2": ModelConfig(
        **SHAPE | {"n_kv_heads": 2}, family="gpt2", norm="layernorm", positions="learned", gated=False,
        activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=True, max_length=16,
    ),
    "phi3": ModelConfig(**SHAPE, family="phi3", tie_embeddings=False),
    "mixtral": ModelConfig(**SHAPE, family="mixtral", moe=MoEConfig(experts=2, top_k=1, d_ff=80, renormalize=True)),
}  # fmt: skip


FUSED = ("gpt2", "phi3")
"""Families whose files hold queries, keys and values in one tensor."""


def model(cfg, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {p: 0.1 * rng.standard_normal(leaf.shape, "float32") for p, leaf in names.abstract(cfg).items()}
    return {"params": names.nest({p: jnp.asarray(x + p.endswith("scale")) for p, x in leaves.items()})}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def quantise_files(directory, kind):
    """Every Linear of a directory that bitsandbytes would quantise, quantised by bitsandbytes."""
    file = directory / "model.safetensors"
    tensors = {}
    for name, array in safetensors.numpy.load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = torch.from_numpy(array)
            continue
        weight = torch.from_numpy(array)
        if kind == "int8":
            tensors[name], tensors[name.replace("weight", "SCB")], _ = functional.int8_vectorwise_quant(weight)
            tensors[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
            continue
        tensors[name], state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=kind == "nf4-double"
        )
        tensors |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nf4-double"}
    bits = {"load_in_8bit": True} if kind == "int8" else four
    config["quantization_config"] = {"quant_method": "bitsandbytes"} | bits
    (directory / "config.json").write_text(json.dumps(config))
    return arrays


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_peer_are_read_to_the_bit(kind, tmp_path):
    save(tmp_path / "m", CFG, model(CFG))
    arrays = quantise_files(tmp_path / "m", kind)
    cfg, variables = load(tmp_path / "m")
    assert cfg == load_config(tmp_path / "m")
    assert stored_kind(tmp_path / "m") == kind and stored_kind(tmp_path / "nowhere") is None
    leaves = tree.leaves(variables["params"], is_leaf=is_qtensor)
    assert {path for path, leaf in leaves.items() if is_qtensor(leaf)} == set(filter(is_projection, leaves))
    q = leaves["layers/attn/o/kernel"]
    name = "model.layers.1.self_attn.o_proj.weight"
    assert q.kind == kind and q.shape == (2, 64, 64)
    np.testing.assert_array_equal(np.ravel(q.codes[1]), np.ravel(arrays[name]))
    values = np.asarray(dequantise_rows(jax.tree.map(lambda x: x[1], q)))
    if kind == "int8":
        peer = functional.int8_vectorwise_dequant(
            torch.from_numpy(arrays[name]), torch.from_numpy(arrays[name.replace("weight", "SCB")])
        )
    else:
        packed = {
            n.removeprefix(f"{name}."): torch.from_numpy(a) for n, a in arrays.items() if n.startswith(f"{name}.")
        }
        state = functional.QuantState.from_dict(packed, torch.device("cpu"))
        peer = functional.dequantize_4bit(torch.from_numpy(arrays[name]), state)
    np.testing.assert_array_equal(values, peer.numpy())


def test_transformers_and_jaxlm_read_what_the_other_quantised(tmp_path):
    """Weights, not logits: the peer's products on CPU are of low precision."""
    transformers = pytest.importorskip("transformers")
    plain, ours, theirs = (str(tmp_path / name) for name in ("plain", "ours", "theirs"))
    save(plain, CFG, model(CFG))
    save(ours, CFG, load(plain, quantize="nf4-double")[1])
    peer = transformers.AutoModelForCausalLM.from_pretrained(ours)
    found = load(ours)[1]["params"]
    for layer, block in enumerate(peer.model.layers):
        packed = block.self_attn.q_proj.weight
        rows = dequantise_rows(jax.tree.map(lambda x, i=layer: x[i], found["layers"]["attn"]["q"]["kernel"]))
        np.testing.assert_array_equal(rows, functional.dequantize_4bit(packed.data, packed.quant_state).numpy())
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(theirs)
    cfg, again = load(theirs)
    assert dataclasses.replace(cfg, bos_token_id=CFG.bos_token_id) == load_config(ours)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        equal(again["params"], found)
    for a, b in zip(*map(jax.tree.leaves, (dequantize(again["params"]), dequantize(found))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_jaxlm_quantize(tmp_path, capsys):
    save(tmp_path / "m", CFG, model(CFG))
    (tmp_path / "m" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1, "</s>": 2}}}')
    assert cli.main(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--kind", "nf4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "q") and "MB of weights" in printed.err
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    equal(load(tmp_path / "q")[1]["params"], quantize(model(CFG)["params"], "nf4"))
    assert cli.main(["quantize", str(tmp_path / "q"), str(tmp_path / "r"), "--kind", "int8"]) == 2
    assert cli.main(["quantize", str(tmp_path / "m"), str(tmp_path / "r"), "--kind", "nf3"]) == 2
    assert "the known ones are nf4, nf4-double, int8" in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_written_and_loaded_again_is_the_same(name, kind, tmp_path):
    cfg = MODELS[name]
    quantised = {"params": quantize(model(cfg)["params"], kind)}
    save(tmp_path / "m", cfg, quantised)
    again = load(tmp_path / "m")[1]
    if name in FUSED and kind == "nf4-double":
        # Parts of one tensor cannot each have a mean of their scales: the values are the same, their scales are plain.
        assert again["params"]["layers"]["attn"]["q"]["kernel"].kind == "nf4"
        equal(dequantize(quantised["params"]), dequantize(again["params"]))
    else:
        equal(quantised, again)


@pytest.mark.parametrize(("name", "kind"), [*[("llama", kind) for kind in KINDS], ("mixtral", "nf4"), ("phi3", "int8")])
def test_loading_quantises_tensor_by_tensor(name, kind, tmp_path):
    cfg, variables = MODELS[name], model(MODELS[name])
    save(tmp_path / "m", cfg, variables)
    equal(load(tmp_path / "m", quantize=kind)[1]["params"], quantize(variables["params"], kind))
    half = load(tmp_path / "m", "bfloat16", quantize=kind)[1]["params"]
    equal(half, quantize(jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"]), kind))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "data": 4}, {"tensor": 2, "fsdp": 4}])
def test_loading_onto_a_mesh(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.interop.load.SMALL", 1000)  # so that leaves are built on the devices
    save(tmp_path / "m", CFG, model(CFG))
    mesh = meshes.make(meshes.MeshConfig(**sizes))
    placed = load(tmp_path / "m", quantize="nf4-double", mesh=mesh)[1]["params"]
    equal(placed, load(tmp_path / "m", quantize="nf4-double")[1]["params"])
    for path, sharding in tree.leaves(rules.shardings(placed, mesh)).items():
        assert tree.leaves(placed)[path].sharding.is_equivalent_to(sharding, tree.leaves(placed)[path].ndim), path


def test_what_is_quantised_in_part_is_loaded_as_floats(tmp_path):
    save(tmp_path / "m", CFG, model(CFG))
    plain = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    arrays = quantise_files(tmp_path / "m", "nf4")
    left_out = "model.layers.0.self_attn.q_proj.weight"
    kept = {n: a for n, a in arrays.items() if not n.startswith(left_out)} | {left_out: plain[left_out]}
    safetensors.numpy.save_file(kept, tmp_path / "m" / "model.safetensors")
    attn = load(tmp_path / "m")[1]["params"]["layers"]["attn"]
    assert is_qtensor(attn["k"]["kernel"]) and not is_qtensor(attn["q"]["kernel"])
    np.testing.assert_array_equal(attn["q"]["kernel"][0].T, plain[left_out])
    whole = load(tmp_path / "m", quantize="nf4")[1]["params"]
    equal(whole, quantize(model(CFG)["params"], "nf4"))


def _other_kind(directory, arrays):
    return {"quantize": "int8"}, "quantised as nf4 already"


def _unknown(directory, arrays):
    return {"quantize": "fp5"}, "quantize: 'fp5' is unknown; the known ones are nf4, nf4-double, int8"


def _fp4(directory, arrays):
    for name in [n for n in arrays if n.endswith("bitsandbytes__nf4")]:
        arrays[name.replace("__nf4", "__fp4")] = arrays.pop(name)
    return {}, "proj.weight: 4-bit kind 'fp4' is not supported"


def _scales_missing(directory, arrays):
    del arrays["model.layers.0.mlp.up_proj.weight.absmax"]
    return {}, "model.layers.0.mlp.up_proj.weight.absmax: missing"


def _rearranged(directory, arrays):
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    arrays[name] = arrays[name].astype(np.float16)
    return {}, "model.layers.0.mlp.up_proj.weight: absmax are float16"


def _state_broken(directory, arrays):
    name = next(n for n in arrays if n.endswith("up_proj.weight.quant_state.bitsandbytes__nf4"))
    arrays[name] = arrays[name][:-4]
    return {}, "up_proj.weight: its quant_state is malformed"


def _method(directory, arrays):
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"bitsandbytes"', '"gptq"'))
    return {}, "config.json: quantization_config: quant_method 'gptq' is not supported"


@pytest.mark.parametrize(
    "damage",
    [_other_kind, _unknown, _fp4, _scales_missing, _rearranged, _state_broken, _method],
    ids=lambda f: f.__name__,
)
def test_what_cannot_be_read_is_named(damage, tmp_path):
    save(tmp_path / "m", CFG, model(CFG))
    arrays = quantise_files(tmp_path / "m", "nf4")
    arguments, expected = damage(tmp_path / "m", arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "m", **arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)
