"""A student with its teacher and without: validation bits per byte over seeds, size and speed of both models.

    jaxlm train configs/quickstart.yaml                 # the teacher
    python -m scripts.bench.distill [--steps 400] [--seeds 3] [--arm alone] [override ...]

Every arm is `configs/distill.yaml` with a few fields changed and sees the same rows in the same order for the same
number of steps. Arms differ by what they learn from, seeds by the student's start and the order of rows. Results of
arms that are not asked for are kept. Writes `results/distill.json` and `results/distill.md`.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm import tree
from jaxlm.decode.generation import generate
from jaxlm.interop.load import load
from jaxlm.interop.save import save
from jaxlm.nn.config import ModelConfig
from jaxlm.training import evaluate, teacher
from jaxlm.training.setup import Setup, global_batch, load_frozen, make_apply, prepare, start
from jaxlm.types import Variables
from scripts.bench import experiment

RECIPE = "configs/distill.yaml"
ARMS = {
    "alone": ["objective.kd_weight=0"],
    "distilled": [],
    "part of the teacher, alone": ["objective.kd_weight=0", "objective.init=teacher"],
    "part of the teacher, distilled": ["objective.init=teacher"],
}
PROMPT, NEW, REPEATS = 16, 64, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="all of them unless given")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args()
    arms = options.arm or list(ARMS)
    steps = [] if options.steps is None else [f"train.steps={options.steps}"]
    runs, students = earlier({"recipe": RECIPE, "overrides": [*steps, *options.overrides]}, arms), {}
    for arm in arms:
        setups = [opened([*ARMS[arm], *steps, *options.overrides], seed) for seed in range(options.seeds)]
        for seed, (values, students[arm]) in enumerate(map(run, setups)):
            print(arm, seed, values, flush=True)
            runs.append({"arm": arm, "seed": seed, **values})
    cfg, variables = load(setups[0].config.objective.teacher)
    result: dict[str, Any] = {"recipe": RECIPE, "overrides": [*steps, *options.overrides], "runs": runs}
    result["teacher"] = {"bits_per_byte": score(setups[0], cfg, variables)}
    result["arms"] = {arm: summary(runs, arm) for arm in ARMS if any(r["arm"] == arm for r in runs)}
    student = (setups[0].program.cfg, students[arms[-1]])
    result |= compare({"student": student, "teacher": (cfg, variables)})
    text = table(result)
    print(text)
    (experiment.RESULTS / "distill.md").write_text(text)
    print(experiment.keep("distill", result))


def earlier(settings: dict[str, Any], arms: list[str]) -> list[dict[str, Any]]:
    """Runs of the other arms that are kept from before, if they had the same settings."""
    file = experiment.RESULTS / "distill.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    same = all(kept.get(name) == value for name, value in settings.items())
    return [run for run in kept["runs"] if run["arm"] not in arms] if same else []


def opened(overrides: list[str], seed: int) -> Setup:
    """The recipe with some fields changed, its data and its program."""
    return prepare(configs.load(RECIPE, [*overrides, f"run.seed={seed}"]))


def run(setup: Setup) -> tuple[dict[str, float], Variables]:
    """Train a student to the end: what is measured, and its variables."""
    program, config = setup.program, setup.config
    step = experiment.compiled_step(program)
    with jax.set_mesh(program.mesh):
        frozen = load_frozen(config, program)
        state = start(None, program, frozen, teacher.student(config, program, frozen))
        losses, begun = [], time.monotonic()
        for index in range(config.train.steps):
            batch = global_batch(setup.data.train, setup.loader.rows(index), program.mesh)
            state, metrics = step(state, frozen, batch)
            losses.append(metrics["distill/cross_entropy"])
        last = np.mean([float(loss) for loss in losses[-len(losses) // 10 :]])
        seconds = time.monotonic() - begun
    variables = {"params": state.params["params"]}
    return {
        "bits_per_byte": score(setup, program.cfg, variables),
        "train_nats": float(last),
        "seconds": seconds,
    }, variables


def score(setup: Setup, cfg: ModelConfig, variables: Variables) -> float:
    """Bits per byte of the validation rows."""
    apply = make_apply({"policy": cfg}, setup.program.compute)
    bytes_V = jax.numpy.asarray(setup.data.token_bytes, "float32")
    sums = jax.jit(lambda v, batch: evaluate.text_sums(apply, bytes_V, v, batch))
    with jax.set_mesh(setup.program.mesh):
        batches = evaluate.batches_of(setup, setup.data.validation)
        return evaluate.text_metrics(sums, variables, batches)["bits_per_byte"]


def summary(runs: list[dict[str, Any]], arm: str) -> dict[str, dict[str, float]]:
    """Mean and deviation over seeds of every number."""
    mine = [r for r in runs if r["arm"] == arm]
    names = ("bits_per_byte", "train_nats", "seconds")
    return {name: experiment.mean_and_deviation(r[name] for r in mine) for name in names}


def compare(models: dict[str, tuple[ModelConfig, Variables]]) -> dict[str, Any]:
    """Parameters, bytes of the saved weights, and time of generation of student and teacher, by turns."""
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    prompts = [np.arange(PROMPT).tolist()]
    for _ in range(REPEATS):
        for name, (cfg, variables) in models.items():
            cfg = dataclasses.replace(cfg, eos_token_id=None)
            begun = time.perf_counter()
            generate(cfg, variables, prompts, max_new_tokens=NEW, stop=())
            seconds[name].append(time.perf_counter() - begun)
    for name, (cfg, variables) in models.items():
        with tempfile.TemporaryDirectory() as folder:
            save(folder, cfg, variables)
            size = (pathlib.Path(folder) / "model.safetensors").stat().st_size
        found[name] = {
            "parameters": tree.count(variables["params"]),
            "bytes": size,
            "generation_seconds": min(seconds[name]),
        }
    ratio = {key: found["teacher"][key] / found["student"][key] for key in found["teacher"]}
    return {"models": found, "teacher_over_student": ratio}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = ["| student | validation bits per byte | training, nats per token |", "| --- | --- | --- |"]
    for arm, values in result["arms"].items():
        cells = [f"{values[n]['mean']:.4f} ± {values[n]['deviation']:.4f}" for n in ("bits_per_byte", "train_nats")]
        rows.append(f"| {arm} | {cells[0]} | {cells[1]} |")
    rows += [f"| (the teacher) | {result['teacher']['bits_per_byte']:.4f} | |", ""]
    rows += ["| | student | teacher | ratio |", "| --- | --- | --- | --- |"]
    for key, ratio in result["teacher_over_student"].items():
        values = [result["models"][name][key] for name in ("student", "teacher")]
        shown = [f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in values]
        rows.append(f"| {key.replace('_', ' ')} | {shown[0]} | {shown[1]} | {ratio:.2f} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
