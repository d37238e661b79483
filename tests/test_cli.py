"""The command line: help that teaches, messages of one line, exit codes, and a quick start."""

import os
import re
import resource
import shlex
import subprocess
import sys

import click
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.cli import COMMANDS, main, train
from jaxlm.training.checkpoint import SaveFailed


def run(capsys, *arguments):
    """Exit code, stdout, stderr of one command line in this process."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def spent(arguments):
    """stdout and CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 0 and not err
    assert all(re.search(rf"^  {name}\s+\S", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_an_example_that_parses(capsys, name):
    code, out, err = run(capsys, name, "--help")
    assert code == 0 and not err
    (example,) = [line for line in out.splitlines() if line.startswith(f"jaxlm {name}")]
    command = cli._group.get_command(None, name)
    command.make_context(name, shlex.split(example)[2:])


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"jaxlm {jaxlm.__version__}\n", "")


REFUSED = {
    "unknown command": (["trian"], "trian: unknown command; did you mean train?"),
    "far from any command": (["xyz"], "xyz: unknown command; the commands are train, plan"),
    "no configuration": (["train"], "train: Missing argument 'CONFIG'; see jaxlm train --help"),
    "unknown option": (["train", "--foo"], "train: No such option"),
    "missing file": (["train", "missing.yaml"], "missing.yaml: no such file; "),
    "misspelt field": (
        ["train", "run.yaml", "train.evalevery=1"],
        "train.evalevery: unknown field; did you mean eval_every?",
    ),
    "no override": (["plan", "run.yaml", "steps"], "steps: not an override; write path.to.field=VALUE"),
    "broken file": (["plan", "broken.yaml"], "broken.yaml:2: not valid YAML"),
    "neither prompt nor chat": (["generate", "model"], "generate: give either --prompt or --chat; "),
    "both": (["generate", "model", "--chat", "--prompt", "x"], "generate: give either --prompt or --chat; "),
    "range": (["generate", "model", "--prompt", "x", "--top-p", "2"], "generate: Invalid value for '--top-p'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, case):
    arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("run: {dir: out}")
    (tmp_path / "broken.yaml").write_text("run: {}\nrun")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith(f"jaxlm: error: {message}") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "run.yaml"]


ERRORS = {
    "bad input": (ValueError("data.path: empty; give text"), 2, "data.path: empty; give text"),
    "several lines": (ValueError("a: b;\nc"), 2, "a: b; c"),
    "file named by the system": (
        FileNotFoundError(2, "No such file", "x.bin"),
        2,
        "x.bin: no such file; check the path",
    ),
    "file named by us": (FileNotFoundError("x.bin: no such file; make it"), 2, "x.bin: no such file; make it"),
    "not allowed": (PermissionError(13, "Permission denied", "/x"), 2, "/x: permission denied; check the path"),
    "failure in words": (
        RuntimeError("step 5: loss not finite; state saved"),
        1,
        "step 5: loss not finite; state saved",
    ),
    "failure of a room": (
        SaveFailed("runs/x: could not be saved; free space"),
        1,
        "runs/x: could not be saved; free space",
    ),
    "disk": (OSError(28, "No space left on device", "/x"), 1, "/x: no space left on device; check the path"),
    "not foreseen": (KeyError("name"), 1, "KeyError: 'name'"),
    "interrupt": (KeyboardInterrupt(), 130, None),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_become_exit_codes(capsys, monkeypatch, case):
    error, expected, message = ERRORS[case]

    def fail(**_):
        raise error

    monkeypatch.setattr(train.command, "callback", fail)
    code, _, err = run(capsys, "train", "run.yaml")
    assert code == expected
    assert err.splitlines()[-1] == ("jaxlm: interrupted" if message is None else f"jaxlm: error: {message}")
    assert ("Traceback" in err) == (case == "not foreseen")


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("JAXLM_TRACEBACK", "1")
    _, _, err = run(capsys, "train", "missing.yaml")
    assert "Traceback" in err and err.splitlines()[-1].startswith("jaxlm: error: missing.yaml: no such file")


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (143, 143)])
def test_a_commands_result_is_the_exit_code(capsys, monkeypatch, returned, code):
    monkeypatch.setattr(train.command, "callback", lambda **_: returned)
    assert run(capsys, "train", "run.yaml")[0] == code


def test_a_reader_that_goes_away_is_no_crash():
    command = f"{sys.executable} -c 'import sys; from jaxlm.cli import main; sys.exit(main([\"--help\"]))' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_module_and_help_start_quickly_and_without_jax():
    out, seconds = spent(["-m", "jaxlm", "--help"])
    assert "train" in out and seconds < 1
    out, seconds = spent(["-c", "import sys, jaxlm, jaxlm.cli; print('jax' in sys.modules, 'numpy' in sys.modules)"])
    assert out.split() == ["False", "False"] and seconds < 3


def test_public_names_exist_and_others_do_not():
    for name in jaxlm.PUBLIC:
        assert callable(getattr(jaxlm, name))
        assert name in dir(jaxlm)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        jaxlm.lode  # noqa: B018


def test_the_environment_of_jax_is_left_alone():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    code = "import os; from jaxlm.cli import main; main(['train', 'missing.yaml']); print(os.environ['XLA_FLAGS'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == environment["XLA_FLAGS"]


def test_commands_are_click_commands_with_a_summary():
    for name in COMMANDS:
        command = cli._group.get_command(None, name)
        assert isinstance(command, click.Command) and command.get_short_help_str(60).endswith(".")
        assert not command.get_short_help_str(60).endswith("...")
