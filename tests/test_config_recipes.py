"""The recipes: each can be read, writes where it is expected, and starts from nothing that is not named."""

import pathlib

import pytest

from jaxlm import config as configs
from jaxlm.cli import main

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
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
