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
    from jaxlm.dist.multihost import is_main
    from jaxlm.evals.around import before_and_after, train

    code = train(settings)
    if code == 0 and is_main() and (text := before_and_after(settings.run.dir)) is not None:
        click.echo(f"before (A) and after (B) training, held-out items:\n{text}", err=True)
    return code
