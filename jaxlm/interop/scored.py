"""Models with a score head instead of a vocabulary head: transformers' *ForSequenceClassification with one label.

Their directories have `score.weight` [1, D] and no `lm_head.weight`; ours has the leaf `score/kernel` [D, 1] and no
`unembed`, so that the configuration is one of tied embeddings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.interop.names import Table, linear
from jaxlm.nn.config import ModelConfig

ENDING = "ForSequenceClassification"
LANGUAGE_ENDINGS = ("ForCausalLM", "LMHeadModel")


def architecture(language: str) -> str:
    """LlamaForCausalLM -> LlamaForSequenceClassification."""
    for ending in LANGUAGE_ENDINGS:
        language = language.removesuffix(ending)
    return language.removesuffix(ENDING) + ENDING


def is_scored(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with a score head."""
    return any(str(name).endswith(ENDING) for name in raw.get("architectures") or ())


def headless(cfg: ModelConfig) -> ModelConfig:
    """The configuration of the model without a vocabulary head of its own."""
    return dataclasses.replace(cfg, tie_embeddings=True)


def leaves(known: Mapping[str, jax.ShapeDtypeStruct], cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a language model -> those with a score head instead."""
    kept = {path: leaf for path, leaf in known.items() if not path.startswith("unembed/")}
    return kept | {"score/kernel": jax.ShapeDtypeStruct((cfg.D, 1), jnp.float32)}


def table(names: Table) -> Table:
    """A family's name table, with the score head instead of the language model's."""
    top = [row for row in names.top if not row.ours[0].startswith("unembed/")]
    return names._replace(top=(*top, *linear("score", "score")))


def written(config: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """config.json of a language model -> that with a score head.

    transformers reads the score at the last token that is no padding, by its id, so there must be one, and it must not
    be the end of a text.
    """
    ends = cfg.eos_token_id if isinstance(cfg.eos_token_id, tuple) else (cfg.eos_token_id,)
    pad = cfg.pad_token_id
    if pad is None or pad in ends:
        pad = next(i for i in range(cfg.V) if i not in ends)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**config, "architectures": [architecture(config["architectures"][0])], "pad_token_id": pad, **labels}
