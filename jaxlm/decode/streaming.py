"""Tokens and text as they come."""

from collections.abc import Iterator, Sequence

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode.generation import GREEDY, chunks
from jaxlm.decode.sampling import Choice
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Variables

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""

LONGEST_HOLD = 8
"""Tokens after which such bytes are taken for what they are."""

CONTEXT = 6
"""Tokens of the prompt that the first new ones are decoded with: some decoders strip the space at the beginning."""


def stream(
    cfg: ModelConfig,
    variables: Variables,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    choice: Choice = GREEDY,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, as they come: the first at once, then some at a time.

    Args:
      cfg, variables, max_new_tokens: as in `generate`; prepare the variables (`loop.prepare`) for many calls.
      prompt: token ids.
      choice: how to sample.

    Raises:
      ValueError: as `generate`, when the first token is asked for.
    """
    given = 0
    for samples in chunks(cfg, variables, [prompt], max_new_tokens, choice):
        yield from samples.ids[0, given : samples.lengths[0]].tolist()
        # A stop sequence found late may have cut what was given already.
        given = max(given, int(samples.lengths[0]))


class Text:
    """Turns tokens into text piece by piece; what may still change is kept back.

    Kept back are bytes that are no whole character yet, and text that may become a stop text. Pieces joined are the
    text of all tokens, up to the first stop text, which is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or "" in stop:
            raise ValueError("stop: not a list of texts that are not empty; give e.g. ['\\n\\n']")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt)[-CONTEXT:]
        self.begin, self.read = 0, len(self.ids)
        self.kept, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; nothing after a stop text."""
        self.ids.append(int(token))
        return self._release(self._decoded(final=False), final=False)

    def close(self) -> str:
        """The rest, at the end."""
        return self._release(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.begin : self.read])
        after = self.tokenizer.decode(self.ids[self.begin :])
        held = len(self.ids) - self.read
        if not final and after.endswith(UNFINISHED) and held < LONGEST_HOLD:
            return ""
        self.begin, self.read = self.read if held else self.begin, len(self.ids)
        return after[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.kept + new
        found = [i for i in (text.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped, self.kept = True, ""
            return text[: min(found)]
        hold = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self.kept = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop text may begin with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    cfg: ModelConfig,
    variables: Variables,
    prompt: Sequence[int],
    text: Text,
    max_new_tokens: int = 64,
    choice: Choice = GREEDY,
) -> Iterator[str]:
    """The continuation of a prompt as text, in pieces of whole characters, ending before the first stop text.

    Args:
      cfg, variables, prompt, max_new_tokens, choice: as in `stream`.
      text: a fresh reader, which knows the tokenizer, the prompt and the stop texts.

    Raises:
      ValueError: as `generate`.
    """
    for token in stream(cfg, variables, prompt, max_new_tokens, choice):
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.close():
        yield piece
