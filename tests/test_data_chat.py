"""Chats as training data, against transformers: the same tokens, and the same labels where its marks say which."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.data.config import DataConfig
from jaxlm.data.sources import Record
from jaxlm.data.supervised import encode_samples, read_samples
from jaxlm.data.supply import open_data
from jaxlm.data.tokenizer import END_OF_TEXT, load_tokenizer
from jaxlm.interop.chat import ChatTemplate, renderer, template_text
from jaxlm.interop.templates import TEMPLATES

PLAIN_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TALKS = {
    "one turn": [("user", "Grüße, 日本!"), ("assistant", "  naïve\n\n answer ")],
    "system": [("system", "Be <kind>"), ("user", "hello"), ("assistant", "hello")],
    "many turns": [("user", "x"), ("assistant", "x"), ("user", "x"), ("assistant", "x"), ("user", "y"),
                   ("assistant", "assistant\n")],
    "unanswered at the end": [("user", "a"), ("assistant", "b"), ("user", "c")],
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of all templates, as transformers saves it; no template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(["user assistant system hello ### Instruction: Response:\n" * 4], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = tmp_path_factory.mktemp("chat") / "plain"
    tokenizer.save_pretrained(path)
    return path


def messages(talk):
    return [{"role": role, "content": content} for role, content in TALKS[talk]]


def encoded(directory, talk, template=None):
    tokenizer = load_tokenizer(directory)
    rows = read_samples([Record("talks.jsonl:1", {"messages": messages(talk)})], renderer(directory, template=template))
    examples = encode_samples(rows, tokenizer, 1000)
    return examples.tokens, examples.labels, tokenizer


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_give_the_labels_of_transformers(name, talk, directory):
    peer = transformers.AutoTokenizer.from_pretrained(directory)
    text = template_text(directory, template=name)
    wanted = peer.apply_chat_template(
        messages(talk), chat_template=text, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, labels, _ = encoded(directory, talk, name)
    assert tokens.tolist() == wanted["input_ids"]
    assert labels.astype(int).tolist() == wanted["assistant_masks"] and labels.any()


UNMARKED = [(name, talk) for name in ("chatml", "alpaca", "plain chatml") for talk in TALKS]
UNMARKED += [("mistral", talk) for talk in TALKS if talk != "system"]  # its template refuses system messages


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        *[(TEMPLATES[name], "<|im_end|>" if name == "chatml" else "<|eot_id|>" if name == "llama3" else "</s>")
          for name in TEMPLATES],
        (PLAIN_CHATML, "<|im_end|>"),
        (MISTRAL, "</s>"),
        ("{{ messages[0].content }}", ""),
        ("{{ raise_exception('no') }}", ""),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_told(template, ending, directory):
    assert ChatTemplate(directory, source=template).ending() == ending


@pytest.mark.parametrize(("name", "talk"), UNMARKED)
def test_turns_without_marks_are_found(name, talk, directory, tmp_path):
    """The same template with and without marks gives the same labels: every turn with its end, and nothing else."""
    unmarked = {"mistral": MISTRAL, "plain chatml": PLAIN_CHATML}.get(name) or TEMPLATES[name]
    for mark in ("{% generation %}", "{% endgeneration %}"):
        unmarked = unmarked.replace(mark, "")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in directory.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    (bare / "chat_template.jinja").write_text(unmarked)
    tokens, labels, tokenizer = encoded(bare, talk)
    wanted = transformers.AutoTokenizer.from_pretrained(bare).apply_chat_template(messages(talk), return_dict=True)
    assert tokens.tolist() == wanted["input_ids"]
    learnt = tokenizer.decode(tokens[labels], skip_special_tokens=False)
    end = "<|im_end|>" if "chatml" in name else "</s>"
    space = " " if name == "mistral" else ""
    assert learnt == "".join(space + text + end for role, text in TALKS[talk] if role == "assistant")
    if name in TEMPLATES:
        assert labels.tolist() == encoded(directory, talk, name)[1].tolist()


def test_the_template_of_the_tokenizer_goes_before_that_of_the_model(directory, tmp_path):
    folders = {}
    for name, text in (("model", "M{{ messages[0].content }}"), ("tokenizer", "T{{ messages[0].content }}")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "chat_template.jinja").write_text(text)
        (folders[name] / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    asked = [{"role": "user", "content": "x"}]
    assert renderer(None, folders["model"])(asked) == ("Mx", [])
    assert renderer(folders["tokenizer"] / "tokenizer.json", folders["model"])(asked) == ("Tx", [])
    assert renderer(directory, folders["model"])(asked) == ("Mx", [])
    assert renderer(None, "missing") is None and template_text(None) is None
    assert template_text(folders["tokenizer"] / "tokenizer.json") == "T{{ messages[0].content }}"


def test_without_a_directory_a_named_template_ends_turns_as_our_own_tokenizers_end_texts(tmp_path):
    talk = {"messages": messages("system")}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    config = DataConfig(path=str(tmp_path / "talks.jsonl"), sequence_length=256, template="zephyr")
    data = open_data(config, kind="sft", vocab_size=300, render=renderer(template="zephyr"))
    row = data.train.rows[0]
    learnt = row["targets"][row["mask"] > 0]
    assert data.tokenizer.decode(learnt, skip_special_tokens=False) == "hello" + END_OF_TEXT
    assert np.count_nonzero(learnt == data.tokenizer.eos_id) == 1


def test_what_is_wrong_with_a_template_is_said(directory, tmp_path):
    with pytest.raises(ValueError, match=r"data\.template: unknown value chatm; use alpaca, chatml, llama3, zephyr or"):
        renderer(directory, template="chatm")
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"data\.template: alpaca ends turns with the end of text, and .* names none"):
        renderer(tmp_path, template="alpaca")
