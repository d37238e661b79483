"""Preference data: what is read, where labels begin, what is cut, and what is refused with its place."""

import json

import numpy as np
import pytest

from jaxlm.data.config import DataConfig
from jaxlm.data.pairs import encode_pairs, read_labelled, read_pairs
from jaxlm.data.preferences import labelled, other_functions, shuffled_words
from jaxlm.data.sources import Record
from jaxlm.data.supply import open_data
from jaxlm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it? a dog, a cat, seven wizards; user: assistant: question answer"] * 40, 300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))


def records(*rows):
    return [Record(f"file.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def texts(rows, tokenizer, index=0):
    """Prompt and labels of each side of a row, as text."""
    found, row = [], rows[index]
    for side in range(len(rows.sides)):
        r = {name: column[side] if column.ndim == 2 else column for name, column in row.items() if column.ndim}
        inside, labels = r["segments"] != 0, r["mask"] > 0
        first = int(np.argmax(labels)) + 1
        found.append((tokenizer.decode(r["tokens"][inside][:first]), tokenizer.decode(r["targets"][labels])))
    return found


PAIR = {"prompt": "what is it?", "chosen": " a dog", "rejected": " seven wizards"}


def test_pairs_have_a_prompt_in_common_and_an_end_as_a_label(tokenizer):
    rows = encode_pairs(list(read_pairs(records(PAIR))), tokenizer, 32)
    row = rows[0]
    assert {name: column.shape for name, column in row.items()} == dict.fromkeys(
        ("tokens", "targets", "mask", "segments", "positions"), (2, 32)
    )
    assert texts(rows, tokenizer) == [("what is it?", " a dog"), ("what is it?", " seven wizards")]
    for side in (0, 1):
        assert row["targets"][side][row["mask"][side] > 0][-1] == tokenizer.eos_id
        assert row["segments"][side].sum() == (row["tokens"][side] != 0).sum()
    assert len(rows) == 1 and rows.input_tokens == (row["segments"] != 0).sum()


def test_an_end_that_is_there_is_not_doubled_and_margins_are_kept(tokenizer):
    end = tokenizer.decode([tokenizer.eos_id]) or tokenizer.backend.id_to_token(tokenizer.eos_id)
    given = PAIR | {"chosen": PAIR["chosen"] + end, "margin": 2}
    rows = encode_pairs(list(read_pairs(records(given, PAIR))), tokenizer, 32)
    assert rows[0]["margin"] == 2.0 and rows[1]["margin"] == 0.0
    np.testing.assert_array_equal(rows[0]["tokens"], rows[1]["tokens"])


def test_for_a_score_the_last_token_is_an_input_and_longer_rows_are_dropped(tokenizer):
    longer = PAIR | {"chosen": " a dog" * 30}
    rows = encode_pairs(list(read_pairs(records(longer, PAIR))), tokenizer, 32, whole=True)
    assert (len(rows), rows.truncated, rows.dropped) == (1, 1, 1)
    for side in (0, 1):
        inside = rows[0]["segments"][side] != 0
        assert rows[0]["tokens"][side][inside][-1] == tokenizer.eos_id


def test_a_long_completion_is_cut_and_a_prompt_that_fills_the_row_drops_it(tokenizer):
    long = [PAIR | {"rejected": " seven wizards" * 30}, PAIR | {"prompt": "what is it?" * 30}, PAIR]
    rows = encode_pairs(list(read_pairs(records(*long))), tokenizer, 32)
    assert (len(rows), rows.truncated, rows.dropped) == (2, 2, 1)
    assert rows[0]["mask"][1][-1] == 1.0 and (rows[0]["segments"][1] == 1).all()
    with pytest.raises(ValueError, match=r"data.sequence_length: 32 is too short for all 1 rows"):
        encode_pairs(list(read_pairs(records(long[1]))), tokenizer, 32)


def test_without_a_prompt_it_is_what_both_begin_with(tokenizer):
    row = {"chosen": "what is it? a dog", "rejected": "what is it? seven"}
    rows = encode_pairs(list(read_pairs(records(row))), tokenizer, 32)
    assert texts(rows, tokenizer) == [("what is it?", " a dog"), ("what is it?", " seven")]


def render(messages):
    """A template whose assistant turns end with a semicolon, which is learnt; what stands around them is not."""
    text, spans = "", []
    for message in messages:
        text += f"{message['role']}: "
        start = len(text)
        text += message["content"] + ";"
        if message["role"] == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def turn(role, content):
    return {"role": role, "content": content}


QUESTION = [turn("user", "what?"), turn("assistant", "it?"), turn("user", "is it?")]
DOG, CAT = [turn("assistant", "a dog")], [turn("assistant", "a cat")]


@pytest.mark.parametrize("row", [
    {"prompt": QUESTION, "chosen": DOG, "rejected": CAT},
    {"chosen": QUESTION + DOG, "rejected": QUESTION + CAT},
])  # fmt: skip
def test_of_conversations_the_turns_after_the_prompt_are_learnt(row, tokenizer):
    rows = encode_pairs(list(read_pairs(records(row), render)), tokenizer, 64)
    assert [labels.strip() for _, labels in texts(rows, tokenizer)] == ["a dog;", "a cat;"]


def test_labelled_rows_say_which_they_are(tokenizer):
    rows = [{"prompt": "what?", "completion": " a dog", "label": True}]
    rows += [{"prompt": QUESTION, "completion": CAT, "label": False}, {"completion": QUESTION + DOG, "label": True}]
    found = encode_pairs(list(read_labelled(records(*rows), render)), tokenizer, 64)
    assert [int(found[i]["label"]) for i in range(3)] == [1, 0, 1]
    assert [int(found[i]["row"]) for i in range(3)] == [0, 1, 2]
    assert [texts(found, tokenizer, i)[0][1].strip() for i in range(3)] == ["a dog", "a cat;", "a dog;"]
    assert found[0]["tokens"].shape == (64,)


BAD = {
    "no rejected": (PAIR | {"rejected": None}, r'file.jsonl:2: .*"rejected"'),
    "a margin in words": (PAIR | {"margin": "large"}, r'file.jsonl:2: field "margin"'),
    "a margin that is none": (PAIR | {"margin": float("nan")}, r'file.jsonl:2: field "margin"'),
    "a mixture": (PAIR | {"chosen": DOG}, r'file.jsonl:2: field "(prompt|rejected)" is no list'),
    "no turn": ({"prompt": QUESTION, "chosen": DOG, "rejected": []}, r'file.jsonl:2: field "rejected" has no turn'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_its_place(case):
    row, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        list(read_pairs(records(PAIR, row), render))


@pytest.mark.parametrize("label", [None, "true", 1, 0.0])
def test_a_label_that_is_no_truth_value_is_refused(label):
    with pytest.raises(ValueError, match=r'file.jsonl:1: field "label"'):
        list(read_labelled(records({"prompt": "a", "completion": "b", "label": label})))


def test_conversations_need_a_template():
    with pytest.raises(ValueError, match=r"file.jsonl:1: rows with messages need a chat template"):
        list(read_pairs(records({"prompt": QUESTION, "chosen": DOG, "rejected": CAT})))


def test_a_file_becomes_pairs_with_a_held_out_part_and_an_identity(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(PAIR | {"prompt": f"what is {i}?"}) + "\n" for i in range(200)))
    data = open_data(DataConfig(path=str(path), sequence_length=32), kind="dpo", vocab_size=300)
    assert len(data.train) + len(data.validation) == 200 and len(data.validation) == 10
    batch = data.train.batch([0, 5, -1])
    assert batch["tokens"].shape == (3, 2, 32) and not batch["segments"][2].any() and not batch["mask"][2].any()
    other = open_data(DataConfig(path=str(path), sequence_length=32), kind="reward", vocab_size=300)
    assert other.train.fingerprint != data.train.fingerprint
    with pytest.raises(ValueError, match=r"data.packing: cannot be with objective.kind dpo"):
        open_data(DataConfig(path=str(path), sequence_length=32, packing=True), kind="dpo", vocab_size=300)


def test_embedded_preferences_are_what_they_say():
    easy, hard = shuffled_words("validation"), other_functions("validation")
    assert len(easy) > 50 and len(hard) > 50
    for row in easy:
        assert row["chosen"] != row["rejected"] and sorted(row["chosen"].split()) == sorted(row["rejected"].split())
    lines = {row["chosen"] for row in hard}
    assert all(row["rejected"] in lines and row["rejected"] != row["chosen"] for row in hard)
    assert {row["prompt"] for row in easy}.isdisjoint(row["prompt"] for row in shuffled_words("train"))
    assert easy == shuffled_words("validation")
    both = labelled(easy)
    assert [row["label"] for row in both[:4]] == [True, False, True, False] and len(both) == 2 * len(easy)
