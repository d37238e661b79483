"""Our scores against lm-eval driving transformers on the same small checkpoint, and the command line on both."""

import functools
import json
import math
import pathlib
import tempfile

import lm_eval.models.huggingface
import numpy as np
import pytest
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxlm.cli import main
from jaxlm.evals import choice, harness, perplexity, results
from jaxlm.evals.adapter import JaxLM
from jaxlm.evals.subject import load_subject

transformers.logging.set_verbosity_error()
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXT = (
    "The ship left the harbour before dawn. Nobody on the quay waved, nobody called out. A gull followed it as far "
    "as the lighthouse, then turned back. Où va-t-il? Ça dépend: ½ of the crew said north, the others shrugged."
)
QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"{word} has which colour?",
        "choices": {"text": texts, "label": list("ABCD" if i % 2 else "1234")[: len(texts)]},
        "answerKey": ("ABCD" if i % 2 else "1234")[i % len(texts)],
    }
    for i, (word, texts) in enumerate(
        [
            ("Snow", ["white", "a shade of green that nobody has seen", "red", "blue, mostly"]),
            ("Coal", ["black", "it is pink", "yellow and so on"]),
            ("The sea on a clear day, seen from the lighthouse,", ["blue", "grün", "-", "brown as the harbour wall"]),
            ("Grass", ["green", "gold"]),
            ("A ship that left the harbour before dawn and was not seen again", ["none", "white", "grey", "rust red"]),
        ]
        * 3
    )
]
LEVEL = 1e-5
"""Relative, of log-likelihoods."""


def make_tokenizer(bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@functools.cache
def checkpoint(bos: bool) -> pathlib.Path:
    """A random llama with a window of 48, and a tokenizer that adds a BOS or does not."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    path = pathlib.Path(tempfile.mkdtemp()) / "model"
    model.save_pretrained(path)
    named = {"bos_token": "<s>"} if bos else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(bos), eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE, **named
    ).save_pretrained(path)
    return path


@functools.cache
def subject(bos: bool):
    return load_subject(checkpoint(bos), batch_size=8)


@functools.cache
def peer(bos: bool):
    # Its cache of logits takes wrong positions where two continuations of different length end the same text.
    return lm_eval.models.huggingface.HFLM(
        pretrained=str(checkpoint(bos)), device="cpu", dtype="float32", batch_size=4, max_length=48, logits_cache=False
    )


def requests(kind, arguments):
    return [Instance(kind, {}, tuple(args), i) for i, args in enumerate(arguments)]


PAIRS = [
    ("The ship left", " the harbour"),
    ("The ship left  ", "the harbour"),
    ("", "Nobody waved"),
    ("", "</s>Nobody waved"),
    ("<s>Nobody", " waved"),
    ("x", "y"),
    (TEXT, " A gull followed"),
    ("Où va-t-il", "? Ça dépend: ½"),
    *((TEXT[:n], TEXT[n : n + 9]) for n in range(3, 60, 5)),
]
TEXTS = [TEXT, "x", TEXT * 3, "A gull followed it.", TEXT[:60]]


@pytest.mark.parametrize("bos", [False, True])
def test_log_likelihoods_are_those_of_transformers(bos):
    ours = JaxLM(subject(bos)).loglikelihood(requests("loglikelihood", PAIRS))
    theirs = peer(bos).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=LEVEL)
    assert [g for _, g in ours] == [g for _, g in theirs]


@pytest.mark.parametrize("bos", [False, True])
def test_rolling_log_likelihoods_are_those_of_transformers(bos):
    arguments = [(text,) for text in TEXTS]
    ours = JaxLM(subject(bos)).loglikelihood_rolling(requests("loglikelihood_rolling", arguments))
    theirs = peer(bos).loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    np.testing.assert_allclose(ours, theirs, rtol=LEVEL)


def test_perplexity_is_the_rolling_log_likelihood():
    """Texts shorter and longer than the window; bits are those of the text's own bytes."""
    for text in TEXTS:
        (nats,) = peer(True).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
        documents = [perplexity.Document("text:1", text)]
        found = perplexity.evaluate(subject(True), documents, "text").results["text"]
        tokens = len(subject(True).encode(text))
        assert found["loss,none"] == pytest.approx(-nats / tokens, rel=LEVEL)
        assert found["perplexity,none"] == pytest.approx(math.exp(-nats / tokens), rel=1e-4)
        assert found["bits_per_byte,none"] == pytest.approx(-nats / math.log(2) / len(text.encode()), rel=LEVEL)


GENERATIONS = [
    ("The ship left", {"until": "\n", "max_gen_toks": 12}),
    (TEXT, {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
    *((TEXT[n : n + 20], {"until": ["f", "o"], "max_gen_toks": 12}) for n in range(0, 60, 9)),
]


def test_generations_are_those_of_transformers():
    """And what the model says is what it finds likeliest."""
    ours = JaxLM(subject(True)).generate_until(requests("generate_until", GENERATIONS))
    theirs = peer(True).generate_until(requests("generate_until", GENERATIONS), disable_tqdm=True)
    assert ours == theirs
    assert len(set(ours)) > 5 and any(len(text) < 4 for text in ours)
    pairs = [(context, text) for (context, _), text in zip(GENERATIONS, ours) if text]
    said = [greedy for _, greedy in JaxLM(subject(True)).loglikelihood(requests("loglikelihood", pairs))]
    heard = peer(True).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert any(said) and said == [greedy for _, greedy in heard]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 48}, "max_gen_toks: 48 new tokens leave no room"),
        ({"max_gen_toks": 4, "num_beams": 2}, "generation_kwargs.num_beams: unknown"),
    ],
)
def test_generations_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        JaxLM(subject(True)).generate_until(requests("generate_until", [("x", settings)]))


def test_conversations_are_those_of_transformers():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    ours, theirs = JaxLM(subject(True)), peer(True)
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    chat.append({"role": "assistant", "content": "To the"})
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tasks(folder):
    """Local tasks of all kinds over the same questions, without a network."""
    write_lines(folder / "questions.jsonl", QUESTIONS)
    write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    files = {name: {"data_files": {"test": str(folder / f"{name}.jsonl")}} for name in ("questions", "texts")}
    tasks = {
        "colours": {
            "dataset_kwargs": files["questions"],
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "prose": {
            "dataset_kwargs": files["texts"],
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        "answers": {
            "dataset_kwargs": files["questions"],
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices.text[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return [str(folder / f"{name}.yaml") for name in tasks]


def numbers(outcome):
    return {
        (task, name): value
        for task, metrics in outcome.items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_have_the_results_of_lm_eval(tmp_path, monkeypatch, chat):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    paths = write_tasks(tmp_path)[: 1 if chat else 3]
    ours = harness.evaluate(subject(True), harness.load_tasks(paths), harness.Settings(chat=chat))
    theirs = lm_eval.simple_evaluate(
        peer(True), tasks=paths, bootstrap_iters=harness.RESAMPLES, apply_chat_template=chat,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    expected = numbers(theirs["results"])
    assert len(expected) >= (4 if chat else 7)
    assert numbers(ours.results) == pytest.approx(expected, rel=LEVEL)
    for task, lines in theirs["samples"].items():
        for mine, line in zip(ours.samples[task], lines, strict=True):
            assert mine["doc"] == line["doc"] and mine["metrics"] == line["metrics"]
            assert mine["prompt_hash"] == line["prompt_hash"]


def test_choice_is_lm_evals(tmp_path, monkeypatch):
    """The built-in evaluator: each log-likelihood, both metrics of each item, and their means and errors."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (path, *_) = write_tasks(tmp_path)
    for bos in (False, True):
        ours = choice.evaluate(subject(bos), choice.read_questions(tmp_path / "questions.jsonl"), "colours")
        theirs = lm_eval.simple_evaluate(
            peer(bos), tasks=[path], task_manager=lm_eval.tasks.TaskManager(include_defaults=False)
        )
        expected = numbers({"colours": theirs["results"]["colours"]})
        assert numbers(ours.results) == pytest.approx(expected, rel=1e-12)
        assert any(line["acc"] != line["acc_norm"] for line in ours.samples["colours"])
        for mine, line in zip(ours.samples["colours"], theirs["samples"]["colours"], strict=True):
            shared = set(mine) & set(line) - {"resps", "filtered_resps", "arguments", "target"}
            assert {"doc_id", "doc", "filter", "metrics", "acc", "acc_norm"} == shared
            assert {name: mine[name] for name in shared} == {name: line[name] for name in shared}
            assert mine["target"] == str(line["target"])
            assert [tuple(a.values()) for a in mine["arguments"].values()] == [tuple(a) for a in line["arguments"]]
            for (sum_, greedy), (their_sum, their_greedy) in zip(mine["filtered_resps"], line["filtered_resps"]):
                assert sum_ == pytest.approx(their_sum, rel=LEVEL) and greedy == their_greedy


def test_the_command_scores_tasks_and_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (path, *_) = write_tasks(tmp_path)
    tasks = f"{tmp_path / 'questions.jsonl'},{path}"
    model = str(checkpoint(True))
    assert main(["eval", model, "--tasks", tasks, "--output", str(tmp_path / "out"), "--batch-size", "8"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert found["questions"]["acc,none"] == found["colours"]["acc,none"]
    assert [line.split()[:2] for line in out.splitlines() if "stderr" not in line] == [
        [task, metric] for task in ("questions", "colours") for metric in ("acc", "acc_norm")
    ]
    assert f"{found['questions']['acc_norm,none']:.4f}" in out
    samples = [tmp_path / "out" / f"samples_{task}.jsonl" for task in ("questions", "colours")]
    assert main(["compare", *map(str, samples)]) == 0
    assert "gained 0   lost 0   McNemar p 1.0000 (exact)" in capsys.readouterr().out

    (tmp_path / "notes.md").write_text(TEXT)
    assert main(["eval", model, "--data", str(tmp_path / "notes.md"), "--output", str(tmp_path / "text")]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["loss", "perplexity", "bits_per_byte"]
    assert set(json.loads((tmp_path / "text" / "results.json").read_text())["results"]) == {"notes"}


def test_without_lm_eval_the_extra_is_named(tmp_path, monkeypatch, capsys):
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    (path, *_) = write_tasks(tmp_path)
    arguments = ["eval", str(checkpoint(True)), "--output", str(tmp_path / "out"), "--tasks"]
    assert main([*arguments, path]) == 2
    error = capsys.readouterr().err
    assert "pip install 'jaxlm[eval]'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*arguments, str(tmp_path / "questions.jsonl"), "--limit", "1"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["questions"]
    assert found["acc_stderr,none"] == "N/A" and "stderr" not in capsys.readouterr().out


REFUSED = {
    "no such task": ("missing.yaml", "missing.yaml: no such file"),
    "no such file": ("missing.jsonl", "missing.jsonl: no such file"),
    "broken task": ("broken.yaml", "broken.yaml: not a task that can be loaded"),
    "twice": ("colours.yaml,colours.jsonl", "--tasks: two tasks are called colours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tasks_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, case):
    tasks, message = REFUSED[case]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path)
    write_lines(tmp_path / "colours.jsonl", QUESTIONS)
    (tmp_path / "broken.yaml").write_text("task: [x\n")
    assert main(["eval", str(checkpoint(True)), "--tasks", tasks, "--output", "out"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"jaxlm: error: {message}") and len(error) <= 3
    assert not (tmp_path / "out").exists()


def test_lm_evals_names_and_numbers_survive_json(tmp_path):
    outcome = results.Outcome({"a/b": {"acc,none": np.float32(0.5), "acc,flexible": 1.0}}, {"a/b": [{"x": {1}}]}, {})
    results.write(results.make_directory(tmp_path / "new" / "out"), outcome)
    assert json.loads((tmp_path / "new/out/results.json").read_text())["results"]["a/b"]["acc,none"] == 0.5
    assert json.loads((tmp_path / "new/out/samples_a_b.jsonl").read_text()) == {"x": ["1"]}
    assert results.describe(outcome._replace(results={"t": {"acc,flexible": 1.0}})) == "t   acc (flexible)   1.0000"
