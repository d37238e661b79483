"""Files of a run directory besides its records: the resolved configuration, samples, summary, final export, report."""

import dataclasses
import datetime
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxlm import tree
from jaxlm.data.baselines import baselines
from jaxlm.data.supply import RUNNING, SUPERVISED
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode.streaming import Text
from jaxlm.decode.together import sample_on
from jaxlm.dist import multihost, place
from jaxlm.interop import peft_config
from jaxlm.interop.chat import template_text
from jaxlm.interop.load import model_directory
from jaxlm.interop.save import save, tokenizer_config
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.qtensor import outline
from jaxlm.params import lora
from jaxlm.training import plan
from jaxlm.training.report import write_report
from jaxlm.training.samples import Sample
from jaxlm.training.setup import Setup
from jaxlm.training.summary import Summary, environment, write_summary, write_whole
from jaxlm.types import Variables

if TYPE_CHECKING:
    from jaxlm.training.loop import Run

SAMPLE_TOKENS = 48
TOKENIZER_CONFIG = "tokenizer_config.json"


def write_files(setup: Setup, directory: Path) -> None:
    """The resolved configuration, what every leaf is given, and the tokenizer, at the start of every sitting."""
    if multihost.is_main():
        write_whole(directory / "config.yaml", setup.config.yaml())
        known = plan.of_program(setup.config, setup.program)
        write_whole(directory / "plan.txt", plan.text(known) + "\n")
        write_tokenizer(setup, directory)


def write_tokenizer(setup: Setup, directory: Path) -> None:
    """The tokenizer, and what tells other programs how to use it: its configuration and the chat template."""
    config = setup.config
    write_whole(directory / "tokenizer.json", setup.data.tokenizer.json)
    place = Path(config.data.tokenizer or config.model.path or directory)
    folder = place if place.is_dir() else place.parent
    given = next((f for f in (folder, folder / "hf") if (f / TOKENIZER_CONFIG).is_file()), None)
    if given is not None and given != directory:
        write_whole(directory / TOKENIZER_CONFIG, (given / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    template = template_text(config.data.tokenizer, config.model.path, template=config.data.template)
    if template is not None:
        write_whole(directory / "chat_template.jinja", template)
        if given is None:
            special = tokenizer_config(directory / "tokenizer.json", setup.program.cfg)
            write_whole(directory / TOKENIZER_CONFIG, json.dumps(special, indent=2))


def take_samples(setup: Setup, variables: Variables) -> list[Sample]:
    """What the model makes of the configured prompts, greedily; all processes call it together.

    Prompts are cut at the front where the model has learned positions for too few tokens. Samples are for the reader:
    what goes wrong with them is a warning and never ends a run.
    """
    cfg, tokenizer = setup.program.cfg, setup.data.tokenizer
    room = cfg.max_length - SAMPLE_TOKENS if cfg.positions == "learned" else cfg.max_length
    encoded = [(prompt, tokenizer.encode(prompt)[-max(room, 0) :]) for prompt in setup.config.train.prompts]
    encoded = [(prompt, ids) for prompt, ids in encoded if ids]
    if not encoded or room < 1:
        return []
    try:
        ids = [ids for _, ids in encoded]
        taken = sample_on(setup.program.mesh, cfg, variables, ids, SAMPLE_TOKENS)
    except Exception as error:
        warnings.warn(f"train.prompts: no samples ({type(error).__name__}: {error})", stacklevel=2)
        return []
    rows = zip(encoded, taken.ids, taken.lengths, strict=True)
    return [Sample(prompt, _continuation(tokenizer, ids, row[:n].tolist())) for (prompt, ids), row, n in rows]


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    text = Text(tokenizer, prompt)
    return "".join([*map(text.push, new), text.close()])


def finish(run: "Run", step: int) -> None:
    """Export the model and write the summary and the report.

    Args:
      run: after its last step, state saved.
      step: steps taken.
    """
    setup, directory = run.setup, run.directory
    run.progress.status("exporting")
    variables = run.variables
    path = setup.config.model.path
    # Adapters of a directory are written alone; those of a base that is nowhere else, merged into it.
    alone = "lora" in variables and path is not None and peft_config.find(path) is None
    variables = place.gather({"lora": variables["lora"]} if alone else variables)
    if not multihost.is_main():
        return
    cfg = _with_base(setup) if alone else setup.program.cfg
    save(directory / "hf", cfg, variables, tokenizer=directory, own_form=True)
    write_summary(directory, summary(run, "done" if step == run.train.steps else "stopped early"))
    page = write_report(directory)
    run.progress.message(f"done: {page}")


def _with_base(setup: Setup) -> ModelConfig:
    """The model's configuration, in which the adapters name the directory that their base is in."""
    cfg, path = setup.program.cfg, setup.config.model.path
    if cfg.lora is None or path is None or cfg.lora.base is not None:
        return cfg
    return dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, base=str(model_directory(path))))


def summary(run: "Run", status: str) -> Summary:
    """The facts of a run that its configuration and metrics do not hold."""
    setup = run.setup
    trained = lora.trained(setup.program.cfg, run.state.params)
    base = tree.count(outline(run.frozen.get("params", {})))
    return Summary(
        name=run.directory.name,
        objective=setup.config.objective.kind,
        status=status,
        finished=datetime.datetime.now().isoformat(timespec="seconds"),
        steps=run.train.steps,
        parameters=trained + base,
        trainable=trained,
        seconds=run.elapsed,
        flops_per_token=run.recorder.flops_per_token,
        peak_flops=run.recorder.peak,
        baselines=_baselines(setup),
        environment=environment(jax.devices()),
    )


def _baselines(setup: Setup) -> dict[str, dict[str, float]]:
    """What a model of text has to beat; nothing for objectives whose rows are not one text each."""
    if setup.config.objective.kind not in RUNNING + SUPERVISED:
        return {}
    scored = baselines(setup.data.train, setup.data.validation, setup.data.tokenizer)
    return {
        "unigram": {"loss": scored.unigram, "bits_per_byte": scored.unigram_bits_per_byte},
        "bigram": {"loss": scored.bigram, "bits_per_byte": scored.bigram_bits_per_byte},
        "zlib": {"bits_per_byte": scored.zlib_bits_per_byte},
    }
