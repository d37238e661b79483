"""The recipes: each can be read, writes where it is expected, and starts from nothing that is not named."""

import json
import pathlib

import jax
import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm.cli import main
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.evals.compare import compare_files
from jaxlm.nn.config import ModelConfig

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
COLOURS = ["red", "green", "blue", "black"]
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("merge_"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_writes_under_its_own_name(path):
    recipe = configs.load(path)
    assert recipe.run.dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# "), "a recipe says what it is for"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_starts_from_is_named_where_it_is_missing(path, tmp_path, monkeypatch, capsys):
    """Exit code 2, the directory in the last line, and nothing left behind."""
    start = configs.load(path).model.path
    if start is None:
        return
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path)]) == 2
    assert start in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_7b_case_in_small(tmp_path, monkeypatch):
    """Every part of the recipe on a model of the same kind: a quantised base, Alpaca's rows, tasks before and after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    rows = [
        {"instruction": f"Name colour {i}.", "input": "sky" if i % 2 else "", "output": f"It is {COLOURS[i % 4]}."}
        for i in range(120)
    ]
    questions = [
        {"question": f"Colour {i}?", "choices": {"text": COLOURS, "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}
        for i in range(8)
    ]
    for name, lines in (("rows.jsonl", rows), ("arc.jsonl", questions)):
        pathlib.Path(name).write_text("\n".join(map(json.dumps, lines)))
    tokenizer = train_tokenizer([row["output"] for row in rows], 280)
    tokenizer.save("tokenizer.json")
    shape = {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 128, "vocab_size": tokenizer.size}
    cfg = ModelConfig(**shape, tie_embeddings=False, max_length=512, eos_token_id=tokenizer.eos_id, family="mistral")
    jaxlm.save("base", cfg, jaxlm.init(cfg, jax.random.key(0)), tokenizer="tokenizer.json")
    overrides = ["model.path=base", *(f"model.{name}={value}" for name, value in shape.items())]
    overrides += [
        "data.path=rows.jsonl",
        "data.sequence_length=384",
        "train.steps=3",
        "train.batch_size=16",
        "train.tasks=[arc.jsonl]",
    ]
    recipe = configs.load(FOLDER / "qlora_mistral7b_alpaca.yaml", overrides)
    assert jaxlm.train(recipe) == 0
    run = pathlib.Path(recipe.run.dir)
    assert json.loads((run / "hf" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert compare_files(*(run / "evals" / when / "samples_arc.jsonl" for when in ("before", "after"))).items == 8
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[0]
