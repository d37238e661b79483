"""Greedy decoding of random prompts by a random model."""

from typing import Any

import numpy as np

from scripts.bench.cases.train import shape_of
from scripts.bench.measure import jax_wait, repeat, torch_wait
from scripts.bench.shapes import hugging_face_model, jaxlm_config

Options = dict[str, Any]


def prompts(options: Options) -> np.ndarray:
    """Token ids [rows, prompt]."""
    shape = shape_of(options)
    return np.random.default_rng(0).integers(1, shape.vocabulary, (shape.rows, shape.prompt))


def jaxlm(options: Options) -> dict[str, Any]:
    """jaxlm.generate; the weights are kept as they come, and prepared once, as by whoever generates more than once."""
    import jax

    from jaxlm import generate, init
    from jaxlm.decode.loop import prepare

    shape, ids = shape_of(options), prompts(options).tolist()
    cfg = jaxlm_config(shape)
    variables = jax.tree.map(lambda x: x.astype(options["dtype"]), init(cfg, jax.random.key(0)))
    variables = prepare(cfg, variables)
    found = repeat(lambda: generate(cfg, variables, ids, max_new_tokens=shape.new), jax_wait, options["seconds"])
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    return rates(found, shape) | {"bandwidth": size * shape.new / found["wall"]}


def transformers(options: Options) -> dict[str, Any]:
    """transformers' generate."""
    import torch

    torch.set_num_threads(options["threads"])
    shape = shape_of(options)
    model = hugging_face_model(shape, options["dtype"]).eval()
    ids = torch.tensor(prompts(options), device=model.device)
    settings = {"max_new_tokens": shape.new, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def call():
        with torch.no_grad():
            return model.generate(ids, **settings)

    return rates(repeat(call, torch_wait, options["seconds"]), shape)


def rates(found: dict[str, Any], shape) -> dict[str, Any]:
    """With new tokens per second, over all rows."""
    return found | {"tokens_per_second": shape.rows * shape.new / found["wall"]}


SIDES = {"jaxlm": jaxlm, "transformers": transformers}
