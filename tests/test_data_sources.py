"""Every kind of source through one door, and every fault named as file:line."""

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data import sources


def documents(path, field="text"):
    return [document.text for document in sources.read_documents(str(path), field)]


def test_the_kinds_agree(tmp_path):
    texts = ["first line\nsecond", "日本語", "third"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "extra": 1}) + "\n\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": texts}), tmp_path / "b.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"c{number}.txt").write_bytes(text.encode())
    for name in ("a.jsonl", "b.parquet", "c?.txt"):
        assert documents(tmp_path / name) == texts
    assert documents(tmp_path) == texts * 3
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert documents(tmp_path) == texts * 3


def test_byte_order_mark_and_blank_rows_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "x"}\n  \n{"body": "  "}\n{"body": "y"}')
    assert documents(tmp_path / "a.jsonl", "body") == ["x", "y"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert documents(tmp_path / "a.txt") == ["x"]


BAD_ROWS = {
    "utf8.txt": (b"fine\nfine\nb\xffd\n", r"utf8.txt:3: byte 0xff is not valid UTF-8; convert"),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"utf8.jsonl:2: byte 0xe9 is not valid UTF-8"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"json.jsonl:3: broken JSON"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, r"deep.jsonl:2: broken JSON"),
    "list.jsonl": (b'["text"]\n', r"list.jsonl:1: a JSON list, not an object"),
    "missing.jsonl": (
        b'{"text": "a"}\n{"body": "b", "n": 1}\n',
        r'missing.jsonl:2: no field "text" \(there are: body, n',
    ),
    "type.jsonl": (b'{"text": 3}\n', r'type.jsonl:1: field "text" is int, not text'),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', r"surrogate.jsonl:1: .*surrogate pair at character 1"),
    "bad.parquet": (b"PAR1 nonsense", r"bad.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_by_line(tmp_path, name):
    content, message = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name)


def test_missing_and_unknown_paths(tmp_path):
    for path in (tmp_path / "no.txt", tmp_path / "*.jsonl", "no/such/folder/anywhere"):
        with pytest.raises(FileNotFoundError, match=r"data.path: .*: no such file"):
            documents(path)
    with pytest.raises(ValueError, match=r"data.path: .* holds no .txt, .jsonl or .parquet file"):
        documents(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a.csv is no .txt, .jsonl or .parquet file"):
        documents(tmp_path / "a.csv")


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"jaxlm\[parquet\]"):
        documents(tmp_path / "a.parquet")


def test_hugging_face_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"owner/name: no such file.*install the datasets package"):
        documents("owner/name")
    asked = []

    class Rows(list):
        _fingerprint = "f1"

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "owner/gone":
            raise ConnectionError("offline")
        return Rows([{"text": "x"}, {"text": "y"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert documents("owner/name:test") == ["x", "y"] and documents("name") == ["x", "y"]
    assert asked == [("owner/name", "test"), ("name", "train")]
    assert sources.content_hash("owner/name") != sources.content_hash("owner/name:test")
    with pytest.raises(ValueError, match="cannot be read: offline"):
        documents("owner/gone")


def test_content_hash_sees_every_byte_but_not_the_name(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"hello world")
    second.write_bytes(b"hello world")
    assert sources.content_hash(str(first)) == sources.content_hash(str(second))
    second.write_bytes(b"hello worlt")
    assert sources.content_hash(str(first)) != sources.content_hash(str(second))
    both = sources.content_hash(str(tmp_path))
    first.write_bytes(b"hello worldh")
    second.write_bytes(b"ello worlt")
    assert sources.content_hash(str(tmp_path)) != both
