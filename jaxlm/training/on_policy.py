"""Steps of a distillation on what the student itself writes, which the teacher then judges token by token (GKD).

A student that only ever sees the data's text meets its own mistakes for the first time when it is used. Which steps
these are, and what is drawn in them, depends on the run's seed, the step and the weights alone.
"""

from collections.abc import Callable

import numpy as np

from jaxlm.decode.batch import check, pad
from jaxlm.decode.sampling import Choice
from jaxlm.decode.together import sample_on
from jaxlm.dist import place
from jaxlm.objectives.forward import policy
from jaxlm.training.rollout import completed
from jaxlm.training.setup import Setup
from jaxlm.training.teacher import distillation
from jaxlm.types import Batch, Variables


def make(setup: Setup) -> Callable[[Variables, Variables, Batch, int], Batch] | None:
    """What replaces the rows of some steps: `(params, frozen, batch, step) -> batch`; None where no step is such.

    All batches get the column `own`, see `objectives.distill`. Half of a row is drawn.
    """
    objective, program, seed = distillation(setup.config), setup.program, setup.config.run.seed
    if objective is None or not objective.on_policy:
        return None
    share, length = objective.on_policy, setup.config.data.sequence_length
    new = max(length // 2, 1)

    def roll(params: Variables, frozen: Variables, batch: Batch, step: int) -> Batch:
        size = len(batch["tokens"])
        if np.random.default_rng((seed, step)).random() >= share:
            own = np.zeros(len(place.host_rows(program.mesh, size)), np.float32)
            return batch | place.place_batch({"own": own}, program.mesh, size)
        tokens, segments, mask = place.gather([batch[name] for name in ("tokens", "segments", "mask")])
        prompts = [prompt_of(*row, length - new) for row in zip(tokens, segments, mask, strict=True)]
        padded = pad(check(program.cfg, prompts, new), max(length - new, 1))
        choice = Choice(temperature=1.0, seed=(seed << 32) + step)
        samples = sample_on(program.mesh, program.cfg, policy(params, frozen), padded, new, choice)
        columns = completed(prompts, samples, length) | {"own": np.ones(size, np.float32)}
        mine = place.host_rows(program.mesh, size)
        return place.place_batch({name: column[mine] for name, column in columns.items()}, program.mesh, size)

    return roll


def prompt_of(tokens_L: np.ndarray, segments_L: np.ndarray, mask_L: np.ndarray, most: int) -> list[int]:
    """What the student is to go on from, at most the last `most` tokens of it.

    Of a row with a prompt, that; of running text, whose labels begin at once, the first half of its first document.
    Both are those of the first label. A row of padding gives its first token.
    """
    labelled = np.flatnonzero(mask_L > 0)
    first = int(labelled[0]) if labelled.size else 0
    inside = np.flatnonzero(segments_L == segments_L[first])
    start, stop = int(inside[0]), int(inside[-1]) + 1
    end = first + 1 if first > start else start + max((stop - start) // 2, 1)
    return tokens_L[max(start, end - max(most, 1)) : end].tolist()
