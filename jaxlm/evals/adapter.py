"""lm-evaluation-harness's view of a model: all three kinds of request. Importing this needs lm-eval."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from jaxlm.decode import loop
from jaxlm.decode.generation import chunks, ends_of
from jaxlm.decode.sampling import Choice
from jaxlm.evals.scoring import Request, rolling_windows, score
from jaxlm.evals.subject import Subject, exact
from jaxlm.interop.chat import render_chat
from jaxlm.types import Variables

MAX_NEW_TOKENS = 256
"""Where a task does not say, as in lm-eval."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of new tokens, the first given one counts."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class JaxLM(TemplateLM):
    """A `Subject` as lm-eval's model."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    @property
    def eot_token_id(self) -> int | None:
        """End of text."""
        return self.subject.end_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without context."""
        return self.subject.prefix_id

    @property
    def max_length(self) -> int:
        """The model's window."""
        return self.subject.cfg.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return MAX_NEW_TOKENS

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.subject.batch_size

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval caches requests by."""
        return str(self.subject.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the record."""
        from jaxlm.interop.chat import ChatTemplate

        return ChatTemplate(self.subject.directory).source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; a template that knows no system messages gets the others alone."""
        settings: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return render_chat(self.subject.directory, chat_history, **settings)
        except ValueError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return render_chat(self.subject.directory, others, **settings)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, see `Subject.encode`."""
        del kwargs
        return self.subject.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        found = [(s.log_likelihood, s.is_greedy) for s in score(self.subject, [Request(*ids) for _, *ids in requests])]
        for (texts, _, _), result in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows."""
        del disable_tqdm
        if self.subject.prefix_id is None:
            raise ValueError(
                f"{self.subject.directory}: no token begins or ends a text; name one in tokenizer_config.json"
            )
        texts = [self.subject.encode(request.args[0]) for request in requests]
        windows = [rolling_windows(ids, self.subject.prefix_id, self.max_length) for ids in texts]
        scores = iter(score(self.subject, [window for many in windows for window in many]))
        sums = [sum(next(scores).log_likelihood for _ in many) for many in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, each up to the first of its stop texts."""
        del disable_tqdm
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers: dict[int, str] = {}
        for indices in alike.values():
            settings = dict(requests[indices[0]].args[1])
            prompts = {i: self._prompt(requests[i].args[0], settings) for i in indices}
            for rows in _cut(sorted(indices, key=lambda i: -len(prompts[i])), self.batch_size):
                texts = self._continue([prompts[i] for i in rows], settings, seed=len(answers))
                for i, text in zip(rows, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                self.subject.report(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]

    @functools.cached_property
    def _prepared(self) -> Variables:
        return loop.prepare(self.subject.cfg, self.subject.variables)

    def _prompt(self, text: str, settings: dict[str, Any]) -> list[int]:
        """Ids of a context, cut from the left so that the new tokens fit the window too."""
        room = self.max_length - _new_tokens(settings)
        if room < 1:
            raise ValueError(
                f"max_gen_toks: {_new_tokens(settings)} new tokens leave no room for a context in the model's window "
                f"of {self.max_length}; lower it in the task's generation_kwargs"
            )
        ids = self.subject.encode(text)[-room:]
        return ids or [i for i in [self.subject.prefix_id] if i is not None]

    def _continue(self, prompts: list[list[int]], settings: dict[str, Any], seed: int) -> list[str]:
        stops = _stops(settings, self.subject.text_of(self.subject.end_id))
        ends = set(ends_of(self.subject.cfg))
        texts: list[str] = []
        with exact():
            for samples in chunks(
                self.subject.cfg, self._prepared, prompts, _new_tokens(settings), _choice(settings, seed)
            ):
                rows = [row[:n].tolist() for row, n in zip(samples.ids, samples.lengths, strict=True)]
                texts = [self.subject.tokenizer.decode(ids) for ids in rows]
                # Whoever has met a stop text is done, though the token loop, which knows no texts, would go on.
                if all(ends & set(ids[-1:]) or any(s in t for s in stops) for ids, t in zip(rows, texts, strict=True)):
                    break
        return [_before(text, stops) for text in texts]


def _cut(indices: list[int], size: int) -> Iterable[list[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _new_tokens(settings: dict[str, Any]) -> int:
    return int(next((settings[name] for name in LENGTHS if settings.get(name) is not None), MAX_NEW_TOKENS))


def _stops(settings: dict[str, Any], end: str) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in [*([until] if isinstance(until, str) else until), end] if stop]


def _choice(settings: dict[str, Any], seed: int) -> Choice:
    """Sampling as the task asks for it; greedy unless it says `do_sample` or gives a temperature."""
    unknown = set(settings) - {*LENGTHS, *SAMPLING, "until", "do_sample"}
    if unknown:
        raise ValueError(
            f"generation_kwargs.{min(unknown)}: unknown; the known ones are until, do_sample, {LENGTHS[0]}, "
            f"{', '.join(SAMPLING)}"
        )
    given = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    drawn = settings.get("do_sample")
    if drawn is False:
        given["temperature"] = 0.0
    elif drawn:
        given.setdefault("temperature", 1.0)
    return Choice(**given, seed=seed)


def _before(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
