"""Preference objectives and reward models against TRL's own trainers, on one batch of one tiny model, in float32."""

import collections
import functools
import tempfile
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm import objectives
from jaxlm.interop.load import load
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.objectives import preference
from jaxlm.objectives.config import DpoConfig, KtoConfig, OrpoConfig, RewardConfig, SimpoConfig

trl = pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.utils import add_fused_lm_head

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-5
SHAPE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
LENGTH = 12
PAIRS = [(3, 4, 6), (5, 2, 3), (1, 7, 1), (4, 5, 5)]
"""Tokens of prompt, chosen and rejected."""


def sequences(seed=0):
    """Prompt, chosen and rejected ids of each pair; never the padding's id."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(1, 37, size).tolist() for size in sizes) for sizes in PAIRS]


def row(ids, prompt, whole=False):
    """One row: the labels start after `prompt` tokens. `whole`: the last token is an input too."""
    ids = [*ids, 0] if whole else ids
    count = len(ids) - 1
    columns = {"tokens": ids[:-1], "targets": ids[1:], "mask": [i + 1 >= prompt for i in range(count - whole)]}
    columns |= {"segments": [1] * count, "positions": range(count)}
    return {name: np.pad(np.array([*values], np.int32), (0, LENGTH - len(values))) for name, values in columns.items()}


def stacked(rows):
    batch = {name: jnp.asarray(np.stack([r[name] for r in rows])) for name in rows[0]}
    return batch | {"mask": batch["mask"].astype(jnp.float32)}


def pairs(whole=False):
    both = [[row(p + c, len(p), whole), row(p + r, len(p), whole)] for p, c, r in sequences()]
    chosen, rejected = (stacked([pair[side] for pair in both]) for side in (0, 1))
    return {name: jnp.stack([chosen[name], rejected[name]], axis=1) for name in chosen}


@functools.cache
def peer(seed, head="CausalLM"):
    torch.manual_seed(seed)
    extra = {"num_labels": 1} if head == "SequenceClassification" else {}
    model = getattr(transformers, f"LlamaFor{head}")(transformers.LlamaConfig(**SHAPE, **extra)).eval()
    if head == "CausalLM":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def ours(model):
    """The parameters of a model of transformers, in our layout."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cfg, variables = load(folder)
        return cfg, jax.tree.map(jnp.array, variables)


def gradients(model, loss):
    """What `loss` has as its gradient, in our layout."""
    model.zero_grad()
    loss.backward()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    try:
        return ours(model)[1]["params"]
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(values[name])


def stub(kind, **attributes):
    """A trainer of TRL with no more than its loss needs."""
    trainer = object.__new__(kind)
    same = lambda x: x  # noqa: E731
    trainer.accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )
    trainer._metrics = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
    defaults = {"_total_train_tokens": 0, "_tp_size": 1, "aux_loss_enabled": False, "is_encoder_decoder": False}
    defaults |= {"precompute_ref_logps": False, "use_weighting": False, "ld_alpha": None}
    defaults |= {"f_divergence_type": "reverse_kl", "loss_weights": [1.0]}
    for name, value in {**defaults, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def measure(config, cfg, variables, batch, frozen=None):
    """Loss, metrics and gradient of ours on one batch."""
    objective = objectives.make(config)
    compute = Compute(scan=False)

    def apply(variables, tokens, model="policy", **inputs):
        return transformer.apply(cfg, variables, tokens, compute=compute, **inputs)

    @jax.jit
    def run(params, batch):
        batch = objective.prepare(apply, params, frozen or {}, batch, None)
        weights = objective.weights(batch)
        loss = lambda p: objective.loss(apply, p, frozen or {}, batch, weights, None)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, metrics), grads = run(variables, batch)
    return float(loss), {name: float(value) for name, value in metrics.items()}, grads["params"]


def compare(mine, loss, metrics, grads):
    value, found, tree = mine
    assert value == pytest.approx(loss.item(), rel=TOLERANCE)
    for name, wanted in metrics.items():
        assert found[name] == pytest.approx(wanted, rel=TOLERANCE, abs=1e-6), name
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads))
    assert largest > 1e-4
    for path, wanted in jax.tree_util.tree_leaves_with_path(grads):
        got = tree
        for key in path:
            got = got[key.key]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * largest, err_msg=str(path))


DPO = [("sigmoid", 0.3, 0.0), ("hinge", 0.5, 0.0), ("ipo", 0.2, 0.0), ("robust", 0.3, 0.2), ("sigmoid_norm", 2.0, 0.0)]


@pytest.mark.parametrize("loss, beta, smoothing", DPO)
def test_dpo_is_that_of_trl(loss, beta, smoothing):
    model, other = peer(0), peer(1)
    trainer = stub(DPOTrainer, model=model, ref_model=other, beta=beta, loss_types=[loss], label_smoothing=smoothing)
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    inputs = DataCollatorForPreference(pad_token_id=0)([dict(zip(keys, s, strict=True)) for s in sequences()])
    wanted = trainer._compute_loss(model, inputs, False)
    metrics = {name: trainer._metrics["eval"][name][0] for name in PAIR_METRICS}
    cfg, variables = ours(model)
    config = DpoConfig(loss=loss, beta=beta, label_smoothing=smoothing, reference="copy")
    mine = measure(config, cfg, variables, pairs(), {"reference": ours(other)[1]})
    compare(mine, wanted, metrics, gradients(model, wanted))


PAIR_METRICS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
PAIR_METRICS += ["logps/chosen", "logps/rejected"]


def concatenated(batch_of=sequences):
    """What the older trainers are given: padded ids, attention mask and labels of each side."""
    batch = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        rows = [(s[0] + s[side], len(s[0])) for s in batch_of()]
        longest = max(len(ids) for ids, _ in rows)
        padded = lambda values, fill, n=longest: values + [fill] * (n - len(values))  # noqa: E731
        batch[f"{name}_input_ids"] = torch.tensor([padded(ids, 0) for ids, _ in rows])
        batch[f"{name}_attention_mask"] = torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows])
        batch[f"{name}_labels"] = torch.tensor([padded([-100] * n + ids[n:], -100) for ids, n in rows])
    return batch


def test_simpo_is_that_of_trl():
    beta, gamma = 1.7, 0.6
    model = peer(0)
    trainer = stub(CPOTrainer, beta=beta, simpo_gamma=gamma, loss_type="simpo", label_smoothing=0.0, alpha=0.0)
    trainer.cpo_alpha, trainer.pad_token_id = 0.0, 0
    wanted, metrics = trainer.get_batch_loss_metrics(model, concatenated())
    mine = measure(SimpoConfig(beta=beta, gamma=gamma), *ours(model), pairs())
    compare(mine, wanted, {name: metrics[name] for name in PAIR_METRICS}, gradients(model, wanted))


def test_orpo_is_that_of_trl():
    model, beta = peer(0), 1.5
    trainer = stub(ORPOTrainer, beta=beta, padding_value=0)
    wanted, metrics = trainer.get_batch_loss_metrics(model, concatenated())
    mine = measure(OrpoConfig(beta=beta), *ours(model), pairs())
    names = [*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen"]
    compare(mine, wanted, {name: metrics[name] for name in names}, gradients(model, wanted))


def test_kto_is_that_of_trl():
    model, other, labels = peer(0), peer(2), [True, False, True, True]
    trainer = stub(KTOTrainer, model=model, ref_model=other, beta=0.2, desirable_weight=1.3, undesirable_weight=0.6)
    trainer.loss_type, trainer.calculate_KL = "kto", True
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
    kept = [(s[0], s[1]) for s in sequences()]
    rotated = [kept[-1][1]] + [answer for _, answer in kept[:-1]]
    examples = [
        {"prompt_ids": p, "completion_ids": a, "KL_completion_ids": k, "label": label}
        for (p, a), k, label in zip(kept, rotated, labels, strict=True)
    ]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    wanted = trainer._compute_loss(model, inputs, False)
    names = ["kl", *PAIR_METRICS[:3], *PAIR_METRICS[4:]]
    metrics = {name: trainer._metrics["eval"][name][0] for name in names}
    assert metrics["kl"] > 0.1, "the clamp must not hide what is compared"
    # In another order, told apart by their numbers.
    order = [2, 0, 3, 1]
    batch = stacked([row(kept[i][0] + kept[i][1], len(kept[i][0])) for i in order])
    batch |= {"label": jnp.asarray(labels)[jnp.array(order)], "row": jnp.array(order)}
    config = KtoConfig(beta=0.2, desirable_weight=1.3, undesirable_weight=0.6, reference="copy")
    cfg, variables = ours(model)
    mine = measure(config, cfg, variables, batch, {"reference": ours(other)[1]})
    compare(mine, wanted, metrics, gradients(model, wanted))


@pytest.mark.parametrize("center, margin", [(None, None), (0.05, [0.5, 0.0, -1.0, 2.0])])
def test_the_reward_model_is_that_of_trl(center, margin):
    model = peer(0, "SequenceClassification")
    trainer = stub(RewardTrainer, model=model)
    trainer.args = types.SimpleNamespace(center_rewards_coefficient=center)
    ids = [s[0] + s[side] for side in (1, 2) for s in sequences()]
    longest = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([x + [0] * (longest - len(x)) for x in ids]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in ids]),
    }
    batch = pairs(whole=True)
    if margin is not None:
        inputs["margin"], batch["margin"] = torch.tensor(margin), jnp.array(margin)
    wanted = trainer.compute_loss(model, inputs)
    names = ["min_reward", "mean_reward", "max_reward", "accuracy", "margin"]
    metrics = {name: trainer._metrics["eval"][name][0] for name in names}
    mine = measure(RewardConfig(center=center), *ours(model), batch)
    compare(mine, wanted, metrics, gradients(model, wanted))


def test_cdpo_is_the_smoothed_sigmoid_of_trl():
    rng = np.random.default_rng(3)
    chosen, rejected = (rng.normal(0, 20, 6).astype(np.float32) for _ in range(2))
    trainer = stub(CPOTrainer, beta=0.2, loss_type="sigmoid", label_smoothing=0.3, alpha=0.0)
    wanted, *_ = trainer.cpo_loss(torch.from_numpy(chosen), torch.from_numpy(rejected))
    config = DpoConfig(loss="cdpo", beta=0.2, label_smoothing=0.3)
    found = preference.LOSSES["cdpo"](config, jnp.asarray(chosen - rejected), jnp.zeros(6))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=TOLERANCE)
