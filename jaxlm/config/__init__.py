"""The whole configuration of a run: sections that live beside their code, read, overridden, checked and written."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from jaxlm.config.convert import Kinds, convert
from jaxlm.config.model import ModelSection, adopt
from jaxlm.config.text import Raw, leaf_names, read, write
from jaxlm.data.config import DataConfig
from jaxlm.dist.mesh import MeshConfig
from jaxlm.nn.config import LoraConfig, ModelConfig
from jaxlm.objectives.config import KINDS, NextTokenConfig, ObjectiveConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.params.config import MupConfig
from jaxlm.training.config import RunSection, TrainConfig

__all__ = ["ModelSection", "Raw", "RunConfig", "adopt", "build", "dump", "given_fields", "load", "read"]

CHOICES: Kinds = {ObjectiveConfig: KINDS}
"""Base classes whose `kind` decides which dataclass holds."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; all of it has a default.

    Attributes:
      run, model, data, objective, train, optimizer, mesh: see the sections' classes.
      mup: null is standard parametrisation.
      lora: null trains all parameters.
      quantize: how the frozen base is stored; needs something else that is trained.
    """

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = NextTokenConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mup: MupConfig | None = None
    lora: LoraConfig | None = None
    quantize: Literal["nf4", "nf4-double", "int8"] | None = None
    mesh: MeshConfig = MeshConfig()

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for values or combinations that cannot be (`load` has done so)."""
        convert(RunConfig, _plain(self), kinds=CHOICES)
        self.check_combinations()

    def check_combinations(self) -> None:
        """The part of `validate` that looks at several fields at once."""
        for section in (self.data, self.objective, self.train, self.optimizer, self.mesh):
            section.validate()
        self.architecture().validate()
        self._check_base()
        if self.quantize is not None and self.lora is None:
            raise ValueError(
                f"quantize: {self.quantize} freezes the model, and lora is null; set lora or drop quantize"
            )
        if self.objective.kind == "kto" and self.train.batch_size < 2:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size}, but objective.kind kto matches each completion with the "
                "prompt of another row; use 2 or more"
            )
        if self.mesh.context > 0 and self.data.sequence_length % self.mesh.context:
            raise ValueError(
                f"data.sequence_length: {self.data.sequence_length} is not a multiple of mesh.context "
                f"{self.mesh.context}; change one of them"
            )

    def architecture(self, vocab_size: int | None = None) -> ModelConfig:
        """The model of the `model`, `lora` and `train` sections; `vocab_size` fills one left open."""
        section = self.model
        if section.vocab_size is None:
            section = dataclasses.replace(section, vocab_size=vocab_size)
        return section.architecture(max_length=self.data.sequence_length, dropout=self.train.dropout, lora=self.lora)

    def mup_base(self, vocab_size: int | None = None) -> ModelConfig | None:
        """The model at which muP and standard parametrisation agree: `model` with `mup.base` in it."""
        return None if self.mup is None else self.mup.base_of(self.architecture(vocab_size))

    def yaml(self) -> str:
        """`dump` of this configuration, for rooms that do not import this one."""
        return dump(self)

    def _check_base(self) -> None:
        base = self.mup_base()
        try:
            if base is not None:
                base.validate()
        except ValueError as error:
            raise ValueError(str(error).replace("model.", "mup.base.")) from None


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML or JSON file, with `path.to.field=VALUE` overrides, checked.

    Raises:
      FileNotFoundError: no such file.
      ValueError: `WHERE: what; what to do`; WHERE is the dotted field, the file or `file:line`.
    """
    return build(read(path, overrides))


def build(raw: Raw) -> RunConfig:
    """Nested mappings as a checked configuration; where `model.path` exists, `model` holds that directory's shape."""
    config = convert(RunConfig, raw, kinds=CHOICES)
    path = config.model.path
    if path is not None and pathlib.Path(path).is_dir():
        from jaxlm.interop.load import load_config

        config = dataclasses.replace(config, model=adopt(config.model, given_fields(raw), load_config(path)))
    config.check_combinations()
    return config


def given_fields(raw: Raw) -> frozenset[str]:
    """The dotted names of the fields that a configuration as read (`read`) gives itself."""
    return leaf_names(raw)


def dump(config: RunConfig) -> str:
    """YAML with every field and its value, one a line; `load` of it gives an equal configuration."""
    return write(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
