"""Chat templates: text equal to that of transformers, the assistant's characters, and hostile templates."""

import functools
import json
import time

import jax.numpy as jnp
import pytest
import transformers
from tokenizers import Tokenizer, models

from jaxlm.interop import names
from jaxlm.interop.chat import ChatTemplate, render_chat, renderer, special_tokens
from jaxlm.interop.save import save
from jaxlm.nn.config import ModelConfig

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        <|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {%- else -%}
        <|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {%- endif %}
{% endfor -%}
{%- if add_generation_prompt -%}
    <|im_start|>assistant
{% endif -%}"""
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TOOLS = """{{- bos_token }}
{%- if custom is not defined %}{% set custom = strftime_now("%Y") %}{% endif %}
{%- if tools is not none %}
    {{- "Tools of " ~ custom ~ ":\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(turns=0, texts=[]) %}
{%- for message in messages %}
    {%- if loop.index0 == 0 and message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message.reasoning_content %}
        {{- "<think>" ~ message.reasoning_content ~ "</think>" }}
    {%- endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '[' ~ loop.index ~ '/' ~ loop.length ~ '] ' ~ call.function.name ~ (call.function | tojson) }}
        {%- endfor %}
    {%- elif message.content is string %}
        {{- "%s: %s" % (message.role, message.content) | replace('x', 'yy') }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text.center(9) | indent(2) }}{{ "," if not loop.last }}
        {%- endfor %}
    {%- endif %}
    {{- '{:>4}|'.format(ns.turns) }}
{%- endfor %}
{{- messages | map(attribute='role') | join('-') }}
{%- if documents %}{{ documents | length }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<no_think>' }}{% endif %}
{%- if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"""
THINKING = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and not loop.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML, "marked": MARKED, "marked_short": MARKED_SHORT, "llama2": LLAMA2, "llama3": LLAMA3,
    "gemma": GEMMA, "zephyr": ZEPHYR, "tools": TOOLS, "thinking": THINKING,
}  # fmt: skip

TALK = [
    {"role": "user", "content": "Hi <b>&'x'  "},
    {"role": "assistant", "content": " Grüße\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Go"},
]
SYSTEM = [{"role": "system", "content": "Be kind"}, *TALK]
TOOL = {"type": "function", "function": {"name": "f", "description": "é <it> & 'that'", "parameters": {"x": None}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "ü<1>"}}}
CALLS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL], "thinking": "hm"},
    {"role": "tool", "name": "f", "content": "ok"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi\nyou"}, {"type": "image"}]}]
CONVERSATIONS = {
    "talk": (TALK[:3], {}),
    "whole": (TALK, {}),
    "system": (SYSTEM, {"enable_thinking": False, "bos_token": "<B>"}),
    "calls": (CALLS, {"tools": [TOOL], "custom": 7}),
    "parts": (PARTS, {"documents": [{"title": "t", "text": "x"}]}),
    "upside down": (TALK[1:], {}),
    "continued": (TALK, {"continue_final_message": True}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A tokenizer directory for each template, written by transformers, and its tokenizer."""
    root = tmp_path_factory.mktemp("chat")
    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "?"))}

    @functools.cache
    def make(name):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")),
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<|im_end|>", "<end_of_turn>", "<|eot_id|>"],
        )
        tokenizer.chat_template = TEMPLATES[name]
        tokenizer.save_pretrained(root / name)
        return root / name, tokenizer

    return make


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_that_of_transformers(name, conversation, directories):
    """Errors included: where the peer raises, a ValueError of one line names the directory."""
    directory, tokenizer = directories(name)
    messages, variables = CONVERSATIONS[conversation]
    for prompt in (False, True):
        try:
            wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
        except Exception:
            with pytest.raises(ValueError) as caught:
                render_chat(directory, messages, add_generation_prompt=prompt, **variables)
            assert "\n" not in str(caught.value)
        else:
            assert render_chat(directory, messages, add_generation_prompt=prompt, **variables) == wanted


TURNS = {
    "chatml": [" Grüße\n<|im_end|>", "Go<|im_end|>"],
    "marked": [" Grüße\n<|im_end|>", "Go<|im_end|>"],
    "marked_short": [" Grüße\n<|im_end|>", "Go<|im_end|>"],
    "llama2": [" Grüße </s>", " Go </s>"],
    "llama3": ["Grüße<|eot_id|>", "Go<|eot_id|>"],
    "gemma": ["Grüße<end_of_turn>", "Go<end_of_turn>"],
    "zephyr": [" Grüße\n</s>", "Go</s>"],
    "thinking": [" Grüße\n<|im_end|>", "Go<|im_end|>"],
}


@pytest.mark.parametrize("name", TURNS)
def test_spans_are_the_turns_of_the_assistant(name, directories):
    """With marks or without, each turn with its end-of-turn token and nothing else."""
    directory, tokenizer = directories(name)
    text, spans = renderer(directory)(TALK)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert [text[a:b] for a, b in spans] == TURNS[name]


def test_spans_where_history_is_rendered_otherwise(directories):
    """Thoughts of earlier turns are dropped by the template: the turn is then found by what is left of it."""
    directory, _ = directories("thinking")
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Go"},
        {"role": "user", "content": "Why"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\nBe"},
    ]
    text, spans = ChatTemplate(directory).spans(talk)
    assert [text[a:b] for a, b in spans] == ["Go<|im_end|>", "hm\n</think>\nBe<|im_end|>"]
    text, spans = ChatTemplate(directory).spans([talk[0], talk[3], talk[2], talk[3]])
    assert [text[a:b] for a, b in spans] == ["Be<|im_end|>", "hm\n</think>\nBe<|im_end|>"]
    assert "\nBe<|im_end|>" in text[: spans[0][1]]


def test_saved_tokenizer_is_read_by_transformers(directories, tmp_path):
    """From a bare tokenizer.json with its special tokens found by id; from a directory with everything in it."""
    directory, tokenizer = directories("gemma")
    cfg = ModelConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=6, bos_token_id=0, eos_token_id=(1, 3))
    params = names.nest({path: jnp.zeros(leaf.shape) for path, leaf in names.abstract(cfg).items()})
    for source in (directory / "tokenizer.json", directory):
        save(tmp_path / "m", cfg, {"params": params}, tokenizer=source)
        got = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
        assert (got.bos_token, got.eos_token) == ("<s>", "</s>")
        assert got.encode("<s> ? <end_of_turn>") == tokenizer.encode("<s> ? <end_of_turn>")
    assert render_chat(tmp_path / "m", TALK) == render_chat(directory, TALK)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer"):
        save(tmp_path / "n", cfg, {"params": params}, tokenizer=tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match=r"m/none/tokenizer\.json"):
        save(tmp_path / "n", cfg, {"params": params}, tokenizer=tmp_path / "m" / "none")
    assert not (tmp_path / "n").exists()


def write(directory, files):
    directory.mkdir()
    for name, contents in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return directory


def test_where_templates_are_found(tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    several = write(tmp_path / "several", {"tokenizer_config.json": {"chat_template": named}})
    assert render_chat(several, TALK) == "A" and render_chat(several, TALK, tools=[TOOL]) == "B"
    file = {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": "new"}
    assert render_chat(write(tmp_path / "file", file), TALK) == "new"
    more = file | {"additional_chat_templates/tool_use.jinja": "tools"}
    assert render_chat(write(tmp_path / "more", more), TALK, tools=[TOOL]) == "tools"
    only = {"tokenizer_config.json": {"chat_template": named[1:]}}
    with pytest.raises(ValueError, match="none is called default; there are tool_use"):
        render_chat(write(tmp_path / "only", only), TALK)
    none = write(tmp_path / "none", {"tokenizer_config.json": {}})
    assert renderer(none) is None
    with pytest.raises(ValueError, match="none: no chat template"):
        render_chat(none, TALK)
    run = write(tmp_path / "run", {"hf/tokenizer_config.json": {"chat_template": "in a run"}})
    assert render_chat(run, TALK) == "in a run"


def test_special_tokens_in_both_forms(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    older = {"eos_token": "<old>", "unk_token": {"content": "<u>"}}
    directory = write(tmp_path / "d", {"tokenizer_config.json": config, "special_tokens_map.json": older})
    assert special_tokens(directory) == {"bos_token": "<s>", "eos_token": "<old>", "unk_token": "<u>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    assert special_tokens(directory) == {"bos_token": "<s>", "eos_token": "</s>"}


NEST = "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
HOSTILE = {
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute": "{{ messages.append(1) }}",
    "import": "{% include '/etc/passwd' %}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "repetition": "{{ 'a' * 10000000000 }}",
    "power": "{{ 10 ** 100000000 }}",
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% set x = 1 %}{% endfor %}{% endfor %}",
    "loop of text": "{% set x %}{% for i in range(90000) %}" + "a" * 9000 + "{% endfor %}{% endset %}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "doubling by ~": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by blocks": (
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = t %}{% endfor %}"
    ),
    "doubling lists": NEST + "{{ n.s }}",
    "json of it": NEST + "{{ n.s | tojson }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "width": "{{ 'a'.ljust(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "braces": "{{ '{:>10000000000}'.format(1) }}",
    "filter": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ [1] | tojson(indent=1000000000) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "join": "{% set s = 'a' * 1000000 %}{{ s | join(s) }}",
    "lorem": "{{ lipsum(n=1000000) }}",
    "endless text": "{% for i in range(90000) %}{{ 'a' * 9000 }}{% endfor %}",
    "source": "a" * 2_000_000,
    "syntax": "{% if %}",
    "own complaint": "{{ raise_exception('no\nway') }}",
    "type": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_templates_end_in_one_line(attack, tmp_path):
    directory = write(tmp_path / "d", {"chat_template.jinja": HOSTILE[attack]})
    start = time.process_time()
    with pytest.raises(ValueError, match="d: chat template") as caught:
        render_chat(directory, TALK)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 10


def test_many_messages_are_no_attack(directories):
    directory, _ = directories("zephyr")
    long = [dict(TALK[i % 2], content="word " * 400) for i in range(1000)]
    assert len(render_chat(directory, long)) > 2_000_000
