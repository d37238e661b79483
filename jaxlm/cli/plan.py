"""`jaxlm plan`: what a run will cost, before it is run."""

import click

from jaxlm.cli.command import Command, config_argument, overrides_argument


@click.command(cls=Command, example="jaxlm plan configs/pretrain_125m.yaml train.batch_size=64")
@config_argument
@overrides_argument
def command(config: str, overrides: tuple[str, ...]) -> None:
    """Show what a run of CONFIG needs, before it is run.

    Parameters, FLOPs, memory per device, and each leaf's initial scale, learning rate and weight decay. Writes
    nothing. Ends with 2 where more memory is needed than train.memory_limit.
    """
    from jaxlm.config import load

    settings = load(config, overrides)
    from jaxlm.training import plan

    found = plan.make_plan(settings)
    click.echo(plan.text(found))
    plan.refuse(settings, found.memory)
