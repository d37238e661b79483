"""Every command of the README is run, on a model small enough to wait for."""

import pathlib
import re
import shlex

import pytest

from jaxlm.cli import COMMANDS, main

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=300", "data.sequence_length=32"]
SHORT = ["train.steps=2", "train.scan=false", "train.attention=reference"]


def shell_lines():
    """Command lines in blocks of `sh`, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog, again and again.\n" * 2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        yield folder


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("jaxlm ")])
def test_a_command_of_the_readme(folder, line, capsys):
    words = shlex.split(line)[1:]
    if words[0] == "train":
        words += [*SMALL, *SHORT, "mesh.data=8"]
    if "configs/sft_lora.yaml" in words:
        words += ["data.sequence_length=256", "data.mixture=null", "train.tasks=[]"]
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out or words[0] == "train"


def test_scripts_that_it_names_exist():
    for line in shell_lines():
        if not line.startswith("jaxlm "):
            assert (ROOT / line.split()[0]).exists(), line


def test_files_that_it_shows_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_table_names_every_command():
    table = re.findall(r"^\| `jaxlm (\S+)", README, flags=re.MULTILINE)
    assert sorted(table) == sorted(COMMANDS)


def test_the_python_example_runs(folder):
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        names: dict = {}
        exec(block, names)
        assert len(names["new_ids"][0]) >= 1
        assert names["logits_BxLxV"].shape[:2] == (1, 3)
