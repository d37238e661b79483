"""Prompts with columns, and the embedded questions with exact answers."""

import collections
import json

import pytest

from jaxlm.data.config import DataConfig
from jaxlm.data.prompts import prompt_records, read_prompts
from jaxlm.data.questions import answer_of, closing_questions, exact_match, prompt_of
from jaxlm.data.sources import Record
from jaxlm.data.supply import open_data
from jaxlm.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["alpha beta gamma delta"] * 5, 270)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("    return max(map(len, names", "))"),
        ("def area(width, height", "):"),
        ("x = table[key(a)[0", "]]"),
        ("if (a and b[c", "]):"),
        ("call({'a'", "})"),
        ("closed(x)", ""),
        ("wrong(x]", ""),
    ],
)
def test_the_answer_closes_what_is_open_and_opens_a_block(prompt, answer):
    assert answer_of(prompt) == answer


def test_lines_become_questions_only_if_the_answer_follows_from_them():
    assert prompt_of("    value = table[index(x)]") == "    value = table[index(x"
    assert prompt_of("for item in sorted(names):") == "for item in sorted(names"
    for line in ("x = f()", "result = call(a), other", "return g(a)  # note", "    'text (here)'", "a = )))", "f(a, b"):
        assert prompt_of(line) is None


def test_questions_are_held_out_by_module_and_no_answer_is_common():
    parts = {split: closing_questions(split) for split in ("train", "validation")}
    modules, prompts = ({s: {row[name] for row in rows} for s, rows in parts.items()} for name in ("module", "prompt"))
    assert not modules["train"] & modules["validation"]
    assert not prompts["train"] & prompts["validation"]
    for rows in parts.values():
        assert len({row["prompt"] for row in rows}) == len(rows) >= 200
        assert all(row["answer"] == answer_of(row["prompt"]) != "" for row in rows)
        most = collections.Counter(row["answer"] for row in rows).most_common(1)[0][1]
        assert most <= 0.4 * len(rows), "always giving one answer must not look like knowing"


def test_exact_match():
    assert exact_match(["p"] * 4, [" )", "))", "", ")"], [")", ")", ")", None]) == [1.0, 0.0, 0.0, None]


def test_rows_keep_their_columns_and_long_prompts_their_end(tokenizer):
    fields = [{"prompt": "alpha beta", "answer": "x"}, {"prompt": "alpha beta gamma delta", "n": 3}]
    rows, cut = read_prompts([Record(f"f:{i}", f) for i, f in enumerate(fields, 1)], tokenizer, 3)
    assert cut >= 1 and rows.longest == 3
    assert rows.columns == [{"answer": "x"}, {"n": 3}]
    assert rows.prompts == [f["prompt"] for f in fields]
    assert rows.ids[1] == tokenizer.encode(fields[1]["prompt"])[-3:]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"text": "a"}, 'f:1: no field "prompt"'), ({"prompt": ""}, "f:1: .*empty"), ({"prompt": 3}, "f:1")],
)
def test_bad_rows_are_named(tokenizer, fields, words):
    with pytest.raises(ValueError, match=words):
        read_prompts([Record("f:1", fields)], tokenizer, 8)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_file_are_held_out_by_prompt(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"alpha {n // 2}", "n": n} for n in range(240)])
    data = open_data(DataConfig(path=path, sequence_length=16), kind="grpo", tokenizer=tokenizer, reserve=4)
    train, held_out = data.train.rows, data.validation.rows
    assert len(train) + len(held_out) == 240 and 5 <= len(held_out) <= 30
    assert not set(train.prompts) & set(held_out.prompts)
    assert data.train.batch([0, 3])["row"].tolist() == [0, 3]


def test_few_rows_are_all_trained_on_and_said_to_be(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"alpha {n}"} for n in range(9)])
    data = open_data(DataConfig(path=path, sequence_length=16), kind="ppo", tokenizer=tokenizer, reserve=4)
    assert len(data.train) == 9 and "nothing is held out" in data.notes[0]


@pytest.mark.parametrize(
    ("changes", "reserve", "words"),
    [
        ({"sequence_length": 8}, 8, "max_new_tokens: 8 leaves no room .*sequence_length 8"),
        ({"packing": True}, 2, "data.packing"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tokenizer, changes, reserve, words):
    path = write(tmp_path / "a.jsonl", [{"prompt": "alpha"}])
    with pytest.raises(ValueError, match=words):
        open_data(DataConfig(path=path, **changes), kind="grpo", tokenizer=tokenizer, reserve=reserve)


def test_the_embedded_questions_need_no_file():
    train, held_out, content = prompt_records(None, None)
    assert len(train) > len(held_out) > 200
    assert set(train[0].fields) == {"prompt", "answer", "module"} and len(content["data.path"]) == 64
