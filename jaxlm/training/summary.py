"""The facts of a run that its configuration and metrics do not hold: `summary.json` in the run directory."""

import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"
PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the report says of a run besides its curves. All of it may be missing.

    Attributes:
      name: title of the report; empty: the run directory's name.
      objective: kind of objective: next_token, dpo, ...
      status: one or a few words: `running`, `done`, `stopped early`, `interrupted`, `failed: non-finite loss`.
      finished: when the report's data ended, ISO 8601.
      steps: steps that the configuration asks for.
      parameters, trainable: numbers of weights of the model, and of those that are trained.
      seconds: wall time of training, over all sittings.
      flops_per_token: model FLOPs of one training token. peak_flops: FLOP/s of all devices, if known.
      baselines: reference scores on the validation data by name; each has `bits_per_byte` and, where it is a model of
        the same tokens, `loss` (nats per token): {"bigram": {"loss": 4.9, "bits_per_byte": 2.4}, "zlib": {...}}.
      facts: further things to state, by label: {"Training tokens": "1.2M"}.
      environment: versions, devices, platform, command, by label; see `environment`.
    """

    name: str = ""
    objective: str = ""
    status: str = ""
    finished: str = ""
    steps: int | None = None
    parameters: int | None = None
    trainable: int | None = None
    seconds: float | None = None
    flops_per_token: float | None = None
    peak_flops: float | None = None
    baselines: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_summary(run_dir: str | os.PathLike[str], summary: Summary) -> Path:
    """Write `summary.json` whole or not at all; returns its path."""
    path = Path(run_dir) / SUMMARY_FILE
    write_whole(path, json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    return path


def read_summary(run_dir: str | os.PathLike[str]) -> Summary:
    """The summary of a run; an empty one where there is no file. Unknown keys are passed over.

    Raises:
      ValueError: the file is no JSON object.
    """
    path = Path(run_dir) / SUMMARY_FILE
    if not path.is_file():
        return Summary()
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; remove the file, or run the training again to write it anew")
    known = {field.name for field in dataclasses.fields(Summary)}
    return Summary(**{name: value for name, value in values.items() if name in known})


def environment(devices: Any = None) -> dict[str, str]:
    """Versions, devices, platform and command of this process, by label.

    Args:
      devices: `jax.devices()`, or null to leave them out.
    """
    found = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    if devices:
        kinds = [device.device_kind for device in devices]
        found["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
        found["backend"] = str(devices[0].platform)
    found["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processors"] = str(os.cpu_count())
    found["python"] = platform.python_version()
    return found | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def write_whole(path: Path, text: str) -> None:
    """Write a file by renaming a finished one, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
