"""Upcycling: the mixture computes what the dense model did, its experts part in training, the rest is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import tree
from jaxlm.interop.load import load
from jaxlm.interop.save import save
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.params.upcycle import upcycle, upcycled_config
from jaxlm.training.loop import train

DENSE = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=31, tie_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
PARAMS = transformer.init(DENSE, jax.random.key(1))["params"]
PLAIN = Compute(attention="reference", scan=False)


def logits(cfg, params):
    return np.asarray(jax.jit(lambda p: transformer.logits(cfg, {"params": p}, TOKENS, compute=PLAIN))(params))


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(experts=4, top_k=2, balance="none"),
        MoEConfig(experts=3, top_k=1, balance="none"),
        MoEConfig(experts=4, top_k=3, scoring="sigmoid", balance="none"),
        MoEConfig(experts=4, top_k=2, dense_layers=(1,), balance="none"),
    ],
    ids=["top 2 of 4", "top 1 of 3", "sigmoid", "a dense layer"],
)
def test_a_mixture_starts_as_the_dense_model(moe):
    cfg = upcycled_config(DENSE, moe)
    params = upcycle(PARAMS, DENSE, cfg, jax.random.key(0))
    np.testing.assert_allclose(logits(cfg, params), logits(DENSE, PARAMS), atol=1e-6)
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape[1] == moe.experts and up.shape[3] == DENSE.F
    assert 0.01 < float(jnp.std(params["layers"]["mlp"]["router"]["kernel"])) < 0.03


def test_norm_and_activation_do_not_matter():
    dense = dataclasses.replace(DENSE, gated=False, activation="gelu", norm="layernorm", norm_placement="both")
    params = transformer.init(dense, jax.random.key(2))["params"]
    cfg = upcycled_config(dense, MoEConfig(experts=4, top_k=2, balance="none"))
    mixed = upcycle(params, dense, cfg, jax.random.key(0))
    np.testing.assert_allclose(logits(cfg, mixed), logits(dense, params), atol=1e-6)


def test_it_is_pure_and_keeps_the_rest():
    cfg = upcycled_config(DENSE, MoEConfig(experts=4, top_k=2))
    made = jax.eval_shape(lambda p, k: upcycle(p, DENSE, cfg, k), PARAMS, jax.random.key(0))
    wanted = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))["params"]
    assert {p: x.shape for p, x in tree.leaves(made).items()} == {p: x.shape for p, x in tree.leaves(wanted).items()}
    params = upcycle(PARAMS, DENSE, cfg, jax.random.key(0))
    np.testing.assert_array_equal(params["layers"]["attn"]["q"]["kernel"], PARAMS["layers"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(params["unembed"]["kernel"], PARAMS["unembed"]["kernel"])
    again = upcycle(PARAMS, DENSE, cfg, jax.random.key(1))
    assert np.any(params["layers"]["mlp"]["router"]["kernel"] != again["layers"]["mlp"]["router"]["kernel"])


def test_training_draws_the_experts_apart():
    cfg = upcycled_config(DENSE, MoEConfig(experts=4, top_k=2, balance="none"))
    params = upcycle(PARAMS, DENSE, cfg, jax.random.key(0))

    def loss(params):
        out = transformer.logits(cfg, {"params": params}, TOKENS, compute=PLAIN)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), TOKENS[..., None], -1))

    grads = jax.jit(jax.grad(loss))(params)
    up = np.asarray(grads["layers"]["mlp"]["up"]["kernel"])
    assert all(np.any(up[:, 0] != up[:, e]) for e in range(1, 4))


def test_the_result_is_a_mixtral(tmp_path):
    cfg = upcycled_config(DENSE, MoEConfig(experts=4, top_k=2, balance="none"))
    params = upcycle(PARAMS, DENSE, cfg, jax.random.key(0))
    save(tmp_path / "m", cfg, {"params": params})
    read, variables = load(tmp_path / "m")
    assert read.family == "mixtral" and read.moe.experts == 4 and read.moe.d_ff == DENSE.F
    np.testing.assert_allclose(logits(read, variables["params"]), logits(DENSE, PARAMS), atol=1e-6)


REFUSED = {
    "another width": (DENSE, MoEConfig(d_ff=12), "model.moe.d_ff: .*width 24, not 12"),
    "gates that do not add up": (DENSE, MoEConfig(renormalize=False), "model.moe.renormalize"),
    "scaled gates": (DENSE, MoEConfig(routed_scaling_factor=2.5), "routed_scaling_factor"),
    "shared experts": (DENSE, MoEConfig(n_shared_experts=1), "model.moe.n_shared_experts: 1"),
    "a mixture": (dataclasses.replace(DENSE, moe=MoEConfig()), MoEConfig(), "has experts already"),
    "biases": (dataclasses.replace(DENSE, mlp_bias=True), MoEConfig(), "model.mlp_bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(name):
    dense, moe, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        upcycled_config(dense, moe)


def test_parameters_of_another_model_are_refused():
    cfg = upcycled_config(DENSE, MoEConfig(experts=4, top_k=2))
    narrow = dataclasses.replace(DENSE, d_model=12, head_dim=4)
    params = transformer.init(narrow, jax.random.key(1))["params"]
    with pytest.raises(ValueError, match="embed/kernel"):
        upcycle(params, DENSE, cfg, jax.random.key(0))
    with pytest.raises(ValueError, match=r"model\.moe: null"):
        upcycle(PARAMS, DENSE, DENSE, jax.random.key(0))


def metrics(run):
    return [json.loads(line) for line in run.joinpath("metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_a_dense_one(tmp_path):
    (tmp_path / "notes.txt").write_text("The quick brown fox jumps over the lazy dog, again and again.\n" * 300)
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "vocab_size": 300}
    raw = {
        "run": {"dir": str(tmp_path / "dense")},
        "model": shape,
        "data": {"path": str(tmp_path / "notes.txt"), "sequence_length": 16},
        "train": {"steps": 2, "batch_size": 8, "eval_every": 2, "attention": "reference", "prompts": []},
        "optimizer": {"learning_rate": 1e-2},
    }
    moe = {"experts": 4, "top_k": 2}
    assert train(configs.build(raw)) == 0
    start = {"path": str(tmp_path / "dense"), "moe": moe}
    more = raw | {"run": {"dir": str(tmp_path / "moe")}, "model": start}
    assert train(configs.build(more)) == 0
    ends, begins = metrics(tmp_path / "dense")[-1], metrics(tmp_path / "moe")[0]
    assert begins["step"] == 0 and begins["eval/loss"] == pytest.approx(ends["eval/loss"], abs=1e-5)
    cfg, variables = load(tmp_path / "moe")
    assert cfg.family == "mixtral" and variables["params"]["layers"]["mlp"]["up"]["kernel"].shape == (2, 4, 16, 24)
    refused = more | {"lora": {"r": 2}, "run": {"dir": str(tmp_path / "lora")}}
    with pytest.raises(ValueError, match=r"model\.moe: makes experts out of .*dense.* lora"):
        train(configs.build(refused))
