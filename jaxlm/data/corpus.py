"""The embedded corpus: the running interpreter's own standard library, read from the user's machine.

Documents are the sources of its modules (docstrings included) and the language reference of `pydoc_data.topics`. They
are split into train and validation by a hash of the module's path, so near-duplicates inside a module stay together.
The set differs from one Python build to the next; its content is part of the data fingerprint.
"""

import ast
import importlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jaxlm.data.cache import cached
from jaxlm.data.sources import Document, digest
from jaxlm.data.splits import is_held_out

Split = Literal["train", "validation"]

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "lib-dynload"} | {
    *("__pycache__", "pydoc_data", "encodings")
}
"""Folders without prose or code of the library: its tests, foreign packages, and the generated tables of codecs."""

TOPICS = "pydoc_data/topics.py"
FUNCTIONS_PER_MODULE = 40
SPLIT = "21"
"""Put before a module's path when it is hashed. Chosen among forty for evenness alone, over several builds of Python:
4.5 to 4.7 % of the bytes are held out, from 25 modules or more, none of which has a seventh of them."""

DOCSTRING_VERSION = 1


def standard_library() -> list[Document]:
    """The embedded corpus, in a fixed order; `group` is the module's path behind `SPLIT`.

    Raises:
      FileNotFoundError: this interpreter has no sources on disk (a frozen build).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    seen = set()
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if LEFT_OUT.isdisjoint(module.parts[:-1]):
            text = _source(path)
            if text.strip() and (key := digest(text)) not in seen:
                seen.add(key)
                documents.append(Document(str(path), text, _group(module.as_posix())))
    if not documents:
        raise FileNotFoundError(f"{root}: no sources of the standard library; set data.path to a text of your own")
    return documents + _reference()


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over the groups and texts of the corpus, in order."""
    return digest(*(part for document in documents for part in (document.group or "", document.text)))


def docstring_tasks(split: Split) -> list[dict[str, str]]:
    """Functions of the standard library, without their docstring, and what the first line of it said.

    Args:
      split: `train` or `validation`; the split is that of the embedded corpus, by module.

    Returns:
      Rows with `prompt` (the function and a heading), `completion` (the line), `module` and `function`. At most 40
      functions a module, no row twice, lines of 15 characters or more, bodies of 20 to 600.
    """
    documents = [document for document in standard_library() if document.group != _group(TOPICS)]
    key = f"docstrings-{DOCSTRING_VERSION}-{corpus_hash(documents)[:32]}"

    def write(folder: Path) -> None:
        rows = list(_docstring_rows(documents))
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")

    def read(folder: Path) -> list[dict[str, str]]:
        return json.loads((folder / "rows.json").read_text(encoding="utf-8"))

    held_out = split == "validation"
    return [row for row in cached(key, write, read) if is_held_out(_group(row["module"])) == held_out]


def _group(module: str) -> str:
    return f"{SPLIT}:{module}"


def _source(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):  # a file of another encoding, or one that only root may read
        return ""


def _reference() -> list[Document]:
    """The language reference, by topic; one group, because topics quote each other."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions split it off
        return []
    first_names = {topics[name]: name for name in sorted(topics, reverse=True)}  # some texts stand under two names
    return [Document(f"{TOPICS}:{name}", text, _group(TOPICS)) for text, name in reversed(first_names.items())]


def _docstring_rows(documents: list[Document]) -> Iterator[dict[str, str]]:
    seen: set[tuple[str, str]] = set()
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        module = (document.group or "").removeprefix(_group(""))
        count = 0
        for node in ast.walk(tree):
            task = _docstring_task(node)
            if task is None or task in seen:
                continue
            seen.add(task)
            prompt, completion = task
            name = getattr(node, "name", "")
            yield {"prompt": prompt, "completion": completion, "module": module, "function": name}
            count += 1
            if count == FUNCTIONS_PER_MODULE:
                break


def _docstring_task(node: ast.AST) -> tuple[str, str] | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    docstring = ast.get_docstring(node)
    line = docstring.strip().splitlines()[0].strip() if docstring and docstring.strip() else ""
    body = node.body[1:]
    if len(line) < 15 or line.startswith("See ") or not body:
        return None
    source = "\n".join(ast.unparse(statement) for statement in body)
    if not 20 <= len(source) <= 600:
        return None
    code = f"def {node.name}({ast.unparse(node.args)}):\n" + textwrap.indent(source, "    ")
    return f"{code}\n\n# Summary:\n", line
