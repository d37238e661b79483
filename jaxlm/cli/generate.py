"""`jaxlm generate`: let a model continue a prompt, or talk to it."""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import click

from jaxlm.cli.command import Command

at_least_0 = click.FloatRange(min=0)
share = click.FloatRange(min=0, max=1)


@click.command(cls=Command, example='jaxlm generate runs/quickstart --prompt "The " --temperature 0.8 --seed 1')
@click.argument("model", metavar="MODEL")
@click.option("--prompt", metavar="TEXT", help="What the model continues.")
@click.option("--chat", is_flag=True, help="Talk to the model through its chat template, a line at a time.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="At most so many.")
@click.option("--temperature", type=at_least_0, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="The k likeliest; 0 is all.")
@click.option("--top-p", type=share, default=1.0, show_default=True, help="The likeliest that sum to p; 1 is all.")
@click.option("--min-p", type=share, default=0.0, show_default=True, help="At least p times the likeliest's.")
@click.option("--repetition-penalty", type=at_least_0, default=1.0, show_default=True, help="Of seen tokens; 1 is off.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
def command(
    model: str, prompt: str | None, chat: bool, max_new_tokens: int, stop: tuple[str, ...], **choice: Any
) -> None:
    """Continue a prompt, or talk.

    MODEL is a Hugging Face model directory or a run directory. The text alone goes to stdout.
    """
    if (prompt is None) != chat:
        raise click.UsageError("give either --prompt or --chat")
    from jaxlm.data.tokenizer import load_tokenizer
    from jaxlm.decode import console
    from jaxlm.decode.sampling import Choice
    from jaxlm.interop.chat import ChatTemplate
    from jaxlm.interop.load import load, text_directory
    from jaxlm.training.setup import use_compilation_cache

    use_compilation_cache()
    directory = text_directory(model)
    # What is missing beside the weights is said before they are read.
    template = ChatTemplate(directory) if chat else None
    tokenizer = load_tokenizer(str(directory), field="MODEL")
    speaker = console.Speaker(*load(model), tokenizer)
    manner = console.Manner(max_new_tokens, Choice(**choice), stop)
    write = functools.partial(click.echo, nl=False)
    if template is None:
        console.complete(speaker, prompt or "", manner, write)
    else:
        render = functools.partial(template.render, add_generation_prompt=True)
        speaker, manner = console.ending_at(speaker, manner, template.ending())
        console.talk(speaker, render, manner, _lines(), write)


def _lines() -> Iterator[str]:
    """What is typed or piped in, with a mark on the terminal where a line is due."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
