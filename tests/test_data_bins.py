"""Token bins and the cache that holds them: round trips, damage, races, ids outside the vocabulary."""

import errno
import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from jaxlm.data import bins as bins_module
from jaxlm.data.bins import BinWriter, check_ids, is_bins, open_bins
from jaxlm.data.cache import cache_root, cached
from jaxlm.data.packing import RunningRows
from jaxlm.data.prepare import bins_tokenizer, prepare
from jaxlm.data.tokenizer import encode_documents, train_tokenizer

TOKENIZER = train_tokenizer(["some text, some more text"], 270)


def write(folder, documents, tokenizer=TOKENIZER):
    with BinWriter(folder, tokenizer) as writer:
        for document in documents:
            writer.append(np.array(document, np.uint32))
    return open_bins(folder)


def test_round_trip(tmp_path):
    documents = [[5, 6, 7], [1], [], [268, 0]]
    bins = write(tmp_path, documents)
    assert bins.tokens.dtype == np.uint16 and bins.tokens.tolist() == [5, 6, 7, 1, 268, 0]
    assert bins.documents.tolist() == [0, 3, 4, 6]  # an empty document leaves no trace
    manifest = bins.manifest
    assert [manifest[name] for name in ("tokens", "documents", "min_id", "max_id")] == [6, 3, 0, 268]
    assert manifest["tokenizer_sha256"] == TOKENIZER.sha256 and manifest["eos_id"] == TOKENIZER.eos_id
    assert is_bins(tmp_path) and not is_bins(tmp_path / "validation") and not is_bins(None)


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large:
        size, sha256, eos_id = 70_000, "x", None

    assert write(tmp_path, [[69_999, 1]], Large()).tokens.tolist() == [69_999, 1]
    assert (tmp_path / "tokens.bin").stat().st_size == 8


def test_empty(tmp_path):
    assert write(tmp_path, []).tokens.shape == (0,)


def test_reading_a_row_does_not_depend_on_the_size(tmp_path):
    """O(1): a row of a file a thousand times larger reads as many pages, and takes about as long."""
    seconds = []
    for name, documents in (("small", 20), ("large", 20_000)):
        with BinWriter(tmp_path / name, TOKENIZER) as writer:
            for _ in range(documents):
                writer.append(np.ones(100, np.uint32))
        bins = open_bins(tmp_path / name)
        rows = RunningRows(bins, 64, 270, 0, len(bins.tokens))
        picks = np.random.default_rng(0).integers(0, len(rows), 300)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for pick in picks:
                rows[int(pick)]
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    assert seconds[1] < 3 * seconds[0]


def test_ids_outside_the_vocabulary_are_named(tmp_path, monkeypatch):
    bins = write(tmp_path, [[1, 2], [3, 200, 4, 201]])
    open_bins(tmp_path, 202)
    with pytest.raises(ValueError, match=r"tokens.bin: token 3 \(in document 2, from 1\) is id 200, .* of 200"):
        open_bins(tmp_path, 200)
    raw = np.fromfile(tmp_path / "tokens.bin", "<u2")
    raw[1] = 60_000
    raw.tofile(tmp_path / "tokens.bin")  # changed behind the manifest's back
    with pytest.raises(ValueError, match=r"token 1 \(in document 1, from 1\) is id 60000"):
        open_bins(tmp_path, 270)
    with pytest.raises(ValueError, match=r"tokens.bin: its content differs from manifest.json"):
        open_bins(tmp_path)
    raw[1] = 2
    raw.tofile(tmp_path / "tokens.bin")
    monkeypatch.setattr(bins_module, "VERIFY_BYTES", 0)
    check_ids(bins, 270)  # too large to read at every start: the manifest is believed, rows are checked when read
    with pytest.raises(ValueError, match=r"token 3 .* is id 200"):
        check_ids(bins, 100)


def test_damage_is_named(tmp_path):
    write(tmp_path, [[1, 2, 3]])
    content = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"tokens.bin: 5 bytes, manifest.json says 6"):
        open_bins(tmp_path)
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens.bin: no such file"):
        open_bins(tmp_path)
    for manifest in ("{", "[]", json.dumps({"format": "other"})):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"manifest.json: not a manifest"):
            open_bins(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json: no such file"):
        open_bins(tmp_path)


def test_an_unfinished_folder_is_no_bins(tmp_path):
    with pytest.raises(KeyError), BinWriter(tmp_path, TOKENIZER) as writer:
        writer.append(np.array([1], np.uint32))
        raise KeyError
    assert not is_bins(tmp_path)


def test_content_sees_changes_in_large_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr(bins_module, "VERIFY_BYTES", 1000)
    write(tmp_path, [np.ones(1_000_000, np.uint32)])
    before = open_bins(tmp_path).content
    with (tmp_path / "tokens.bin").open("r+b") as stream:
        stream.seek(30)
        stream.write(b"\x07")
    assert open_bins(tmp_path).content != before


def test_prepare(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(200):
        (text / f"{number:03}.txt").write_text(f"document {number} says something. " * (1 + number % 7))
    bins = prepare(str(text), tmp_path / "out", vocab_size=300)
    held_out = open_bins(tmp_path / "out" / "validation")
    tokenizer = bins_tokenizer(bins)
    assert tokenizer.eos_id == tokenizer.backend.token_to_id("<|endoftext|>")
    decoded = {
        tokenizer.decode(part.tokens[start:stop], skip_special_tokens=True)
        for part in (bins, held_out)
        for start, stop in zip(part.documents, part.documents[1:], strict=False)
    }
    assert decoded == {file.read_text() for file in text.iterdir()}
    assert 0.01 < held_out.manifest["documents"] / 200 < 0.15
    expected = [ids.tolist() for ids in encode_documents(tokenizer, [(text / "000.txt").read_text()])]
    assert bins.tokens[: len(expected[0])].tolist() == expected[0] or expected[0][0] in held_out.tokens
    with pytest.raises(ValueError, match=r"out: not an empty folder"):
        prepare(str(text), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text(TOKENIZER.json)
    with pytest.raises(ValueError, match=r"tokenizer.json: not the tokenizer that made the bins"):
        bins_tokenizer(bins)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"set data.tokenizer"):
        bins_tokenizer(bins)


def slow_write(folder):
    (folder / "who").write_text(str(os.getpid()))
    time.sleep(0.3)


def read_who(folder):
    return (folder / "who").read_text()


def race(queue):
    queue.put(cached("key", slow_write, read_who))


def test_processes_that_race_end_with_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=race, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert len(set(answers)) == 1 and answers[0] == cached("key", slow_write, read_who)


def test_cache_mends_damage_and_leaves_nothing_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
    (tmp_path / "key").mkdir()  # a folder without its file
    assert cached("key", slow_write, read_who) == str(os.getpid())

    def fail(folder):
        raise KeyError

    with pytest.raises(KeyError):
        cached("other", fail, read_who)

    def full(folder):
        raise OSError(errno.ENOSPC, "disk full")

    old = tmp_path / ".other.1.abcd"  # left by a process that was killed days ago
    old.mkdir()
    os.utime(old, (0, 0))
    with pytest.raises(OSError, match=r"No space left on device; free some space or set JAXLM_CACHE"):
        cached("other", full, read_who)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "jaxlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "jaxlm"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "file" / "cache"))
    assert cached("key", slow_write, read_who) == str(os.getpid())
