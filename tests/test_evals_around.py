"""Fine-tuning from end to end: tasks before and after, general text beside that of the task, what is left behind."""

import json

import jax
import numpy as np
import pytest
import transformers

import jaxlm
from jaxlm import config as configs
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.evals import docstrings
from jaxlm.evals.around import train
from jaxlm.evals.compare import compare_files
from jaxlm.evals.run import evaluate_tasks
from jaxlm.interop.templates import ZEPHYR
from jaxlm.nn.config import ModelConfig

COLOURS = ["red", "green", "blue", "black"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, chats about colours, running text, and choice questions."""
    root = tmp_path_factory.mktemp("around")
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(["the colour of the sky is red green blue black <|user|>\n <|assistant|>\n" * 4], 300)
    tokenizer.save(root / "tokenizer.json")
    cfg = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=tokenizer.size, max_length=64, eos_token_id=0)
    jaxlm.save(root / "base", cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer=root / "tokenizer.json")
    chats = [
        [{"role": "user", "content": f"the colour {i}"}, {"role": "assistant", "content": COLOURS[i % 4]}]
        for i in range(120)
    ]
    (root / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (root / "general.txt").write_text("\n".join(" ".join(rng.choice(COLOURS, 10)) for _ in range(300)))
    choices = {"text": COLOURS, "label": list("ABCD")}
    questions = [{"question": f"colour {i}", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(12)]
    (root / "colours.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return root


def settings(place, directory, **data):
    return {
        "run": {"dir": str(directory)},
        "model": {"path": str(place / "base")},
        "data": {"path": str(place / "chats.jsonl"), "template": "zephyr", "sequence_length": 32, **data},
        "objective": {"kind": "sft", "neftune": 5.0},
        "train": {
            "steps": 4, "batch_size": 8, "eval_every": 2, "prompts": [], "scan": False,
            "tasks": [str(place / "colours.jsonl")],
        },
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(place / "cache"))
        raw = settings(place, place / "run", packing=True, mixture={"path": str(place / "general.txt"), "ratio": 0.25})
        assert train(configs.build(raw)) == 0
    return place / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_are_scored_before_and_after(run, place, tmp_path):
    """As `jaxlm eval` scores the model that training started from, and the one that it left."""
    found = lines(run / "metrics.jsonl")
    for when, model, step in (("before", place / "base", 0), ("after", run, 4)):
        wanted = evaluate_tasks(str(model), [str(place / "colours.jsonl")], str(tmp_path / when))
        samples = lines(run / "evals" / when / "samples_colours.jsonl")
        for ours, theirs in zip(samples, wanted.samples["colours"], strict=True):
            assert ours["doc"] == theirs["doc"] and ours["acc"] == theirs["acc"]
            scores = [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in (ours, theirs)]
            np.testing.assert_allclose(*scores, atol=1e-4)
        (row,) = [row for row in found if "eval/colours/acc" in row and row["step"] == step]
        assert row["eval/colours/acc"] == wanted.results["colours"]["acc,none"]
    compared = compare_files(*(run / "evals" / when / "samples_colours.jsonl" for when in ("before", "after")))
    assert compared.items == 12


def test_what_is_forgotten_is_measured_on_general_text(run):
    """Held-out general text is scored at every evaluation, by the same measure as the task."""
    found = lines(run / "metrics.jsonl")
    general = {row["step"]: row["eval/general/loss"] for row in found if "eval/general/loss" in row}
    assert list(general) == [0, 2, 4] and len(set(general.values())) == 3
    assert all("eval/general/bits_per_byte" in row for row in found if "eval/loss" in row)
    steps = [row for row in found if "loss" in row]
    # A row in four is full of labels; a chat has two or three, its end included.
    assert all(2 * 32 < row["supervised_tokens"] < 8 * 32 for row in steps)


def test_the_template_goes_with_the_model(run, tmp_path):
    """The directories that are left talk as was trained, here and in transformers."""
    assert (run / "chat_template.jinja").read_text() == ZEPHYR
    talk = [{"role": "user", "content": "the colour"}]
    wanted = "<|user|>\nthe colour<|endoftext|>\n<|assistant|>\n"
    assert jaxlm.render_chat(run, talk) == jaxlm.render_chat(run / "hf", talk) == wanted
    peer = transformers.AutoTokenizer.from_pretrained(run / "hf")
    assert peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == wanted


def test_a_task_that_cannot_be_read_leaves_nothing_behind(place, tmp_path):
    raw = settings(place, tmp_path / "run")
    raw["train"]["tasks"] = [str(place / "nothing.jsonl")]
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl: no such file"):
        train(configs.build(raw))
    raw["train"]["tasks"] = [str(place / "colours.jsonl")] * 2
    with pytest.raises(ValueError, match=r"train\.tasks: two tasks are called colours"):
        train(configs.build(raw))
    assert not (tmp_path / "run").exists()


ROWS = [
    {"prompt": f"def f{i}():\n    return {i}\n\n# Summary:\n", "completion": f"Return the number called {i}.",
     "module": "m.py", "function": f"f{i}"}
    for i in range(40)
]  # fmt: skip


@pytest.mark.parametrize("task", docstrings.TASKS)
def test_docstring_questions(task, monkeypatch):
    """Four different lines, one of them the function's, at a place that tells nothing; the same every time."""
    monkeypatch.setattr(docstrings, "docstring_tasks", lambda split: ROWS if split == "validation" else [])
    questions = docstrings.TASKS[task]()
    assert questions == docstrings.TASKS[task]() and len(questions) == 40
    for question, row in zip(questions, ROWS, strict=True):
        assert question.choices[question.gold] == row["completion"] and question.prompt == row["prompt"]
        assert len(set(question.choices)) == 4 and question.answers == question.choices
        wrong = [choice for i, choice in enumerate(question.choices) if i != question.gold]
        if task == "docstrings":
            assert set(wrong) <= {other["completion"] for other in ROWS}
        else:
            assert all(sorted(line.split()) == sorted(row["completion"].split()) for line in wrong)
    places = [question.gold for question in questions]
    assert min(places.count(i) for i in range(4)) >= 3


def test_lines_with_few_words_are_not_shuffled(monkeypatch):
    few = [row | {"completion": "Return it."} for row in ROWS[:1]]
    monkeypatch.setattr(docstrings, "docstring_tasks", lambda split: few)
    assert docstrings.docstrings_shuffled() == []
