"""Chat templates by name, for tokenizers that come without one. All have generation marks.

The end of a turn is a token of its own in `chatml` and `llama3`, where the tokenizer knows it (elsewhere it is text of
several tokens), and the tokenizer's end of text in `alpaca` and `zephyr`, which therefore go with any tokenizer.
"""

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

LLAMA3 = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- message['content'] | trim + '<|eot_id|>' -}}{% endgeneration %}"
    "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

ZEPHYR = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- message['content'] + eos_token -}}{% endgeneration %}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)

ALPACA = (
    "{%- if messages[0]['role'] != 'system' -%}{{- 'Below is an instruction that describes a task. Write a response "
    "that appropriately completes the request.\\n\\n' -}}{%- endif -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '### Response:\\n' -}}"
    "{% generation %}{{- message['content'] + eos_token -}}{% endgeneration %}{{- '\\n\\n' -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR}
"""Jinja by name."""


def named(name: str) -> str:
    """The template of that name.

    Raises:
      ValueError: unknown; the known ones are listed.
    """
    if name not in TEMPLATES:
        raise ValueError(f"data.template: unknown value {name}; use {', '.join(TEMPLATES)} or null")
    return TEMPLATES[name]
