"""`jaxlm train`: every kind of training."""

import click

from jaxlm.cli.command import Command, config_argument, overrides_argument


@click.command(cls=Command, example="jaxlm train configs/quickstart.yaml train.steps=200 data.path=notes.txt")
@config_argument
@overrides_argument
def command(config: str, overrides: tuple[str, ...]) -> int | None:
    """Train as CONFIG says.

    Where run.dir has a checkpoint, training goes on from it: the same command again resumes a run.

    Writes config.yaml, metrics.jsonl, samples.txt, checkpoints/, tokenizer.json, hf/ and report.html into run.dir.
    """
    from jaxlm.config import load

    settings = load(config, overrides)
    from jaxlm.evals.around import train

    return train(settings)
