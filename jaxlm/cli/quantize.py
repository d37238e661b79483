"""`jaxlm quantize`: a model in 4 or 8 bits, in bitsandbytes' form."""

import click

from jaxlm.cli.command import Command


@click.command(cls=Command, example="jaxlm quantize models/mistral-7b models/mistral-7b-nf4 --kind nf4-double")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@click.option("--kind", required=True, help="nf4, nf4-double (its scales quantised too) or int8.")
@click.option("--dtype", default="auto", show_default=True, help="Of what is not quantised; auto: as it is stored.")
def command(model: str, out: str, kind: str, dtype: str) -> None:
    """Write a model with its weights in 4 or 8 bits.

    MODEL is a Hugging Face directory or a run directory, whose adapter is merged first. OUT gets the projections of all
    layers in bitsandbytes' form (embedding, head, norms and routers as they are), and the tokenizer. Every command that
    takes a model takes OUT; for training, name its kind as `quantize`.
    """
    from jaxlm.interop.quantized import quantize_directory

    quantize_directory(model, out, kind, dtype, lambda line: click.echo(f"jaxlm: {line}", err=True))
    click.echo(out)
