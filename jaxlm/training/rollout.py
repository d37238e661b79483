"""Completions that the trained model draws itself, in the same process and with the same weights, as batches.

A rollout depends on the weights, the run's seed and the step alone, so a resumed run draws what it would have drawn.
All its arrays have one shape over the whole run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jaxlm.data.dataset import Dataset
from jaxlm.data.prompts import PromptRows
from jaxlm.data.supply import PROMPTS
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode.batch import check, pad
from jaxlm.decode.generation import Samples, ends_of
from jaxlm.decode.sampling import Choice
from jaxlm.decode.streaming import CONTEXT
from jaxlm.decode.together import sample_on
from jaxlm.dist import multihost, place
from jaxlm.interop.load import load_config
from jaxlm.objectives.completions import reward_column
from jaxlm.objectives.config import GrpoConfig, PpoConfig
from jaxlm.objectives.forward import policy
from jaxlm.training.frozen import model_tokenizer
from jaxlm.training.rewards import Reward, load_rewards, model_directory_of
from jaxlm.training.setup import Setup
from jaxlm.types import Batch, Variables

MULTIPLE = 8
"""Rows are as long as prompt and completion together can get, rounded up to this."""


class Drawn(NamedTuple):
    """Completions and what was thought of them.

    Attributes:
      prompts: token ids. texts: of the completions, without special tokens.
      samples: ids and lengths.
      rewards: float32 [R, F] of the functions; NaN for what is not scorable, and for reward models.
      columns: of the data rows, one value a completion.
    """

    prompts: list[list[int]]
    texts: list[str]
    samples: Samples
    rewards: np.ndarray
    columns: dict[str, list[Any]]


@dataclasses.dataclass(frozen=True)
class Roller:
    """Draws completions of prompts and has them rewarded.

    Attributes:
      setup: the run.
      functions: of `objective.rewards`; None stands for a model.
      ends: tokens that end a completion, those of the model's text ends included.
    """

    setup: Setup
    functions: tuple[Reward | None, ...]
    ends: tuple[int, ...]

    @property
    def length(self) -> int:
        """L of the training rows."""
        multiple = MULTIPLE * self.setup.program.mesh.shape["context"]
        data = (self.setup.data.train, self.setup.data.validation)
        longest = max(rows_of(part).longest for part in data) + self.objective.max_new_tokens
        return min(-(-longest // multiple) * multiple, self.setup.config.data.sequence_length)

    @property
    def objective(self) -> GrpoConfig | PpoConfig:
        """The `objective` section."""
        return cast(GrpoConfig | PpoConfig, self.setup.config.objective)

    def draw(
        self, rows: PromptRows, chosen: Sequence[int], params: Variables, frozen: Variables, choice: Choice
    ) -> Drawn:
        """One completion for each of `chosen`, row numbers that may repeat. All processes call it together."""
        program = self.setup.program
        cfg = dataclasses.replace(program.cfg, eos_token_id=self.ends or None)
        prompts = [rows.ids[row] for row in chosen]
        most, variables = self.objective.max_new_tokens, policy(params, frozen)
        padded = pad(check(cfg, prompts, most), rows.longest)
        samples = sample_on(program.mesh, cfg, variables, padded, most, choice)
        ids = [row[:n].tolist() for row, n in zip(samples.ids, samples.lengths, strict=True)]
        texts = continuations(self.setup.data.tokenizer, prompts, ids)
        columns = rows.columns_of(chosen)
        given = [rows.prompts[row] for row in chosen]
        nothing = np.full(len(texts), np.nan, np.float32)
        each = [nothing if f is None else f(given, texts, columns) for f in self.functions]
        # Functions may depend on chance or time: what the first process was told counts for all.
        return Drawn(prompts, texts, samples, multihost.all_hosts(np.stack(each, axis=1))[0], columns)

    def batch(self, drawn: Drawn) -> dict[str, np.ndarray]:
        """The columns of a rollout, see `objectives.completions`; prompt and completion stand at the left of a row."""
        samples = drawn.samples
        last = samples.ids[np.arange(len(samples.ids)), np.maximum(samples.lengths - 1, 0)]
        return {
            **completed(drawn.prompts, samples, self.length),
            "ended": np.isin(last, self.ends).astype(np.float32),
            **{reward_column(i): column for i, column in enumerate(drawn.rewards.T)},
        }


def completed(prompts: Sequence[list[int]], samples: Samples, length: int) -> dict[str, np.ndarray]:
    """Prompts with their completions as rows [R, length] of `types.Batch`, the completions their labels."""
    shape = (len(prompts), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, np.float32)
    for row, (prompt, ids, new) in enumerate(zip(prompts, samples.ids, samples.lengths, strict=True)):
        end = len(prompt) + int(new)
        tokens[row, :end] = [*prompt, *ids[:new]]
        targets[row, : end - 1] = tokens[row, 1:end]
        segments[row, :end] = 1
        mask[row, len(prompt) - 1 : end - 1] = 1.0
    positions = np.arange(length, dtype=np.int32)[None, :] * segments
    return {"tokens": tokens, "targets": targets, "mask": mask, "segments": segments, "positions": positions}


def make(setup: Setup) -> Callable[[Variables, Variables, Batch, int], Batch] | None:
    """What makes a training batch of prompts: `(params, frozen, batch, step) -> batch`; None where data are given.

    Raises:
      ValueError, FileNotFoundError: a reward function that cannot be found.
    """
    if getattr(setup.config.objective, "on_policy", 0.0):
        from jaxlm.training import on_policy

        return on_policy.make(setup)
    if setup.config.objective.kind not in PROMPTS:
        return None
    roller, rows = roller_of(setup), rows_of(setup.data.train)
    group, temperature = getattr(roller.objective, "group_size", 1), roller.objective.temperature

    def roll(params: Variables, frozen: Variables, batch: Batch, step: int) -> Batch:
        chosen = np.repeat(place.gather(batch["row"]), group).tolist()
        choice = Choice(temperature=temperature, seed=(setup.config.run.seed << 32) + step)
        columns = roller.batch(roller.draw(rows, chosen, params, frozen, choice))
        mine = place.host_rows(setup.program.mesh, len(chosen))
        return place.place_batch({n: x[mine] for n, x in columns.items()}, setup.program.mesh, len(chosen))

    return roll


def roller_of(setup: Setup) -> Roller:
    """What draws and rewards completions in this run.

    Raises:
      ValueError, FileNotFoundError: a reward that cannot be found, or a reward model with another tokenizer.
    """
    objective, tokenizer = cast(GrpoConfig | PpoConfig, setup.config.objective), setup.data.tokenizer
    if (directory := model_directory_of(objective.rewards)) is not None:
        judge = model_tokenizer(directory, load_config(directory))
        if judge is not None and judge.sha256 != tokenizer.sha256:
            raise ValueError(
                f"objective.rewards: {directory} has another tokenizer than the trained model, whose tokens it is to "
                "score; use a reward model with the same one"
            )
    stops = [] if objective.stop is None else tokens_with(tokenizer, objective.stop)
    ends = tuple(dict.fromkeys([*ends_of(setup.program.cfg), *stops]))
    return Roller(setup, tuple(load_rewards(objective.rewards)), ends)


def tokens_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens whose own text has this in it.

    Raises:
      ValueError: there is none.
    """
    each = tokenizer.backend.decode_batch([[token] for token in range(tokenizer.size)], skip_special_tokens=False)
    found = [token for token, own in enumerate(each) if text in own]
    if not text or not found:
        raise ValueError(f"objective.stop: {text!r} stands in no token of the tokenizer; give a shorter text")
    return found


def continuations(tokenizer: Tokenizer, prompts: Sequence[list[int]], ids: Sequence[list[int]]) -> list[str]:
    """The texts that ids add to their prompts, without special tokens; some decoders strip a leading space alone."""
    contexts = [prompt[-CONTEXT:] for prompt in prompts]
    before = tokenizer.backend.decode_batch(contexts)
    after = tokenizer.backend.decode_batch([a + b for a, b in zip(contexts, ids, strict=True)])
    return [whole[len(begin) :] for begin, whole in zip(before, after, strict=True)]


def rows_of(data: Dataset) -> PromptRows:
    """The prompts of a dataset of them."""
    return cast(PromptRows, data.rows)
