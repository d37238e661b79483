"""A model under evaluation: its weights, its tokenizer, and how much of it runs at a time."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.interop.chat import special_tokens
from jaxlm.interop.load import load, text_directory
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.types import Variables

BATCH_SIZE = 16


def silent(done: int, of: int) -> None:
    """The report that nobody reads."""
    del done, of


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
      cfg, variables: the model.
      tokenizer: its tokenizer.
      directory: where its tokenizer is.
      compute: precision of the computation.
      batch_size: rows of a batch; half precision moves log-likelihoods with it, so it belongs to the result.
      prefix_id: what stands before a text without context: the tokenizer's beginning of text, else its end of text.
      end_id: end of text.
      report: called with the requests that are done, and with all there are.
    """

    cfg: ModelConfig
    variables: Variables = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    directory: Path
    compute: Compute = Compute()
    batch_size: int = BATCH_SIZE
    prefix_id: int | None = None
    end_id: int | None = None
    report: Callable[[int, int], None] = silent

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
          text: any.
          add_special_tokens: whether tokenizer.json adds its special tokens; null: unless the text begins with the
            prefix token, as a rendered conversation does.
        """
        if add_special_tokens is None:
            prefix = self.text_of(self.prefix_id)
            add_special_tokens = not (prefix and text.startswith(prefix))
        return self.tokenizer.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def text_of(self, token: int | None) -> str:
        """A token as text, special ones too; nothing for no token."""
        return "" if token is None else self.tokenizer.decode([token], skip_special_tokens=False)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it, encoded together; spaces at the seam belong to the continuation.

        Both texts as lm-eval encodes them: an empty context becomes the prefix token.

        Raises:
          ValueError: an empty context, and no prefix token.
        """
        if context:
            stripped = context.rstrip()
            whole, first = self.encode(context + continuation), self.encode(stripped)
            return first, whole[len(first) :]
        ids = self.encode(continuation, add_special_tokens=False)
        if self.prefix_id is None:
            raise ValueError(
                f"{self.directory}: no token begins or ends a text, so none can stand before a text without context; "
                "name a bos_token or eos_token in tokenizer_config.json"
            )
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_id] else ([self.prefix_id], ids)


def load_subject(
    path: str | Path,
    *,
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
    report: Callable[[int, int], None] = silent,
) -> Subject:
    """Load a model and its tokenizer for evaluation.

    Args:
      path: a Hugging Face model directory or a run directory.
      dtype: of parameters and computation.
      batch_size, report: see `Subject`.

    Raises:
      FileNotFoundError, ValueError: as `interop.load.load` and `load_tokenizer`.
    """
    directory = text_directory(path)
    tokenizer = load_tokenizer(directory, field="tokenizer")
    cfg, variables = load(path, dtype=dtype)
    if tokenizer.size > cfg.V:
        raise ValueError(
            f"{directory}: tokenizer.json has {tokenizer.size} tokens, the model {cfg.V}; use the model's own tokenizer"
        )
    prefix, end = ends(cfg, tokenizer, directory)
    return Subject(cfg, variables, tokenizer, directory, Compute(dtype=dtype), batch_size, prefix, end, report)


def exact() -> contextlib.AbstractContextManager[None]:
    """A context in which products of float32 operands are taken in float32 on accelerators too."""
    return jax.default_matmul_precision("highest")


def ends(cfg: ModelConfig, tokenizer: Tokenizer, directory: Path) -> tuple[int | None, int | None]:
    """Beginning (else end) of text, and end of text: those of tokenizer_config.json before those of config.json."""
    named = {name: tokenizer.backend.token_to_id(text) for name, text in special_tokens(directory).items()}
    end = cfg.eos_token_id[0] if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
    last = [named.get("eos_token"), end, tokenizer.eos_id]
    starts = [named.get("bos_token"), named.get("eos_token"), cfg.bos_token_id, *last]

    def first(ids: list[int | None]) -> int | None:
        return next((i for i in ids if i is not None and 0 <= i < cfg.V), None)

    return first(starts), first(last)
