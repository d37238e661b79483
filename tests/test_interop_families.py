"""Every Hugging Face family against transformers itself: logits, export, and both spellings of config.json."""

import copy
import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxlm.interop import hf, names
from jaxlm.interop.load import load, load_config
from jaxlm.interop.save import save
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4
"""Of logits in float32; a wrong epsilon of a norm moves them by more."""

BLOCK = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
}  # fmt: skip
SQUARE = BLOCK | {"head_dim": 6}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CASES = {
    "llama": BLOCK | {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3,
    },
    "mistral": BLOCK | {"num_key_value_heads": 1, "sliding_window": 5, "rope_parameters": YARN},
    "qwen2": BLOCK | {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True,
    },
    "qwen3": BLOCK | {"head_dim": 14, "attention_bias": True},
    "olmo2": BLOCK | {"num_key_value_heads": 4},
    "phi3": SQUARE | {"pad_token_id": 0, "original_max_position_embeddings": 8, "rope_parameters": LONGROPE},
    "gemma2": BLOCK | {"query_pre_attn_scalar": 7, "sliding_window": 4},
    "gemma3_text": BLOCK | {
        "query_pre_attn_scalar": 7, "sliding_window": 4, "num_hidden_layers": 3, "layer_types": MIXED,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "stablelm": SQUARE | {"hidden_size": 32, "head_dim": 8, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "mixtral": BLOCK | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen3_moe": BLOCK | {
        "num_hidden_layers": 3, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "olmoe": SQUARE | {"num_experts": 4, "num_experts_per_tok": 3, "clip_qkv": 1.0, "norm_topk_prob": True},
}  # fmt: skip

MASK = np.ones((2, 17), np.int32)
MASK[0, :5], MASK[1, 13:] = 0, 0
POSITIONS = np.maximum(np.cumsum(MASK, axis=1) - 1, 0).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, 61, MASK.shape).astype(np.int32)


class Peer(NamedTuple):
    """A model of transformers with large random weights, where it is saved, and its logits."""

    path: pathlib.Path
    logits: np.ndarray


def torch_logits(model) -> np.ndarray:
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "position_ids": POSITIONS}
    with torch.no_grad():
        return model(**{name: torch.tensor(x, dtype=torch.long) for name, x in inputs.items()}).logits.numpy()


@functools.cache
def peer(model_type: str, **changes) -> Peer:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(CASES[model_type]), **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.add_(0.3 * noise) if weight.dim() == 1 else weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    path = pathlib.Path(tempfile.mkdtemp()) / model_type
    model.save_pretrained(path)
    return Peer(path, torch_logits(model))


PLAIN = Compute(attention="reference", scan=False)


def our_logits(cfg, variables, compute=PLAIN) -> np.ndarray:
    function = jax.jit(functools.partial(transformer.logits, cfg, compute=compute))
    return np.asarray(function(variables, TOKENS, positions=jnp.asarray(POSITIONS), segments=jnp.asarray(MASK)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference where there is no padding."""
    return float(np.abs(a - b)[MASK == 1].max())


@functools.cache
def loaded(model_type: str):
    return load(peer(model_type).path)


@pytest.mark.parametrize("model_type", CASES)
def test_logits_equal_those_of_transformers(model_type):
    """With padding on either side, explicit positions, and windows and original contexts shorter than the text."""
    cfg, variables = loaded(model_type)
    assert difference(our_logits(cfg, variables), peer(model_type).logits) < TOLERANCE
    assert cfg.family == model_type and cfg.d_ff == cfg.F and cfg.vocab_size == 61


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "qwen3_moe"])
def test_default_kernels_and_scan_give_the_same(model_type):
    """The way that runs take, not the plain one: the chosen attention, and scanned layers."""
    cfg, variables = loaded(model_type)
    assert difference(our_logits(cfg, variables, Compute()), peer(model_type).logits) < TOLERANCE


@pytest.mark.parametrize("model_type", CASES)
def test_export_is_read_back_by_transformers(model_type, tmp_path):
    """No missing or unexpected names, the same bits, the same logits, the same configuration."""
    cfg, variables = loaded(model_type)
    save(tmp_path / "out", cfg, variables)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert type(model).__name__ == hf.FAMILIES[model_type].architecture
    assert difference(torch_logits(model.eval()), peer(model_type).logits) == 0
    before, after = (
        safetensors.numpy.load_file(p / "model.safetensors") for p in (peer(model_type).path, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert load_config(tmp_path / "out") == cfg


def old_spelling(raw: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    raw = copy.deepcopy(raw)
    raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters", None)
    if raw["model_type"] == "gemma3_text":
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
    elif raw["model_type"] != "gpt2":
        raw.pop("layer_types", None)
    if rope is not None:
        raw["rope_theta"] = rope.pop("rope_theta")
        share = rope.pop("partial_rotary_factor", None)
        kind = rope.pop("rope_type")
        raw["rope_scaling"] = {"type": kind} | rope if kind != "default" else None
        if share is not None:
            raw["partial_rotary_factor"] = share
    if raw["model_type"] == "qwen3_moe":
        raw["num_experts"] = raw.pop("num_local_experts", raw.get("num_experts"))
    return raw


@pytest.mark.parametrize("model_type", CASES)
def test_old_and_new_spelling_say_the_same(model_type):
    raw = json.loads((peer(model_type).path / "config.json").read_text())
    assert hf.read_config(old_spelling(raw)) == hf.read_config(raw)


@pytest.mark.parametrize("model_type", hf.FAMILIES)
def test_missing_fields_take_the_defaults_of_the_family(model_type):
    """A config.json with nothing but the type is what transformers' own class is without arguments."""
    config = transformers.AutoConfig.for_model(model_type)
    written = json.loads(config.to_json_string(use_diff=False)) | {"architectures": None}
    bare = hf.read_config({"model_type": model_type})
    full = hf.read_config(written)
    assert bare == full


@pytest.mark.parametrize("model_type", hf.FAMILIES)
def test_name_table_makes_every_leaf_once(model_type):
    """At the family's real size, tied and not; shapes only."""
    cfg = hf.read_config({"model_type": model_type})
    for tied in (True, False):
        cfg = dataclasses.replace(cfg, tie_embeddings=tied, n_layers=3)
        found = names.targets(cfg, hf.FAMILIES[model_type].table(cfg), names.abstract(cfg))
        assert any("embed" in part.path for target in found.values() for part in target.parts)


def test_a_table_with_a_hole_or_an_overlap_is_refused():
    cfg = hf.read_config({"model_type": "llama"})
    cfg = dataclasses.replace(cfg, n_layers=1)
    table, leaves = hf.FAMILIES["llama"].table(cfg), names.abstract(cfg)
    for rows in (table.dense[1:], (*table.dense, table.dense[0]._replace(theirs="other"))):
        with pytest.raises(ValueError, match=r"exactly once.*layers/attn/norm/scale"):
            names.targets(cfg, table._replace(dense=rows), leaves)
    with pytest.raises(ValueError, match="attn/nope is no leaf"):
        bad = (table.dense[0]._replace(ours=("attn/nope",)), *table.dense[1:])
        names.targets(cfg, table._replace(dense=bad), leaves)


def test_experts_in_one_tensor_are_the_same_model(tmp_path):
    """As they lie in the memory of newer transformers: gate and up side by side, [E, 2F, D]."""
    cfg, variables = loaded("mixtral")
    save(tmp_path / "m", cfg, variables)
    tensors = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    for i in range(cfg.N):
        prefix, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        parts = {
            w: np.stack([tensors.pop(f"{prefix}experts.{e}.{w}.weight") for e in range(4)]) for w in ("w1", "w2", "w3")
        }
        tensors[f"{new}gate.weight"] = tensors.pop(f"{prefix}gate.weight")
        tensors[f"{new}experts.gate_up_proj"] = np.concatenate([parts["w1"], parts["w3"]], axis=1)
        tensors[f"{new}experts.down_proj"] = parts["w2"]
    safetensors.numpy.save_file(tensors, tmp_path / "m" / "model.safetensors")
    _, again = load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, again, variables)


REFUSED = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "llama": {"rope_scaling": {"rope_type": "alibi"}},
    "qwen2": {"hidden_act": "mish"},
    "gemma2": {"use_bidirectional_attention": True},
    "mistral": {"layer_types": ["full_attention", "sliding_attention"]},
    "phi3": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "stablelm": {"qk_layernorm": True},
    "olmo2": {"quantization_config": {"bits": 4}},
    "qwen3": {"partial_rotary_factor": 0.5},
    "gemma3_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "mrope_section": [1]}}},
    "mixtral": {"num_hidden_layers": "two"},
    "qwen3_moe": {"num_experts": 0},
    "olmoe": {"architectures": ["OlmoeForTokenClassification"]},
}


@pytest.mark.parametrize("model_type", hf.FAMILIES)
def test_unsupported_settings_are_refused_by_name(model_type):
    field = next(iter(REFUSED[model_type]))
    with pytest.raises(ValueError, match=f"here: {field}") as caught:
        hf.read_config({"model_type": model_type} | REFUSED[model_type], "here")
    assert "\n" not in str(caught.value)
