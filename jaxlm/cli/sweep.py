"""`jaxlm sweep`: a grid of short runs, and whether the learning rate transfers."""

import click

from jaxlm.cli.command import Command, config_argument


@click.command(
    cls=Command,
    example="jaxlm sweep configs/mup_transfer.yaml model.d_model=64,128,256 optimizer.learning_rate=2e-3,4e-3,8e-3",
)
@config_argument
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE,VALUE...]...")
def command(config: str, overrides: tuple[str, ...]) -> int | None:
    """Train a grid of short runs and compare their losses.

    A comma list spans the grid (quote or bracket what has commas of its own), a single value changes CONFIG. Without a
    list, rates around that of CONFIG are tried. With mup set each cell is trained under the standard parametrisation
    too. The same command again goes on where a sweep stopped.

    Writes sweep.json, sweep.png and sweep.html into run.dir.
    """
    from jaxlm.config import build, load, read
    from jaxlm.config.grid import axes, points

    plain, grid = axes(overrides)
    settings = load(config, plain)
    if not grid:
        rates = ",".join(f"{settings.optimizer.learning_rate * 2.0**i:.6g}" for i in range(-2, 3))
        grid = axes([f"optimizer.learning_rate={rates}"])[1]
    cells = [(point.values, build(read(config, [*plain, *point.overrides]))) for point in points(grid)]
    from jaxlm.evals import plots, sweep, sweep_report
    from jaxlm.evals.transfer import Result
    from jaxlm.training.setup import use_compilation_cache

    use_compilation_cache()
    runs = [cell for values, one in cells for cell in sweep.parametrised(values, one)]
    try:
        losses = sweep.sweep(runs, settings.run.dir)
    except sweep.Interrupted as stopped:
        click.echo("jaxlm: stopped; finished runs are kept, the same command again goes on from there", err=True)
        return stopped.code
    results = [Result(cell.parametrisation, cell.values, loss) for cell, loss in zip(runs, losses, strict=True)]
    paths = sweep_report.write(results, settings.run.dir)
    click.echo(sweep_report.table(results))
    if not plots.available():
        click.echo(f"{sweep_report.PNG_FILE}: {plots.MISSING}", err=True)
    for path in paths:
        click.echo(path)
    return None
