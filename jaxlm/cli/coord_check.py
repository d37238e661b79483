"""`jaxlm coord-check`: evidence that muP is at work, in seconds."""

import click

from jaxlm.cli.command import Command, config_argument, overrides_argument


@click.command(cls=Command, example="jaxlm coord-check configs/mup_transfer.yaml model.d_model=64,128,256,512")
@config_argument
@overrides_argument
def command(config: str, overrides: tuple[str, ...]) -> None:
    """Measure how training moves activations, over widths.

    Under muP the change after a few steps must not depend on width; under the standard parametrisation, shown beside
    it, it grows. The widths are multiples of that in mup.base, or a list: model.d_model=64,128,256. A list for
    model.n_layers checks depths.

    Writes coord_check.json, coord_check.png and coord_check.html into run.dir.
    """
    from jaxlm.config import build, given_fields, read
    from jaxlm.config.grid import axes

    plain, lists = axes(overrides)
    raw = read(config, plain)
    settings = build(raw)
    from jaxlm.evals import coordinate_report, coordinates, plots
    from jaxlm.training.setup import use_compilation_cache

    use_compilation_cache()
    over, sizes = coordinates.family({axis.field: axis.values for axis in lists})
    settings, notes = coordinates.fill(settings, given_fields(raw))
    found = coordinates.check(settings, over, sizes, lambda line: click.echo(line, err=True))
    paths = coordinate_report.write(found, settings.run.dir)
    click.echo("\n".join([coordinate_report.table(found), *notes]))
    if not plots.available():
        click.echo(f"{coordinate_report.PNG_FILE}: {plots.MISSING}", err=True)
    for path in paths:
        click.echo(path)
