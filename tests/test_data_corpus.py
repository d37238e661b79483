"""The embedded corpus, and how texts and examples are divided."""

import ast
import sysconfig

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import corpus
from jaxlm.data.sources import Document
from jaxlm.data.splits import fraction, hold_out_rows, is_held_out, split_documents


@pytest.fixture(scope="module")
def documents():
    return corpus.standard_library()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return corpus.docstring_tasks("train"), corpus.docstring_tasks("validation")


def test_what_is_in_it(documents):
    root = sysconfig.get_path("stdlib")
    modules = {d.where.removeprefix(root).lstrip("/") for d in documents if d.where.startswith(root)}
    assert {"ast.py", "json/decoder.py", "argparse.py"} <= modules
    for left_out in ("test/", "idlelib/", "lib2to3/", "site-packages/", "encodings/"):
        assert not any(module.startswith(left_out) for module in modules)
    assert len({d.text for d in documents}) == len(documents)
    assert 3e6 < sum(len(d.text) for d in documents) < 3e7
    reference = [d for d in documents if corpus.TOPICS in d.where]
    assert len(reference) > 50 and any("assert_stmt" in d.text for d in reference)


def test_the_split_is_by_module(documents):
    parts = list(split_documents(lambda: documents)())
    assert [part.text for part in parts] == [d.text for d in documents]  # whole, in order
    sides = {}
    for part, document in zip(parts, documents, strict=True):
        sides.setdefault(document.group, set()).add(part.held_out)
    assert all(len(side) == 1 for side in sides.values())
    share = sum(len(part.text) for part in parts if part.held_out) / sum(len(part.text) for part in parts)
    assert 0.02 < share < 0.1
    assert not is_held_out(corpus._group(corpus.TOPICS)), "the reference is for training"


def test_its_hash_follows_the_content(documents):
    first = corpus.corpus_hash(documents)
    changed = documents[0]._replace(text=documents[0].text + " ")
    assert corpus.corpus_hash(documents) == first != corpus.corpus_hash([changed, *documents[1:]])


def test_without_sources_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no sources of the standard library; set data.path"):
        corpus.standard_library()


def test_docstring_tasks(tasks):
    train, held_out = tasks
    assert len(train) > 1000 and len(held_out) > 50
    assert {row["module"] for row in train}.isdisjoint(row["module"] for row in held_out)
    pairs = [(row["prompt"], row["completion"]) for row in train + held_out]
    assert len(set(pairs)) == len(pairs)
    count = {}
    for row in train + held_out:
        count[row["module"]] = count.get(row["module"], 0) + 1
        assert len(row["completion"]) >= 15 and "\n" not in row["completion"]
    assert max(count.values()) == corpus.FUNCTIONS_PER_MODULE
    for row in train[:200]:
        function = ast.parse(row["prompt"]).body[0]
        assert function.name == row["function"] and ast.get_docstring(function) is None


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200), st.integers(100, 400))
def test_few_documents_are_cut_into_blocks(line, repeats):
    text = (line + "\n") * repeats
    documents = [Document("a.txt:1", text)]
    parts = list(split_documents(lambda: documents)())
    assert "".join(part.text for part in parts) == text
    held_out = sum(len(part.text) for part in parts if part.held_out)
    assert held_out > 0 and abs(held_out - 0.05 * len(text)) < 0.03 * len(text) + 2100
    assert any(not part.held_out for part in parts)


def test_large_files_give_several_blocks_at_line_ends():
    text = "".join(f"line {number}\n" for number in range(100_000))
    parts = list(split_documents(lambda: [Document("a.txt:1", text)])())
    assert sum(part.held_out for part in parts) > 8
    assert all(part.text.endswith("\n") for part in parts)


def test_repeated_documents_are_never_on_both_sides():
    documents = [Document(f"a:{i}", f"text {i % 300}" if i < 900 else f"  TEXT  {i % 300}") for i in range(1200)]
    sides = {True: set(), False: set()}
    for part in split_documents(lambda: documents)():
        sides[part.held_out].add(" ".join(part.text.casefold().split()))
    assert sides[True] and sides[True].isdisjoint(sides[False])


def test_rows_are_held_out_by_key():
    keys = [f"prompt {i // 2}" for i in range(1000)]
    held_out = hold_out_rows(keys)
    assert held_out == hold_out_rows(keys) and 0.03 < sum(held_out) / 1000 < 0.07
    assert {k for k, h in zip(keys, held_out, strict=True) if h}.isdisjoint(
        k for k, h in zip(keys, held_out, strict=True) if not h
    )
    assert not any(hold_out_rows(keys[:99])) and not any(hold_out_rows(["same"] * 500))


def test_fractions_are_spread_evenly():
    values = sorted(fraction(str(number)) for number in range(4000))
    assert max(abs(value - rank / 4000) for rank, value in enumerate(values)) < 0.04
    assert fraction("A  b") == fraction("a B ") != fraction("a c")
