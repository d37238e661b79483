"""The house: which room may import which, how long things may get, and what may not stand anywhere."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = sorted(ROOT.joinpath("jaxlm").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in LIBRARY}
FUNCTIONS = [
    (path.relative_to(ROOT), node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]

LINEN = {"Module", "compact", "initializers", "silu", "gelu", "relu"}
"""What jaxlm takes from Flax Linen, besides methods of modules."""

MODULE_METHODS = {"param", "get_variable", "has_variable", "make_rng", "has_rng"}
LIFTED = {"scan", "remat", "vmap", "jit", "checkpoint", "map_variables", "while_loop", "cond", "add_metadata_axis"}

PUBLIC_CALLS = {
    "jaxlm/interop/load.py:load",
    "jaxlm/decode/generation.py:generate",
    "jaxlm/nn/transformer.py:apply",
    "jaxlm/nn/kernels/attention.py:attention",
    "jaxlm/objectives/cross_entropy.py:cross_entropy",
}
"""Calls whose arguments are fixed by the public contract or by what they compute."""


def test_rooms_import_only_rooms_below_them():
    command = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_ladder_is_whole():
    contract = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    ladder = {room.strip(" ()") for layer in contract["layers"] for room in layer.split("|")}
    rooms = {path.relative_to(ROOT / "jaxlm").parts[0].removesuffix(".py") for path in LIBRARY}
    assert rooms - {"__init__", "__main__"} <= ladder


def test_files_are_short():
    lines = sorted(len(path.read_text().splitlines()) for path in LIBRARY)
    assert lines[-1] <= 500
    assert lines[len(lines) // 2] <= 200


def test_functions_are_short():
    lengths = sorted((node.end_lineno - node.lineno + 1, f"{path}:{node.name}") for path, node in FUNCTIONS)
    assert lengths[int(0.95 * (len(lengths) - 1))][0] <= 55
    assert lengths[-1][0] <= 120, lengths[-1]


def test_functions_have_few_arguments():
    many = {
        f"{path}:{node.name}"
        for path, node in FUNCTIONS
        if len([a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]) > 6
    }
    assert many <= PUBLIC_CALLS


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_say_what_they_are(path):
    tree = TREES[path]
    assert ast.get_docstring(tree) or not path.read_text().strip()
    public = (ast.ClassDef, ast.FunctionDef)
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, public) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare


def unannotated(node):
    """Arguments without a type, and `return` where that is missing; `self` and `cls` need none."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    extra = [a for a in (node.args.vararg, node.args.kwarg) if a]
    names = [a.arg for a in arguments + extra if a.annotation is None and a.arg not in ("self", "cls")]
    return names + (["return"] if node.returns is None and node.name != "__call__" else [])


def test_public_functions_are_annotated():
    bare = {
        f"{path}:{node.name}": names
        for path, node in FUNCTIONS
        if not node.name.startswith("_") and node in top_level(TREES[ROOT / path])
        for names in [unannotated(node)]
        if names
    }
    assert not bare


def top_level(tree):
    """Functions of a module and methods of its classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [*tree.body, *(node for one in classes for node in one.body)]


def linen_names(tree):
    """Attributes taken from flax.linen in a module, and attributes taken from `self`."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (isinstance(node, ast.Import) and alias.name == "flax.linen") or (node.__dict__.get("module") == "flax")
    }
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flax.")]
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
    }


def test_linen_is_used_narrowly():
    used = set().union(*(linen_names(tree) for tree in TREES.values()))
    assert {"Module", "compact"} <= used <= LINEN
    calls = {
        node.func.attr
        for path, tree in TREES.items()
        if "flax.linen" in path.read_text()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }
    from flax import linen

    assert {name for name in calls if hasattr(linen.Module, name)} <= MODULE_METHODS
    assert not used & LIFTED


def test_the_library_does_not_print():
    prints = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in TREES.items()
        if "cli" not in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints


def test_no_globals_and_no_todos():
    assert not [str(p) for p, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Global)]
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert not [str(path) for path in LIBRARY if marks.search(path.read_text())]


def tracked_texts():
    """Every text file that git tracks, this one left out."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file() and path != pathlib.Path(__file__):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_machine_stands_in_the_repository():
    places = re.compile(r"(?<![\w.:/])/(root|home/\w+|Users/\w+|work|mnt)/")
    registries = re.compile(
        r"https?://[^\s\"')>]*(pypi|pythonhosted|anaconda|/simple\b)|--(extra-)?index-url|find-links"
    )
    found = [
        f"{name}: {match.group()}"
        for name, text in tracked_texts()
        for match in [places.search(text), registries.search(text)]
        if match
    ]
    assert not found


def test_locks_are_exact_and_the_base_is_small():
    requirements = ROOT / "scripts" / "requirements"
    pins = {
        file.stem: [line for line in file.read_text().splitlines() if not line.startswith("#")]
        for file in requirements.glob("*.txt")
    }
    exact = re.compile(r"[a-z0-9-]+==[0-9][0-9A-Za-z.]*")
    assert all(exact.fullmatch(line) for lines in pins.values() for line in lines)
    base = {line.split("==")[0]: line for line in pins["base"]}
    assert len(base) + 1 <= 40
    assert not {"torch", "transformers", "tensorflow", "huggingface-hub"} & set(base)
    assert set(pins["base"]) <= set(pins["test"])
    assert "torch==2.13.0" in pins["test"]


def asked(requirements, extras):
    """Names of requirements, with those of the package's own extras in place of `jaxlm[...]`."""
    names = set()
    for requirement in requirements:
        name, own = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        names |= {name.lower().replace("_", "-")} if name != "jaxlm" else set()
        for extra in own.split(",") if name == "jaxlm" else []:
            names |= asked(extras[extra], extras)
    return names


def test_the_locks_have_what_the_package_asks_for():
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, requirements in (("base", []), ("test", extras["test"])):
        lines = ROOT.joinpath(f"scripts/requirements/{lock}.txt").read_text().splitlines()
        assert asked(project["dependencies"] + requirements, extras) <= {line.split("==")[0] for line in lines}
