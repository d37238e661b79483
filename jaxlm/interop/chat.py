"""Chat templates of model directories: text of a conversation, and which characters of it the assistant wrote."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizer import END_OF_TEXT
from jaxlm.interop import templates
from jaxlm.interop.safetensors import read_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
MARKER = "THE-ANSWER-STANDS-HERE"

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]


def render_chat(
    path: str | Path,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation by the chat template of a model directory, as transformers' apply_chat_template.

    The text holds the special tokens, so encode it with `add_special_tokens=False`.

    Args:
      path: a model directory, or a run directory, whose `hf/` is read.
      messages: {"role", "content"} each, and what else the template knows.
      add_generation_prompt: whether the text ends where the assistant's answer begins.
      tools: JSON schemas of functions.
      **variables: for the template; they go before the special tokens. `continue_final_message=True` ends the text
        inside the last message.

    Raises:
      ValueError: naming the directory: no template, a template that fails or does too much, or its own complaint.
    """
    return ChatTemplate(path, tools is not None).render(
        messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
    )


class ChatTemplate:
    """The compiled chat template of a directory. Making one per directory saves compiling it for every conversation."""

    def __init__(self, path: str | Path, tools: bool = False, source: str | None = None) -> None:
        """`path`: see `render_chat`; `tools`: whether the variant for tools is wanted where there are several;
        `source`: a template to be used instead of the directory's, with the directory's special tokens."""
        try:
            from jaxlm.interop.sandbox import LimitError, Sandbox
        except ImportError:
            raise ValueError(f"{path}: chat templates need an optional package; pip install 'jaxlm[chat]'") from None
        self.where = _directory(Path(path))
        source = _choose(_templates(self.where), tools, self.where) if source is None else source
        self.special = special_tokens(self.where)
        self._source = source
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (LimitError, RecursionError, ValueError, TypeError, ArithmeticError) as error:
            raise self._error(error) from None
        except Exception as error:
            raise self._error(error) if _is_template_error(error) else error from None

    @property
    def source(self) -> str:
        """The template's text."""
        return self._source

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text; see `render_chat`."""
        going_on = variables.pop("continue_final_message", False)
        chat = _conversation(messages)
        if going_on and add_generation_prompt:
            raise ValueError("continue_final_message: cannot go with add_generation_prompt; set one of them to false")
        if going_on:
            final = chat[-1].get("content")
            if not isinstance(final, str):
                raise ValueError("continue_final_message: the last message has no text to continue; give it a content")
            chat[-1]["content"] = final + TAG
        text, _ = self._run(chat, add_generation_prompt, tools, variables)
        return _cut(text, self.where) if going_on else text

    def spans(self, messages: Messages, **variables: Any) -> tuple[str, Spans]:
        """The text of a whole conversation, and the character ranges [start, stop) of the assistant's turns, each with
        its end-of-turn token.

        They are those of the template's generation marks; without any, a turn is what rendering one message more adds
        after the generation prompt.

        Raises:
          ValueError: a turn cannot be found in the text.
        """
        chat = _conversation(messages)
        text, marked = self._run(chat, False, None, variables)
        turns = [i for i, message in enumerate(chat) if message.get("role") == "assistant"]
        if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._source):
            return text, [self._with_end(text, span, chat, turns, variables) for span in marked if span[0] < span[1]]
        found: Spans = []
        for turn in turns:
            start, stop = self._turn(text, chat, turn, found[-1][1] if found else 0, variables)
            rest = text[start:stop].rstrip()
            # What follows the end-of-turn token, a line break as a rule, is not the assistant's.
            found.append((start, start + len(rest) if rest.endswith(self._ends) else stop))
        return text, found

    def ending(self) -> str:
        """What ends an assistant's turn, e.g. `<|im_end|>`; empty where the template writes nothing, or none alone."""
        chat = _conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}])
        try:
            text, _ = self._run(chat, False, None, {})
        except ValueError:
            return ""
        return text.partition(MARKER)[2].strip().partition("\n")[0].strip()

    def _turn(
        self, text: str, chat: list[dict], turn: int, after: int, variables: Mapping[str, Any]
    ) -> tuple[int, int]:
        try:
            before, _ = self._run(chat[:turn], True, None, variables)
            through, _ = self._run(chat[: turn + 1], False, None, variables)
        except ValueError:
            before = through = ""
        if through and text.startswith(through):
            start = next((i for i, (a, b) in enumerate(zip(before, through)) if a != b), min(len(before), len(through)))
            if after <= start < len(through):
                return start, len(through)
        found = self._replaced(text, chat, turn, variables)
        if found is None:
            raise ValueError(
                f"{self.where}: chat template: cannot tell where message {turn} is in the text; add generation marks"
            )
        start, stop = found
        following = [token for token in self._ends if text.startswith(token, stop)]
        return start, stop + max(map(len, following), default=0)

    def _replaced(self, text: str, chat: list[dict], turn: int, variables: Mapping[str, Any]) -> tuple[int, int] | None:
        """Where a message's content is, found by rendering another content in its place: what comes before and after
        stays, whatever the template makes of the content itself."""
        changed = [*chat[:turn], chat[turn] | {"content": MARKER}, *chat[turn + 1 :]]
        try:
            other, _ = self._run(changed, False, None, variables)
        except ValueError:
            return None
        before, marker, after = other.partition(MARKER)
        fits = marker and text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text)
        return (len(before), len(text) - len(after)) if fits else None

    def _with_end(
        self,
        text: str,
        span: tuple[int, int],
        chat: list[dict],
        turns: list[int],
        variables: Mapping[str, Any],
    ) -> tuple[int, int]:
        """A marked range with the end-of-turn token behind it, where the marks leave that out."""
        for turn in turns:
            try:
                through, _ = self._run(chat[: turn + 1], False, None, variables)
            except ValueError:
                continue
            rest = through[span[1] :].strip()
            if len(through) > span[1] and text.startswith(through) and rest in self._ends:
                return span[0], text.index(rest, span[1]) + len(rest)
        return span

    def _run(
        self, chat: list[dict], prompt: bool, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
    ) -> tuple[str, Spans]:
        from jaxlm.interop.sandbox import LimitError

        context = {
            "documents": None,
            **self.special,
            **{name: _plain(value) for name, value in variables.items()},
            "messages": chat,
            "tools": None if tools is None else _plain(list(tools)),
            "add_generation_prompt": prompt,
        }
        try:
            return self._sandbox.run(self._template, context)
        except (
            LimitError,
            RecursionError,
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
        ) as error:
            raise self._error(error) from None
        except Exception as error:
            raise self._error(error) if _is_template_error(error) else error from None

    @functools.cached_property
    def _ends(self) -> tuple[str, ...]:
        """Texts that may end a turn: all special tokens."""
        return tuple({token for token in (*self.special.values(), *_added_specials(self.where)) if token})

    def _error(self, error: Exception) -> ValueError:
        line = getattr(error, "lineno", None)
        where = f" line {line}" if line else ""
        text = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"{self.where}: chat template{where}: {text}; mend the conversation or the template")


def special_tokens(directory: Path) -> dict[str, str]:
    """The named special tokens of a directory as text, e.g. {"bos_token": "<s>"}; those without a value are left out.

    From tokenizer_config.json; an older special_tokens_map.json beside it goes first unless the former lists the added
    tokens, as in transformers.
    """
    config = _json(directory / "tokenizer_config.json")
    older = {} if "added_tokens_decoder" in config else _json(directory / "special_tokens_map.json")
    found = {}
    for name in SPECIAL:
        value = older.get(name, config.get(name))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def renderer(*places: str | Path | None, template: str | None = None) -> Callable[[Messages], tuple[str, Spans]] | None:
    """What renders conversations for training: `ChatTemplate(place).spans`, compiled when it is first called.

    Args:
      places: model directories, runs or files in one; the first with a chat template is taken. None and names of
        nothing are passed over.
      template: one of `templates.TEMPLATES` instead, with the special tokens of the first place; without any place
        texts end with the token that jaxlm's own tokenizers end them with.

    Returns:
      None where no place has a template and none is named.

    Raises:
      ValueError: an unknown name; a named template needs an end of text, and the place names none.
    """
    paths = _folders(places)
    if template is None:
        where = next((path for path in map(_directory, paths) if _templates(path)), None)
        return None if where is None else _lazy(lambda: ChatTemplate(where))
    source = templates.named(template)
    if not paths:
        return _lazy(lambda: ChatTemplate(Path(), source=source.replace("eos_token", repr(END_OF_TEXT))))
    if "eos_token" in source and "eos_token" not in special_tokens(_directory(paths[0])):
        raise ValueError(
            f"data.template: {template} ends turns with the end of text, and the tokenizer_config.json in {paths[0]} "
            "names none; add eos_token there or choose another template"
        )
    return _lazy(lambda: ChatTemplate(paths[0], source=source))


def template_text(*places: str | Path | None, template: str | None = None) -> str | None:
    """The chat template that `renderer` uses, as it would be saved beside a tokenizer; None where there is none."""
    if template is not None:
        return templates.named(template)
    found = (_templates(path) for path in map(_directory, _folders(places)))
    return next((names["default"] for names in found if "default" in names), None)


def _folders(places: Iterable[str | Path | None]) -> list[Path]:
    """The directories that places are, or are files in; what is not there is left out."""
    paths = [Path(place) for place in places if place]
    return [path if path.is_dir() else path.parent for path in paths if path.exists()]


def _lazy(make: Callable[[], ChatTemplate]) -> Callable[[Messages], tuple[str, Spans]]:
    made = functools.cache(make)
    return lambda messages: made().spans(messages)


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; give a model directory or a run directory")
    inner = path / "hf"
    return inner if not _templates(path) and inner.is_dir() else path


def _templates(directory: Path) -> dict[str, str]:
    """Templates by name; files of their own go before tokenizer_config.json."""
    files = {file.stem: file for file in (directory / "additional_chat_templates").glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    given = _json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given if isinstance(entry, dict)}
    return {"default": given} if isinstance(given, str) else {}


def _choose(templates: dict[str, str], tools: bool, where: Path) -> str:
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if not templates:
        raise ValueError(f"{where}: no chat template; its tokenizer_config.json has no chat_template")
    if name not in templates:
        raise ValueError(f"{where}: chat template: none is called default; there are {', '.join(sorted(templates))}")
    return templates[name]


def _json(file: Path) -> dict[str, Any]:
    contents = read_json(file) if file.is_file() else {}
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: not a JSON object; mend or replace the file")
    return contents


def _added_specials(directory: Path) -> list[str]:
    tokens = _json(directory / "tokenizer.json").get("added_tokens") or ()
    listed = _json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return [token["content"] for token in (*tokens, *listed.values()) if token.get("special")]


def _conversation(messages: Messages) -> list[dict[str, Any]]:
    """Plain copies of the messages, without keys that hold None, and with reasoning under all of its names."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("messages: not a list of {role, content}; give at least one")
    chat = []
    for message in messages:
        message = {key: _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        chat.append(message)
    return chat


def _plain(value: Any) -> Any:
    """JSON values as they are; of anything else its type's name, since its methods would be open to the template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _cut(text: str, where: Path) -> str:
    """The text up to the marker of the message to be continued; a template may have stripped the marker's space."""
    at = text.rfind(TAG.strip())
    if at < 0:
        raise ValueError(f"{where}: chat template: the last message is not in the text, so it cannot be continued")
    return text[:at] if text.startswith(TAG, at) else text[:at].rstrip()


def _is_template_error(error: Exception) -> bool:
    import jinja2

    return isinstance(error, jinja2.TemplateError)
