"""Runs that learn from their own completions: shapes, rewards, resuming to the last bit, and what can go wrong."""

import json

import jax
import numpy as np
import pytest
import transformers

from jaxlm import config as configs
from jaxlm.data.prompts import PromptRows
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.decode import together
from jaxlm.decode.sampling import Choice
from jaxlm.objectives import completions
from jaxlm.objectives.config import PpoConfig
from jaxlm.training import answers, penalty, rewards, rollout, setup
from jaxlm.training.loop import train
from jaxlm.training.step import Extra

pytestmark = pytest.mark.usefixtures("own_cache")

FUNCTION = """
calls = []
def letters(prompts, completions, word, **columns):
    assert len(prompts) == len(completions) == len(word) and set(columns) == {"answer", "number"}
    calls.append(len(prompts))
    return [None if text == "" else sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
GROUP, NEW, PROMPTS = 2, 5, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts of unequal length, a reward function that needs a column, and one that does everything wrong."""
    path = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"{w} " * (1 + n % 3), "word": w, "answer": w, "number": n} for n, w in enumerate(WORDS * 2)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (path / "good.py").write_text(FUNCTION)
    return path


def settings(folder, directory, objective=None, train_changes=None, **sections):
    grpo = {"kind": "grpo", "group_size": GROUP, "max_new_tokens": NEW, "epochs": 2, "beta": 0.1}
    steps = {"steps": 4, "batch_size": PROMPTS, "accumulation": 2, "eval_every": 4, "checkpoint_every": 2}
    raw = {
        "run": {"dir": str(directory), "seed": 3},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 270},
        "data": {"path": str(folder / "prompts.jsonl"), "validation": str(folder / "held_out.jsonl")},
        "objective": {"rewards": [f"{folder / 'good.py'}:letters"]} | (objective or grpo),
        "train": steps | {"attention": "reference", "scan": False, "prompts": []} | (train_changes or {}),
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "mesh": {"data": 2, "tensor": 2, "fsdp": 2},
    }
    raw["data"]["sequence_length"] = 32
    return configs.build(raw | sections)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run from start to end, and how many programs its sampling took."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    before = together._run._cache_size()
    assert train(settings(folder, directory)) == 0
    return directory, together._run._cache_size() - before


def test_a_run_writes_what_peers_call_by_these_names(whole):
    steps = [row for row in lines(whole[0]) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    names = "reward reward_std rewards/letters/mean frac_reward_zero_std completions/mean_length entropy kl"
    assert {*names.split(), "clip_ratio/region_mean", "tokens", "grad_norm"} <= set(steps[0])
    assert all(np.isfinite(value) for row in steps for value in row.values())
    assert 1 <= steps[0]["completions/mean_length"] <= NEW
    evaluations = [row for row in lines(whole[0]) if "eval/items" in row]
    assert [row["step"] for row in evaluations] == [0, 4]
    assert all(row["eval/items"] == 5 and 0 <= row["eval/exact_match"] <= 1 for row in evaluations)


def test_no_step_needs_a_program_of_its_own(whole):
    assert whole[1] == 2, "one for samples, one for greedy answers, whatever the lengths of a step's prompts"


def test_answers_before_and_after_can_be_compared(whole):
    for when in ("before", "after"):
        items = (whole[0] / "evals" / when / answers.FILE).read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in items] == list(range(5))
        assert json.loads(items[0])["metrics"] == ["exact_match"]


def test_an_interrupted_run_ends_as_one_that_was_not(folder, whole, tmp_path):
    directory = tmp_path / "halves"
    stopping = settings(folder, directory)

    class Stop(Exception):
        pass

    def stopped(*args, **kwargs):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.training.finish.finish", stopped)
        patch.setattr("jaxlm.training.loop.stopping.should_stop", lambda state, patience: False)
        original = rollout.make

        def until_step_2(setup_):
            roll = original(setup_)
            return lambda params, frozen, batch, step: stopped() if step == 3 else roll(params, frozen, batch, step)

        patch.setattr("jaxlm.training.loop.rollout.make", until_step_2)
        with pytest.raises(Stop):
            train(stopping)
    assert train(stopping) == 0
    found = {row["step"]: row for row in lines(directory) if "loss" in row}
    assert found == {row["step"]: row for row in lines(whole[0]) if "loss" in row}
    a, b = ((d / "hf" / "model.safetensors").read_bytes() for d in (directory, whole[0]))
    assert a == b


@pytest.fixture(scope="module")
def ready(folder, tmp_path_factory):
    """A run that has not begun, its weights, and a rollout."""
    made = setup.prepare(settings(folder, tmp_path_factory.mktemp("runs") / "ready"))
    with jax.set_mesh(made.program.mesh):
        frozen = setup.load_frozen(made.config, made.program)
        params = setup.start(None, made.program, frozen).params
    return made, params, frozen


def test_rollouts_depend_on_weights_seed_and_step_alone(ready):
    made, params, frozen = ready
    batch = setup.global_batch(made.data.train, made.loader.rows(0), made.program.mesh)
    with jax.set_mesh(made.program.mesh):
        first, again, other = (
            jax.tree.map(np.asarray, rollout.make(made)(params, frozen, batch, step)) for step in (0, 0, 1)
        )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["tokens"], other["tokens"])
    assert first["tokens"].shape == (PROMPTS * GROUP, rollout.roller_of(made).length)
    rows = rollout.rows_of(made.data.train)
    for i, row in enumerate(np.repeat(made.loader.rows(0), GROUP)):
        prompt, labels = rows.ids[row], np.flatnonzero(first["mask"][i])
        assert first["tokens"][i, : len(prompt)].tolist() == prompt
        assert labels[0] == len(prompt) - 1 and 1 <= len(labels) <= NEW
        assert first["segments"][i].sum() == len(prompt) + len(labels)
        np.testing.assert_array_equal(first["targets"][i, labels], first["tokens"][i, labels + 1])
    assert len({tuple(row) for row in first["tokens"][:GROUP]}) > 1, "members of a group are independent draws"


def test_the_sampler_and_the_training_forward_agree_on_probabilities(ready):
    made, params, frozen = ready
    roller, rows = rollout.roller_of(made), rollout.rows_of(made.data.train)

    @jax.jit
    def forward(params, batch):
        output = completions.run(made.program.recipe.apply, params, batch)
        return completions.statistics(output, batch["targets"], 0.8)[0]

    with jax.set_mesh(made.program.mesh):
        drawn = roller.draw(rows, list(range(16)), params, frozen, Choice(temperature=0.8, seed=1))
        batch = roller.batch(drawn)
        log_probs = np.asarray(forward(params, batch))
    for row in range(16):
        there = np.flatnonzero(batch["mask"][row])
        np.testing.assert_allclose(log_probs[row, there], drawn.samples.log_probs[row, : len(there)], atol=1e-4)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model's directory, of another shape than the policy."""
    path = tmp_path_factory.mktemp("models") / "judge"
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=270, num_labels=1, pad_token_id=0, **shape)
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def test_ppo_with_adapters_a_reward_model_and_a_penalty_that_follows(folder, judge, tmp_path):
    objective = {"kind": "ppo", "max_new_tokens": NEW, "epochs": 2, "kl_target": 6.0}
    objective |= {"rewards": [f"{folder / 'good.py'}:letters", str(judge)]}
    directory, steps = tmp_path / "ppo", {"steps": 1, "eval_every": 1}
    model = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 270}
    sections = {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}, "model": model, "mesh": {"data": 4, "tensor": 2}}
    assert train(settings(folder, directory, objective, steps, **sections)) == 0
    first = next(row for row in lines(directory) if "loss" in row)
    names = "objective/kl objective/entropy objective/scores objective/rlhf_reward policy/approxkl_avg"
    names += " policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio rewards/judge/mean objective/kl_coef"
    assert set(names.split()) <= set(first)
    assert all(np.isfinite(value) for value in first.values())
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4), "nothing has moved from the reference yet"
    assert list((directory / "hf").glob("*.safetensors"))


BAD = """
def raises(prompts, completions, **columns): raise KeyError("word")
def short(prompts, completions, **columns): return [0.0]
def words(prompts, completions, **columns): return ["good"] * len(prompts)
def nothing(prompts, completions, **columns): return None
def infinite(prompts, completions, **columns): return [float("inf")] * len(prompts)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "bad.py:raises: raised KeyError: 'word' in line 2; "),
        ("short", "bad.py:short: returned 1 rewards for 3 completions"),
        ("words", "bad.py:words: reward 0 is 'good', not a finite number"),
        ("nothing", "bad.py:nothing: returned NoneType, not a list"),
        ("infinite", "bad.py:infinite: reward 0 is inf, not a finite number"),
    ],
)
def test_a_reward_function_that_fails_is_named_in_one_line(tmp_path, name, words):
    (tmp_path / "bad.py").write_text(BAD)
    [reward] = rewards.load_rewards([f"{tmp_path / 'bad.py'}:{name}"])
    with pytest.raises(RuntimeError) as error:
        reward(["a"] * 3, ["b"] * 3, {})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "text", "words"),
    [
        ("missing.py:f", None, "missing.py:f: no such file"),
        ("file.py:g", "def f(): pass", "file.py:g: no function of that name .*there are: f"),
        ("file.py:f", "1 / 0", "file.py:f: the file raised ZeroDivisionError: division by zero"),
        ("no.such.module:f", None, "No module named"),
        ("runs/judge", None, "runs/judge: no such directory"),
    ],
)
def test_a_reward_that_cannot_be_found_is_named(tmp_path, monkeypatch, entry, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "file.py").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"objective.rewards: .*{words}"):
        rewards.load_rewards([entry])


def test_rewards_are_numbers_or_not_scorable(tmp_path):
    (tmp_path / "r.py").write_text(
        "import numpy\ndef f(prompts, completions, x, **rest): return [1, None, numpy.float32(0.5), True]"
    )
    [reward] = rewards.load_rewards([f"{tmp_path / 'r.py'}:f"])
    np.testing.assert_array_equal(reward(["p"] * 4, ["c"] * 4, {"x": [0] * 4}), [1.0, np.nan, 0.5, 1.0])


def test_a_completion_ends_with_the_first_token_that_has_the_stop_text():
    tokenizer = train_tokenizer(["one two\nthree\n" * 40], 270)
    ends = rollout.tokens_with(tokenizer, "\n")
    assert ends and all("\n" in tokenizer.decode([token]) for token in ends)
    assert not any("\n" in tokenizer.decode([t]) for t in range(tokenizer.size) if t not in ends)
    with pytest.raises(ValueError, match=r"objective\.stop: 'zebra'"):
        rollout.tokens_with(tokenizer, "zebra")


def test_continuations_keep_what_a_decoder_would_strip():
    tokenizer = train_tokenizer(["alpha beta gamma"], 270)
    prompt, new = tokenizer.encode("alpha"), tokenizer.encode(" beta")
    assert rollout.continuations(tokenizer, [prompt], [[*new, tokenizer.eos_id]]) == [" beta"]


def test_columns_of_rows_that_differ():
    rows = PromptRows(["a", "b", "c"], [{"x": 1}, {"y": 2}, {}], [[1], [2], [3]])
    assert rows.columns_of([0, 0, 1]) == {"x": [1, 1, None], "y": [None, None, 2]}
    assert [int(rows[i]["row"]) for i in (0, 2, -1)] == [0, 2, 2]
    assert rows.spread(2).prompts == ["a", "b"] and rows.spread(5) is rows


def test_a_penalty_that_follows_its_target():
    made = penalty.extra(PpoConfig(kl_coef=0.1, kl_target=6.0, kl_horizon=1000.0, epochs=2), rows=100)
    state = made.start()
    for _ in range(2):
        state, metrics = made.adjust(state, {"objective/kl": jax.numpy.float32(60.0)})
    assert float(metrics["objective/kl_coef"]) == pytest.approx(0.1 * 1.01)
    assert float(state["kl_coef"]) == pytest.approx(0.1 * 1.01**2)
    assert penalty.extra(PpoConfig(), 8) is None and penalty.joined([None, None]) is None
    both = penalty.joined([made, Extra(lambda: {"other": 1}, lambda s, m: (s | {"other": s["other"] + 1}, m))])
    state, _ = both.adjust(both.start(), {"objective/kl": jax.numpy.float32(6.0)})
    assert state["other"] == 2 and float(state["kl_coef"]) == pytest.approx(0.1)
