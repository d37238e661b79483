"""The teacher of a distillation: whether it fits the student, and the student that is made out of it."""

from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.nn.config import ModelConfig
from jaxlm.objectives.config import DistillConfig
from jaxlm.objectives.distill import needs_teacher
from jaxlm.params import select
from jaxlm.params.quantize import dequantize
from jaxlm.training import frozen as trees
from jaxlm.types import Tree, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig
    from jaxlm.training.setup import Program


class Teacher(NamedTuple):
    """What is known of a teacher without its weights: directory, architecture, and tokenizer if it has one."""

    path: str
    cfg: ModelConfig
    tokenizer: Tokenizer | None

    def check(self, config: "RunConfig", student: ModelConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Compare with the student and the data's tokenizer.

        Returns:
          What the user should be told.

        Raises:
          ValueError: ids stand for other tokens, the teacher does not have all of them, or the student cannot be made
            out of it as `objective.init` asks.
        """
        if tokenizer.size > self.cfg.V:
            raise ValueError(
                f"objective.teacher: {self.path} has a vocabulary of {self.cfg.V}, the data's tokenizer has "
                f"{tokenizer.size} tokens; use a teacher with the same tokenizer"
            )
        if cast(DistillConfig, config.objective).init == "teacher":
            select.check(self.cfg, student)
        if self.tokenizer is None:
            return (f"objective.teacher: {self.path} has no tokenizer.json; it is taken to have the data's",)
        if not _same(self.tokenizer, tokenizer):
            raise ValueError(
                f"objective.teacher: {self.path} has another tokenizer ({self.tokenizer.sha256[:12]}) than the data "
                f"({tokenizer.sha256[:12]}), so its distributions are over other tokens; use a teacher with the same "
                "one, or set data.tokenizer to the teacher's"
            )
        return ()


def find(config: "RunConfig") -> Teacher | None:
    """The teacher of a run, where it has one.

    Raises:
      FileNotFoundError, ValueError: naming the field, for a directory that is none or settings that cannot be.
    """
    objective = distillation(config)
    if objective is None:
        return None
    if not objective.teacher and (needs_teacher(objective) or objective.init == "teacher"):
        raise ValueError("objective.teacher: not given; name a model directory or a run directory")
    if objective.cache is not None and objective.on_policy:
        raise ValueError(
            f"objective.on_policy: {objective.on_policy} asks the teacher about new samples, which objective.cache "
            "does not hold; drop one of them"
        )
    if objective.init == "teacher":
        for field, given in (("model.path", config.model.path), ("lora", config.lora)):
            if given is not None:
                raise ValueError(f"{field}: set, but objective.init teacher makes the student anew; drop one of them")
    if not objective.teacher:
        return None
    cfg = trees.others(config)["teacher"]
    return Teacher(objective.teacher, cfg, trees.model_tokenizer(objective.teacher, cfg))


def distillation(config: "RunConfig") -> DistillConfig | None:
    """The objective if it is a distillation."""
    return cast(DistillConfig, config.objective) if config.objective.kind == "distill" else None


def student(config: "RunConfig", program: "Program", frozen: Variables) -> Tree | None:
    """The student's parameters as a part of the teacher's (`objective.init`), on the mesh; None for a fresh student."""
    objective = distillation(config)
    if objective is None or objective.init != "teacher":
        return None
    known = frozen.get("teacher", {})
    params = known["params"] if known.keys() == {"params"} else trees.whole(objective.teacher, "float32", program.mesh)
    teacher = trees.others(config)["teacher"]

    def build(params: Tree) -> Tree:
        chosen = select.select(teacher, program.cfg, dequantize(params))
        return jax.tree.map(lambda x: x.astype(jnp.float32), chosen)

    shardings = jax.tree.map(lambda x: x.sharding, program.abstract.params["params"])
    return jax.jit(build, out_shardings=shardings)(params)


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids stand for the same tokens, in the same file or not."""
    if a.sha256 == b.sha256:
        return True
    ids, others = (x.backend.get_vocab(with_added_tokens=True) for x in (a, b))
    return ids == others
