"""Instruction data: which tokens are labels, to the token, for every kind of row; bad rows named."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from jaxlm.data.sources import Record, read_records
from jaxlm.data.supervised import encode_samples, read_samples, sample_key
from jaxlm.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["question answer the quick brown fox ### Instruction: Response: " * 4], 330)
EOS = TOKENIZER.eos_id


def encode(rows, tokenizer=TOKENIZER, length=1000, render=None):
    records = [Record(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
    return encode_samples(read_samples(records, render), tokenizer, length)


def example(examples, index):
    span = slice(examples.offsets[index], examples.offsets[index + 1])
    return examples.tokens[span].tolist(), examples.labels[span].tolist()


def learnt_text(examples, index, tokenizer=TOKENIZER):
    tokens, labels = example(examples, index)
    learnt = [t for t, label in zip(tokens, labels, strict=True) if label]
    return tokenizer.decode(learnt, skip_special_tokens=False)


def test_the_four_kinds():
    rows = [
        {"prompt": "question", "completion": " the fox", "text": "ignored", "n": 1},
        {"instruction": "question", "input": "", "output": "answer"},
        {"instruction": "question", "input": "the fox", "output": "answer"},
        {"text": "the quick"},
    ]
    examples = encode(rows)
    assert [learnt_text(examples, i) for i in range(4)] == [
        " the fox<|endoftext|>",
        "answer<|endoftext|>",
        "answer<|endoftext|>",
        "the quick<|endoftext|>",
    ]
    texts = [TOKENIZER.decode(example(examples, i)[0]) for i in range(4)]
    assert texts[0] == "question the fox" and texts[3] == "the quick"
    assert texts[1].endswith("### Instruction:\nquestion\n\n### Response:\nanswer") and "Input" not in texts[1]
    assert "### Input:\nthe fox\n" in texts[2]
    assert examples.truncated == examples.dropped == 0


@settings(deadline=None, max_examples=60)
@given(st.text("ab fox\né日", max_size=12), st.text("ab fox\né日", max_size=12))
def test_prompt_and_completion_are_one_text(prompt, completion):
    assume(prompt or completion)
    tokens, labels = example(encode([{"prompt": prompt, "completion": completion}]), 0)
    whole = TOKENIZER.encode(prompt + completion)
    assert tokens == [*whole, EOS] and labels[-1]
    alone, start = TOKENIZER.encode(prompt), labels.index(True)
    assert all(labels[start:])
    assert tokens[:start] == alone[:start]  # what is not learnt is what the prompt alone gives
    assert start == len(alone) or tokens[start] != alone[start]  # and it is as long as can be


def test_a_token_over_the_seam_belongs_to_the_completion():
    ids = TOKENIZER.encode("question")
    assert len(ids) == 1, "one token, so that cutting the word in two changes the tokens"
    tokens, labels = example(encode([{"prompt": "quest", "completion": "ion"}]), 0)
    assert tokens == [*ids, EOS] and labels == [True, True]


def with_template(template):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.json)
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", bos), ("<|endoftext|>", EOS)]
    )
    return Tokenizer(backend, backend.to_str(), EOS), bos


def test_special_tokens_of_the_file_are_kept_and_the_end_is_not_doubled():
    row = {"prompt": "the", "completion": " fox"}
    for template in ("<s> $A", "<s> $A <|endoftext|>"):
        tokenizer, bos = with_template(template)
        tokens, labels = example(encode([row], tokenizer), 0)
        assert tokens == [bos, *TOKENIZER.encode("the fox"), EOS]
        assert not labels[0] and labels[-1]
        assert learnt_text(encode([row], tokenizer), 0, tokenizer) == " fox<|endoftext|>"
    already = example(encode([{"prompt": "the", "completion": " fox<|endoftext|>"}]), 0)
    assert already == example(encode([row]), 0)


def test_truncation_keeps_the_start_and_is_counted():
    rows = [{"prompt": "a b c d e f ", "completion": "x"}, {"prompt": "a", "completion": "b c d e f g h"}]
    rows.append({"prompt": "a ", "completion": "b"})
    examples = encode(rows, length=4)
    assert (examples.truncated, examples.dropped) == (2, 1)
    assert np.diff(examples.offsets).tolist() == [5, len(TOKENIZER.encode("a b")) + 1]
    assert example(examples, 0)[0] == example(encode(rows[1:2]), 0)[0][:5]
    with pytest.raises(ValueError, match=r"data.sequence_length: 4 is too short: .* all 1 examples"):
        encode(rows[:1], length=4)


def chat(messages):
    """A chat template: role, content, end; assistant turns are to be learnt, with their end."""
    text, spans = "", []
    for message in messages:
        text += f"[{message['role']}]"
        start = len(text)
        text += message["content"] + "<|endoftext|>"
        if message["role"] == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def test_messages():
    turns = [("user", "the fox é"), ("assistant", "naïve 日本"), ("user", "more"), ("assistant", "answer")]
    messages = [{"role": role, "content": content} for role, content in turns]
    examples = encode([{"messages": messages}, {"text": "the fox"}], render=chat)
    assert learnt_text(examples, 0) == "naïve 日本<|endoftext|>answer<|endoftext|>"
    assert TOKENIZER.decode(example(examples, 0)[0], skip_special_tokens=False) == chat(messages)[0]
    assert learnt_text(examples, 1) == "the fox<|endoftext|>"
    tokenizer, bos = with_template("<s> $A")
    assert bos not in example(encode([{"messages": messages}], tokenizer, render=chat), 0)[0]
    (sample,) = read_samples([Record("a:1", {"messages": messages})], chat)
    assert sample_key(sample) == "the fox é"


BAD = {
    "no label in this example": {"messages": [{"role": "user", "content": "hello"}]},
    "no label in this example; ": {"text": ""},
    'field "messages" is no list': {"messages": "hello"},
    'field "messages" is no list of': {"messages": [{"content": "x"}]},
    'no field "completion"': {"prompt": "x"},
    'no field "prompt"': {"completion": "x"},
    'field "completion" is NoneType, not text': {"prompt": "x", "completion": None},
    'no field "output"': {"instruction": "x"},
    'field "input" is list, not text': {"instruction": "x", "input": ["y"], "output": "z"},
    'no field "text" .*a row has messages, or prompt and completion': {"question": "x"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named_by_line(tmp_path, message):
    good = json.dumps({"prompt": "a", "completion": "b"})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n{json.dumps(BAD[message])}\n{good}\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: {message}"):
        encode_samples(read_samples(read_records(str(tmp_path / "rows.jsonl")), chat), TOKENIZER, 100)


def test_messages_without_a_template_and_errors_inside_one():
    row = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: rows with messages need a chat template"):
        encode([row])

    def broken(messages):
        raise ValueError("roles must alternate")

    with pytest.raises(ValueError, match=r"rows.jsonl:1: roles must alternate"):
        encode([row], render=broken)


def test_a_tokenizer_without_an_end_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the tokenizer has no end-of-sequence token"):
        encode([{"prompt": "a", "completion": "b"}], Tokenizer(backend, backend.to_str(), None))
