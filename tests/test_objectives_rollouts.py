"""GRPO and PPO on rollouts: against TRL's own loss and independent references, and how microbatches add up."""

import collections
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxlm import objectives
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives import completions, grpo
from jaxlm.objectives.config import GrpoConfig, PpoConfig
from jaxlm.types import Head, Output

trl = pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=29)
FAST = Compute(attention="reference", scan=False)
ROWS, LENGTH, GROUP, TEMPERATURE = 8, 10, 4, 0.7
REWARDS = ("rewards.py:good", "rewards.py:short")
VARIANTS = ("grpo", "bnpo", "dapo", "dr_grpo", "rloo")


def apply(variables, tokens, model="policy", **inputs):
    return transformer.apply(CFG, variables, tokens, compute=FAST, **inputs)


@functools.cache
def model(seed):
    return transformer.init(CFG, jax.random.key(seed))


def moved(amount):
    """The policy some way towards another model, so that probability ratios are around 1."""
    return jax.tree.map(lambda a, b: a + amount * (b - a), model(0), model(1))


def rollout(seed=0):
    """Rows of prompt and completion, of all lengths."""
    rng = np.random.default_rng(seed)
    prompts, new = rng.integers(1, 4, ROWS), rng.integers(1, LENGTH - 3, ROWS)
    place = np.arange(LENGTH)[None, :]
    inside = place < (prompts + new)[:, None]
    tokens = np.where(inside, rng.integers(1, CFG.V, (ROWS, LENGTH)), 0).astype(np.int32)
    labels = (place >= prompts[:, None] - 1) & (place < (prompts + new)[:, None] - 1)
    rewards = rng.normal(size=(2, ROWS)).astype(np.float32)
    rewards[:, 1] = np.nan
    rewards[0, 6] = np.nan
    columns = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "mask": labels.astype(np.float32),
        "segments": inside.astype(np.int32),
        "positions": (place * inside).astype(np.int32),
        "ended": (new < 5).astype(np.float32),
        "reward_0": rewards[0],
        "reward_1": rewards[1],
    }
    return jax.tree.map(jnp.asarray, columns)


def grpo_config(**changes):
    return GrpoConfig(rewards=REWARDS, group_size=GROUP, max_new_tokens=9, temperature=TEMPERATURE, **changes)


def ppo_config(**changes):
    return PpoConfig(rewards=REWARDS, max_new_tokens=9, temperature=TEMPERATURE, gamma=0.95, kl_coef=0.3, **changes)


def log_probs(variables, batch):
    """By way of whole logits: float64 [B, L]."""
    logits = np.asarray(transformer.logits(CFG, variables, batch["tokens"], batch["positions"], batch["segments"]))
    logits = logits.astype(np.float64) / TEMPERATURE
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)[..., 0] - norm


def value_head():
    rng = np.random.default_rng(5)
    return {"kernel": jnp.asarray(rng.normal(size=(16, 1)), jnp.float32), "bias": jnp.ones(1)}


@functools.cache
def compiled(config):
    """`prepare`, and loss with metrics and gradient, of an objective."""
    objective = objectives.make(config)

    def loss(params, frozen, batch):
        return objective.loss(apply, params, frozen, batch, objective.weights(batch), None)

    prepare = jax.jit(lambda params, frozen, batch: objective.prepare(apply, params, frozen, batch, None))
    return prepare, jax.jit(jax.value_and_grad(loss, has_aux=True))


def prepared(config, params, frozen, batch):
    return compiled(config)[0](params, frozen, batch)


def losses(config, params, frozen, batch):
    """(loss, metrics) and the gradient of one pass over a prepared batch."""
    return compiled(config)[1](params, frozen, batch)


class Accelerator(types.SimpleNamespace):
    """What TRL's loss asks of one."""

    num_processes, device = 1, "cpu"

    def reduce(self, x, reduction):
        return x

    gather = gather_for_metrics = staticmethod(lambda x: x)


def peer_loss(trainer, config, batch, given):
    """Loss, metrics and gradient in the log-probabilities, of TRL's own method; all rows in one batch."""
    x = torch.tensor(np.asarray(given["log_probs"]), dtype=torch.float64, requires_grad=True)
    fields = {
        "beta": config.beta, "epsilon_low": config.epsilon, "epsilon_high": config.epsilon, "loss_type": config.variant,
        "max_completion_length": config.max_new_tokens, "top_entropy_quantile": 1.0, "aux_loss_enabled": False,
        "off_policy_mask_threshold": None, "importance_sampling_level": "token", "use_vllm": False,
        "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    self = types.SimpleNamespace(**fields)
    self.args = types.SimpleNamespace(
        delta=None, use_bias_correction_kl=getattr(config, "kl_correction", True), steps_per_generation=1
    )
    self.model = types.SimpleNamespace(training=True)
    self.accelerator = Accelerator()
    self._metrics = {"train": collections.defaultdict(list)}
    self._get_per_token_logps_and_entropies = lambda *a, **k: (x, torch.zeros_like(x), None)
    mask = torch.tensor(np.asarray(batch["mask"]), dtype=torch.float64)
    tensors = {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in given.items()}
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old"],
        "old_logps": (tensors["old"] * mask).sum(1),
        "ref_per_token_logps": tensors["reference"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(self, None, inputs)
    loss.backward()
    return loss.item(), {name: values[0] for name, values in self._metrics["train"].items()}, x.grad.numpy()


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_is_trls_loss(variant, beta, correction):
    rng = np.random.default_rng(3)
    batch, config = rollout(), grpo_config(variant=variant, beta=beta, kl_correction=correction, epochs=2)
    given = {"log_probs": rng.normal(-2, 0.5, (ROWS, LENGTH)), "advantages": rng.normal(size=ROWS)}
    given |= {name: given["log_probs"] + rng.normal(0, 0.2, (ROWS, LENGTH)) for name in ("old", "reference")}
    batch |= {"advantages": given["advantages"], "old_log_probs": given["old"]}
    batch |= {"reference_log_probs": given["reference"]} if beta else {}

    def loss(x):
        return grpo._loss(config, x, batch, grpo.token_weights(batch))

    with jax.enable_x64(True):
        batch = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in batch.items()}
        (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(given["log_probs"]))
    trainer = RLOOTrainer if variant == "rloo" else GRPOTrainer
    want, peer, gradient = peer_loss(trainer, config, batch, given)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-9)
    name = "clip_ratio/region_mean"
    np.testing.assert_allclose(metrics[name], peer[name], rtol=1e-6)
    assert 0.0 < peer[name] < 1.0
    if beta and variant != "rloo":
        np.testing.assert_allclose(metrics["kl"], peer["kl"], rtol=1e-6)


@pytest.mark.parametrize("variant", ["dr_grpo", "rloo"])
def test_the_whole_grpo_step_from_models_to_loss(variant):
    """Log-probabilities, advantages and shares, in float64, against what the objective makes of the three models."""
    config, batch = grpo_config(variant=variant, beta=0.2, epochs=2), rollout()
    now, frozen = moved(0.02), {"reference": moved(0.05)}
    ready = prepared(config, model(0), frozen, batch)
    (value, metrics), _ = losses(config, now, frozen, ready)
    mask = np.asarray(batch["mask"], np.float64)
    new, old, other = (log_probs(v, batch) for v in (now, model(0), frozen["reference"]))
    each = np.stack([batch["reward_0"], batch["reward_1"]], axis=1).astype(np.float64)
    rewards = np.where(np.isnan(each).all(axis=1), np.nan, np.nansum(each, axis=1))
    if variant == "rloo":
        rewards = rewards - 0.2 * ((old - other) * mask).sum(1)
    advantages = np.zeros(ROWS)
    for i in range(ROWS):
        group = rewards[i // GROUP * GROUP : i // GROUP * GROUP + GROUP]
        rest = np.delete(group, i % GROUP)
        if not np.isnan(rewards[i]):
            centred = rewards[i] - (np.nanmean(rest) if variant == "rloo" else np.nanmean(group))
            advantages[i] = centred
    if variant == "rloo":
        ratio = np.exp(((new - old) * mask).sum(1))
        want = np.mean(-np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages))
    else:
        ratio, a = np.exp(new - old), advantages[:, None]
        token = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        token += 0.2 * (np.exp(other - new) - (other - new) - 1) * ratio
        want = (token * mask).sum() / (ROWS * 9)
    np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(ready["advantages"], advantages, rtol=1e-3 if variant == "rloo" else 1e-5, atol=1e-5)
    plain = np.where(np.isnan(each).all(axis=1), np.nan, np.nansum(each, axis=1))
    wanted = {"reward": np.nanmean(plain), "reward_std": np.nanstd(plain, ddof=1), "frac_reward_zero_std": 0.0}
    wanted |= {"rewards/good/mean": np.nanmean(each[:, 0]), "rewards/short/mean": np.nanmean(each[:, 1])}
    wanted |= {"completions/mean_length": mask.sum(1).mean()}
    wanted |= {"completions/clipped_ratio": 1 - np.mean(batch["ended"])}
    for name, number in wanted.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)


def reference_ppo(config, batch, new, old, other, values, old_values):
    """TRL's PPO in plain loops, float64, the score at the last token; means over tokens of rows with a score."""
    mask = np.asarray(batch["mask"]) > 0
    each = np.stack([batch["reward_0"], batch["reward_1"]], axis=1).astype(np.float64)
    scores = np.where(np.isnan(each).all(axis=1), np.nan, np.nansum(each, axis=1))
    advantages, returns = np.zeros((2, ROWS, LENGTH))
    for row in range(ROWS):
        where = np.flatnonzero(mask[row])
        rewards = -config.kl_coef * (old - other)[row]
        rewards[where[-1]] += scores[row]
        running = after = 0.0
        for t in reversed(where):
            running = rewards[t] + config.gamma * after - old_values[row, t] + config.gamma * config.lam * running
            after = old_values[row, t]
            advantages[row, t], returns[row, t] = running, running + after
    used = mask & ~np.isnan(scores)[:, None]
    inside = advantages[used]
    whitened = (advantages - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
    ratio = np.exp(new - old)
    clip = np.clip(ratio, 1 - config.epsilon, 1 + config.epsilon)
    policy = np.maximum(-whitened * ratio, -whitened * clip)[used].mean()
    near = np.clip(values, old_values - config.epsilon, old_values + config.epsilon)
    value = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)[used].mean()
    kl = np.where(mask, old - other, 0.0).sum(1).mean()
    return policy + config.value_coef * value, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "objective/kl": kl,
        "objective/entropy": np.where(mask, -old, 0.0).sum(1).mean(),
        "objective/scores": np.nanmean(scores),
        "objective/non_score_reward": -config.kl_coef * kl,
        "objective/rlhf_reward": np.nanmean(scores) - config.kl_coef * kl,
        "policy/approxkl_avg": 0.5 * ((new - old)[used] ** 2).mean(),
        "val/ratio": ratio[used].mean(),
    }


def test_the_whole_ppo_step_from_models_to_loss():
    config, batch = ppo_config(epochs=2), rollout()
    frozen, head = {"reference": moved(0.05)}, value_head()
    old = {**model(0), "value": head}
    now = {**moved(0.02), "value": jax.tree.map(lambda x: 1.1 * x, head)}
    (value, metrics), slope = losses(config, now, frozen, prepared(config, old, frozen, batch))

    def values(variables):
        inputs = {name: batch[name] for name in ("positions", "segments")}
        hidden = np.asarray(apply({"params": variables["params"]}, batch["tokens"], **inputs).hidden, np.float64)
        return hidden @ np.asarray(variables["value"]["kernel"])[:, 0] + float(variables["value"]["bias"][0])

    given = [log_probs({"params": v["params"]}, batch) for v in (now, old, frozen["reference"])]
    want, numbers = reference_ppo(config, batch, *given, values(now), values(old))
    np.testing.assert_allclose(value, want, rtol=2e-5)
    for name, number in numbers.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(slope) == {"params", "value"}
    assert min(float(optax.tree.norm(tree)) for tree in slope.values()) > 1e-3


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_pass_has_ratio_1_and_no_divergence_from_itself(epochs):
    """Exactly with one pass, which has its old log-probabilities at hand; else as near as two programs come."""
    limit = 0.0 if epochs == 1 else 1e-6
    frozen, batch = {"reference": model(0)}, rollout()
    config, params = ppo_config(epochs=epochs), {**model(0), "value": value_head()}
    (_, metrics), _ = losses(config, params, frozen, prepared(config, params, frozen, batch))
    assert abs(float(metrics["val/ratio"]) - 1.0) <= 1e-6  # a mean of ones may round
    assert float(metrics["policy/approxkl_avg"]) <= limit**2
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert abs(float(metrics["objective/kl"])) <= 1e-5
    config = grpo_config(epochs=epochs)
    ready = prepared(config, model(0), {}, batch)
    (value, metrics), slope = losses(config, model(0), {}, ready)
    np.testing.assert_allclose(value, -np.mean(ready["advantages"]), atol=1e-6)
    assert float(metrics["kl"]) <= limit and metrics["clip_ratio/region_mean"] == 0.0
    assert float(optax.tree.norm(slope)) > 1e-3, "the gradient is there although nothing has moved"


def test_what_cannot_be_scored_moves_nothing():
    """A row that has no reward may be anything: neither loss nor gradient changes."""
    batch, frozen = rollout(), {"reference": moved(0.05)}
    params = {**model(0), "value": value_head()}
    other = batch | {"targets": batch["targets"].at[1].set(5)}
    for config in (ppo_config(), grpo_config()):
        results = [losses(config, params, frozen, prepared(config, params, frozen, b)) for b in (batch, other)]
        (a, _), slope = results[0]
        (b, _), same = results[1]
        np.testing.assert_allclose(a, b, atol=1e-7)
        for x, y in zip(jax.tree.leaves(slope), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_log_probabilities_are_those_of_the_tempered_distribution(softcap, biased):
    rng = np.random.default_rng(0)
    hidden, kernel = (
        jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 7)), jnp.float32),
    )
    bias = jnp.asarray(rng.normal(size=7), jnp.float32) if biased else None
    targets = jnp.asarray(rng.integers(0, 7, (2, 3)), jnp.int32)
    got, entropy = completions.statistics(Output(hidden, Head(kernel, bias, softcap), {}), targets, 0.5)
    logits = transformer.head_logits(hidden, Head(kernel, bias, softcap)) / 0.5
    logs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(got, jnp.take_along_axis(logs, targets[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, -jnp.sum(jnp.exp(logs) * logs, -1), rtol=1e-5, atol=1e-6)


def test_a_reward_model_scores_rows_beside_the_functions():
    score = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(16, 1)), jnp.float32)}
    judge = {"params": {**model(1)["params"], "score": score}}
    batch = rollout()
    each, total = completions.rewards_of((REWARDS[0], "runs/judge"), apply, {"reward": judge}, batch)
    last = np.asarray(batch["segments"]).sum(1) - 1
    inputs = {name: batch[name] for name in ("positions", "segments")}
    hidden = np.asarray(apply(model(1), batch["tokens"], **inputs).hidden)[np.arange(ROWS), last]
    np.testing.assert_allclose(each[:, 1], hidden @ score["kernel"][:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, np.nansum(np.asarray(each), axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [((), "empty"), (("a.py:f", "b.py:f"), "two are called f"), (("runs/x", "b.py:x"), "two are called x")],
)
def test_rewards_need_names_of_their_own(rewards, words):
    with pytest.raises(ValueError, match=f"objective.rewards: .*{words}"):
        objectives.make(GrpoConfig(rewards=rewards))


def test_a_penalty_without_a_reference_is_refused():
    for config in (grpo_config(beta=0.1), ppo_config()):
        objective = objectives.make(config)
        with pytest.raises(ValueError, match="reference"):
            objective.prepare(apply, {**model(0), "value": value_head()}, {}, rollout(), None)
