"""Files of a run directory besides its records: the resolved configuration, samples, summary, final export, report."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxlm import tree
from jaxlm.data.baselines import baselines
from jaxlm.dist import multihost, place
from jaxlm.interop.save import save
from jaxlm.training.report import write_report
from jaxlm.training.samples import Sample
from jaxlm.training.setup import Setup
from jaxlm.training.summary import Summary, environment, write_summary, write_whole
from jaxlm.types import Variables

if TYPE_CHECKING:
    from jaxlm.training.loop import Run

SAMPLE_TOKENS = 48


def write_files(setup: Setup, directory: Path) -> None:
    """The resolved configuration and the tokenizer, at the start of every sitting."""
    if multihost.is_main():
        write_whole(directory / "config.yaml", setup.config.yaml())
        write_whole(directory / "tokenizer.json", setup.data.tokenizer.json)


def take_samples(setup: Setup, params: Variables) -> list[Sample]:
    """What the model makes of the configured prompts, greedily."""
    return []


def finish(run: "Run", step: int) -> None:
    """Export the model and write the summary and the report.

    Args:
      run: after its last step, state saved.
      step: steps taken.
    """
    setup, directory = run.setup, run.directory
    run.progress.status("exporting")
    params = place.gather({**setup.frozen, **run.params})
    if not multihost.is_main():
        return
    save(directory / "hf", setup.program.cfg, params, tokenizer=directory / "tokenizer.json")
    write_summary(directory, summary(run, "done" if step == run.train.steps else "stopped early"))
    page = write_report(directory)
    run.progress.message(f"done: {page}")


def summary(run: "Run", status: str) -> Summary:
    """The facts of a run that its configuration and metrics do not hold."""
    setup = run.setup
    scored = baselines(setup.data.train, setup.data.validation, setup.data.tokenizer)
    trained, frozen = tree.count(run.state.params), tree.count(setup.frozen)
    return Summary(
        name=run.directory.name,
        objective=setup.config.objective.kind,
        status=status,
        finished=datetime.datetime.now().isoformat(timespec="seconds"),
        steps=run.train.steps,
        parameters=trained + frozen,
        trainable=trained,
        seconds=run.elapsed,
        flops_per_token=run.recorder.flops_per_token,
        peak_flops=run.recorder.peak,
        baselines={
            "unigram": {"loss": scored.unigram, "bits_per_byte": scored.unigram_bits_per_byte},
            "bigram": {"loss": scored.bigram, "bits_per_byte": scored.bigram_bits_per_byte},
            "zlib": {"bits_per_byte": scored.zlib_bits_per_byte},
        },
        environment=environment(jax.devices()),
    )
