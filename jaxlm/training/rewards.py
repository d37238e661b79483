"""Reward functions: finding them by name, calling them, and saying in one line what is wrong with them.

A reward function is `name(prompts, completions, **columns) -> list[float | None]`: lists with one entry a completion,
every other column of the data under its name. None is not scorable.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.objectives.completions import is_function

FIELD = "objective.rewards"


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function.

    Attributes:
      name: the entry of `objective.rewards`, `file.py:function`.
      function: what it names.
    """

    name: str
    function: Callable[..., Any] = dataclasses.field(repr=False)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> np.ndarray:
        """Rewards as float32 [R]; NaN where the function returned None.

        Raises:
          RuntimeError: the function raised something, or did not return one number or None a completion.
        """
        try:
            given = self.function(
                prompts=list(prompts), completions=list(completions), **{k: list(v) for k, v in columns.items()}
            )
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
            where = f" in line {lines[1]}" if len(lines) > 1 else ""
            raise RuntimeError(f"{self.name}: raised {_said(error)}{where}; mend it, then run again") from error
        try:
            values = list(given)
        except TypeError:
            kind = type(given).__name__
            raise RuntimeError(
                f"{self.name}: returned {kind}, not a list; return one number or None for each of the "
                f"{len(completions)} completions"
            ) from None
        if len(values) != len(completions):
            raise RuntimeError(
                f"{self.name}: returned {len(values)} rewards for {len(completions)} completions; return one number or "
                "None for each"
            )
        return np.array([self._number(index, value) for index, value in enumerate(values)], np.float32)

    def _number(self, index: int, value: Any) -> float:
        if value is None:
            return math.nan
        if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0:
            value = value.item()
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RuntimeError(
                f"{self.name}: reward {index} is {value!r}, not a finite number; return a number, or None for what "
                "cannot be scored"
            )
        return float(value)


def load_rewards(entries: Sequence[str]) -> list[Reward | None]:
    """The functions that `objective.rewards` names; None for the directory of a reward model.

    Args:
      entries: `path/file.py:function` or `package.module:function`; anything without a colon is a directory.

    Raises:
      FileNotFoundError: no such file or directory.
      ValueError: a file that cannot be run, or no such function in it.
    """
    for entry in entries:
        if not is_function(entry) and not Path(entry).expanduser().is_dir():
            raise FileNotFoundError(
                f"{FIELD}: {entry}: no such directory; name a reward model, or a function as path/file.py:function"
            )
    return [_load(entry) if is_function(entry) else None for entry in entries]


def model_directory_of(entries: Sequence[str]) -> str | None:
    """The directory of a reward model among the entries, if there is one.

    Raises:
      ValueError: there are two.
    """
    directories = [entry for entry in entries if not is_function(entry)]
    if len(directories) > 1:
        raise ValueError(f"{FIELD}: two reward models, {' and '.join(directories[:2])}; name at most one")
    return directories[0] if directories else None


def _load(entry: str) -> Reward:
    where, _, name = entry.rpartition(":")
    module = _of_file(entry, Path(where).expanduser()) if where.endswith(".py") else _import(entry, where)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"{FIELD}: {entry}: no function of that name in {where}; there are: {', '.join(known) or '-'}")
    return Reward(entry, function)


def _of_file(entry: str, file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{FIELD}: {entry}: no such file; give its path from the current directory")
    return _run_file(entry, file.resolve(), file.stat().st_mtime_ns)


@functools.cache
def _run_file(entry: str, file: Path, changed: int) -> Any:
    """The file as a module; run once, however often it is asked for, until it changes."""
    spec = importlib.util.spec_from_file_location(f"jaxlm_rewards_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{FIELD}: {entry}: not a Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{FIELD}: {entry}: the file raised {_said(error)}; mend it") from error
    return module


def _import(entry: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{FIELD}: {entry}: {error}; name a file as path/file.py:function, or a module that can be imported"
        ) from None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
