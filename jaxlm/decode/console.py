"""A model at the terminal: continue a prompt, or talk."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode import loop
from jaxlm.decode.sampling import Choice
from jaxlm.decode.streaming import Text, stream_text
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Variables

Message = Mapping[str, str]


class Speaker(NamedTuple):
    """A model that reads and writes text.

    Attributes:
      cfg, variables: the model.
      tokenizer: its tokenizer.
    """

    cfg: ModelConfig
    variables: Variables
    tokenizer: Tokenizer


class Manner(NamedTuple):
    """How it writes.

    Attributes:
      max_new_tokens: at most so many.
      choice: sampling.
      stop: texts to end before.
    """

    max_new_tokens: int = 64
    choice: Choice = Choice()
    stop: tuple[str, ...] = ()


def ending_at(speaker: Speaker, manner: Manner, ending: str) -> tuple[Speaker, Manner]:
    """Speaker and manner for answers that also end where the chat template ends a turn, whatever the model's own end:
    at that token, or before that text where it is no token of its own."""
    ids = speaker.tokenizer.backend.encode(ending, add_special_tokens=False).ids
    if len(ids) == 1:
        known = speaker.cfg.eos_token_id
        ends = known if isinstance(known, tuple) else () if known is None else (known,)
        ends = tuple(dict.fromkeys((*ends, *ids)))
        return speaker._replace(cfg=dataclasses.replace(speaker.cfg, eos_token_id=ends)), manner
    return speaker, manner._replace(stop=(*manner.stop, ending)) if ids else manner


def complete(speaker: Speaker, prompt: str, manner: Manner, write: Callable[[str], None]) -> None:
    """Write the continuation of a text, as it comes, and a line end.

    Raises:
      ValueError: a prompt or setting that cannot be.
    """
    for piece in _pieces(speaker, speaker.tokenizer.encode(prompt), manner):
        write(piece)
    write("\n")


def talk(
    speaker: Speaker,
    render: Callable[[Sequence[Message]], str],
    manner: Manner,
    lines: Iterator[str],
    write: Callable[[str], None],
) -> None:
    """Answer line after line.

    Args:
      speaker: who answers.
      render: the text of a conversation up to where the answer begins, special tokens included.
      manner: how.
      lines: what the user says; empty ones are passed over.
      write: takes the answers, as they come, a line end after each.

    Raises:
      ValueError: a conversation that cannot be rendered or continued.
    """
    speaker = speaker._replace(variables=loop.prepare(speaker.cfg, speaker.variables))
    messages: list[Message] = []
    for line in lines:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        ids = speaker.tokenizer.backend.encode(render(messages), add_special_tokens=False).ids
        answer = ""
        for piece in _pieces(speaker, ids, manner):
            write(piece)
            answer += piece
        write("\n")
        messages.append({"role": "assistant", "content": answer.strip()})


def _pieces(speaker: Speaker, ids: list[int], manner: Manner) -> Iterator[str]:
    cfg = speaker.cfg
    if not ids:
        # Nothing to go on from: the model's own beginning of text, or what ends the text before it.
        eos = cfg.eos_token_id[0] if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
        first = cfg.bos_token_id if cfg.bos_token_id is not None else eos
        if first is None:
            raise ValueError("--prompt: empty, and the model has no beginning-of-text token; give some text")
        ids = [first]
    text = Text(speaker.tokenizer, ids, manner.stop)
    return stream_text(cfg, speaker.variables, ids, text, manner.max_new_tokens, manner.choice)
