"""Adapters against PEFT itself: its files read here, ours read there, merged or not, and the gradients of both."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from jaxlm.interop.load import load, load_config
from jaxlm.interop.save import save
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import LoraConfig
from jaxlm.params import lora as adapters

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 2e-5
"""Of float32 logits whose size is about 1; what goes wrong moves them by more than 1e-3."""

BLOCK = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": BLOCK | {"attention_bias": True},
    "qwen2": BLOCK | {"tie_word_embeddings": True},
    "gpt2": {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gemma2": BLOCK | {"query_pre_attn_scalar": 7, "sliding_window": 4},
    "mixtral": BLOCK | {"num_local_experts": 3, "num_experts_per_tok": 2},
}
PATTERNS = {
    "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear",
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}, "alpha_pattern": {r"layers\.0\..*k_proj": 20},
}  # fmt: skip
CASES = {
    "all linear": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "patterns, rslora": ("gemma2", PATTERNS),
    "dora, patterns": ("llama", PATTERNS | {"use_dora": True, "use_rslora": False}),
    "fused, dora": ("gpt2", {"r": 3, "use_dora": True, "target_modules": "all-linear"}),
    "some layers": ("qwen2", {"r": 2, "target_modules": r".*\.1\..*(q_proj|up_proj)", "use_dora": True}),
    "whole modules": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_dora": True}),
    "biases, norms": ("llama", {"target_modules": ["k_proj"], "bias": "all", "modules_to_save": ["input_layernorm"]}),
    "pissa": ("llama", {"r": 3, "target_modules": ["v_proj", "o_proj"], "init_lora_weights": "pissa"}),
    "experts": ("mixtral", {"r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3", "gate", "q_proj"]}),
}
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 9))
FAST = Compute(attention="reference", scan=False)


def base_model(family):
    """A model of transformers with every parameter random."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **MODELS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(family, settings, folder):
    """The base, saved, and PEFT's model with a random adapter, saved."""
    model = base_model(family)
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / "adapter")
    return model


def peft_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def logits(cfg, variables):
    return np.asarray(transformer.logits(cfg, variables, TOKENS, compute=FAST))


def reloaded(folder, adapter):
    """transformers' base with an adapter directory on it, read by PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_both_ways(case, tmp_path):
    family, settings = CASES[case]
    model = adapted(family, settings, tmp_path)
    wanted = peft_logits(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cfg, variables = load(tmp_path / "base", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(logits(cfg, variables), wanted, atol=TOLERANCE)
    assert np.abs(logits(dataclasses.replace(cfg, lora=None), {"params": variables["params"]}) - wanted).max() > 0.01
    assert adapters.count(cfg, variables["lora"]) == trained
    merged = adapters.merge(cfg, variables["params"], variables["lora"])
    plain = logits(adapters.merged_config(cfg, merged), {"params": merged})
    np.testing.assert_allclose(plain, wanted, atol=TOLERANCE)
    save(tmp_path / "ours", cfg, {"lora": variables["lora"]})
    np.testing.assert_allclose(peft_logits(reloaded(tmp_path, tmp_path / "ours")), wanted, atol=TOLERANCE)
    assert load_config(tmp_path / "base") == dataclasses.replace(cfg, lora=None)


def test_adapters_of_experts_made_here_are_read_by_peft(tmp_path):
    """Each expert's under the names of its checkpoint, which PEFT puts together for newer transformers."""
    base_model("mixtral").save_pretrained(tmp_path / "base")
    cfg, variables = load(tmp_path / "base")
    cfg = dataclasses.replace(cfg, lora=LoraConfig(r=3, alpha=4))
    tree = moved(adapters.init(cfg, jax.random.key(0), variables["params"]))
    save(tmp_path / "ours", cfg, {"lora": tree})
    wanted = logits(cfg, variables | {"lora": tree})
    np.testing.assert_allclose(peft_logits(reloaded(tmp_path, tmp_path / "ours")), wanted, atol=TOLERANCE)
    again, variables = load(tmp_path / "base", adapter=tmp_path / "ours")
    np.testing.assert_array_equal(logits(again, variables), wanted)


def moved(tree, seed=3):
    """Every number of an adapter moved."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def test_a_merged_model_is_one_of_transformers(tmp_path):
    """Of a tied model whose embedding is adapted the head comes apart, as it is while the adapter is on."""
    settings = {"target_modules": ["embed_tokens", "q_proj"]}
    wanted = peft_logits(adapted("qwen2", settings, tmp_path))
    cfg, variables = load(tmp_path / "base", adapter=tmp_path / "adapter")
    save(tmp_path / "merged", cfg, variables)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(peft_logits(merged), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["dora, patterns", "fused, dora", "embedding and head"])
def test_gradients_equal_pefts(case, tmp_path):
    family, settings = CASES[case]
    model = adapted(family, settings, tmp_path)
    model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    wanted = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    cfg, variables = load(tmp_path / "base", adapter=tmp_path / "adapter")

    def loss(tree):
        scores = transformer.logits(cfg, variables | {"lora": tree}, TOKENS, compute=FAST)[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), TOKENS[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    save(tmp_path / "gradients", cfg, {"lora": jax.grad(loss)(variables["lora"])})
    found = safetensors.numpy.load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    found = {name.removesuffix(".weight"): value for name, value in found.items()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-6 + 1e-4 * np.abs(gradient).max(), err_msg=name)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    adapted("llama", {"r": 2, "target_modules": ["q_proj", "v_proj"]}, folder)
    return folder


def changed(directories, folder, config=None, tensors=None):
    """The adapter with other fields and tensors (None removes one)."""
    source = directories / "adapter"
    fields = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    arrays = safetensors.numpy.load_file(source / "adapter_model.safetensors") | (tensors or {})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(
        {name: value for name, value in arrays.items() if value is not None}, folder / "adapter_model.safetensors"
    )
    return folder


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "another method": ({"peft_type": "IA3"}, {}, "adapter_config.json: peft_type: 'IA3' is not supported"),
    "a field with an effect": ({"layer_replication": [[0, 1]]}, {}, "layer_replication: .* is not supported"),
    "biases of B": ({"lora_bias": True}, {}, "lora_bias"),
    "a field of the future": ({"use_zora": True}, {}, "use_zora: True is not supported"),
    "a start that changed the base": ({"init_lora_weights": "olora"}, {}, "init_lora_weights: 'olora'"),
    "a target that is misspelt": ({"target_modules": ["q_prj"]}, {}, "target_modules: .*'q_prj'.* does not name"),
    "an expression for others": ({"target_modules": r".*\.v_proj"}, {}, "target_modules: .* does not name .*q_proj"),
    "a rank that is none": ({"r": 0}, {}, "r: 0 is not a whole number"),
    "another rank": ({"r": 3}, {}, r"q_proj.lora_A.weight: shape \[2, 16\], but .* asks for \[3, 16\]"),
    "a missing tensor": ({}, {Q: None}, f"{Q}: missing"),
    "a matrix of another base": ({}, {Q: np.zeros((2, 9), "float32")}, f"{Q}: shape .* another base"),
    "a layer too many": ({}, {Q.replace("layers.1", "layers.7"): np.zeros((2, 16), "float32")}, "no such module"),
    "a strange name": ({}, {"lora.q": np.zeros(2, "float32")}, "lora.q: does not begin with base_model.model."),
    "a strange parameter": ({}, {"base_model.model.x": np.zeros(2, "float32")}, "no such parameter"),
    "a magnitude": (
        {}, {Q.replace("lora_A.weight", "lora_magnitude_vector"): np.zeros(16, "float32")}, "no use_dora",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(case, directories, tmp_path):
    config, tensors, message = BROKEN[case]
    folder = changed(directories, tmp_path, config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(directories / "base", adapter=folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_adapter_names_its_base(directories, tmp_path):
    """An adapter's directory, or a run's that ended in one, is enough where the base it names is here."""
    folder = tmp_path / "hf"
    folder.mkdir()
    idle = {"rank_pattern": {"k_proj": 4}}  # matches nothing that is adapted; PEFT warns and goes on
    changed(directories, folder, {"base_model_name_or_path": str(directories / "base")} | idle)
    cfg, variables = load(directories / "base", adapter=directories / "adapter")
    for path in (folder, tmp_path):
        found, other = load(path)
        assert found.lora == dataclasses.replace(cfg.lora, base=str(directories / "base")) == load_config(path).lora
        jax.tree.map(np.testing.assert_array_equal, other, variables)
    changed(directories, folder, {"base_model_name_or_path": "someone/model"})
    with pytest.raises(FileNotFoundError, match="base_model_name_or_path: 'someone/model'"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing/adapter_config\.json: no such file"):
        load(directories / "base", adapter=tmp_path / "nothing")
