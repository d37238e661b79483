"""muP's forward scalars multiplied into weights, for formats that know none."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.walk import STACKS

Fold = Callable[[np.ndarray], np.ndarray]


def fold(cfg: ModelConfig) -> tuple[dict[str, Fold], ModelConfig]:
    """What to do to which leaves so that the model computes the same with all three scalars at 1.

    The logits' scalar goes into the final norm; attention's into the queries, or into their norm where they have one;
    the residual's into the output projections, or into the norms behind them.

        {"norm/scale": w -> 0.5 w, "layers/attn/q/kernel": w -> 0.25 w}, and cfg with 1, 1, 1

    Returns:
      Functions by leaf path, each exact up to one rounding in the leaf's dtype, and the new configuration.

    Raises:
      ValueError: attention's scalar cannot pass a clip of the queries.
    """
    folds: dict[str, Fold] = {}
    norm, biased = _norm(cfg), cfg.norm == "layernorm"
    if cfg.logits_multiplier != 1.0:
        folds |= _scaled("norm", cfg.logits_multiplier, norm, biased)
    for stack in STACKS:
        if cfg.attention_multiplier != 1.0:
            folds |= _queries(cfg, f"{stack}/attn", cfg.attention_multiplier)
        if cfg.residual_multiplier != 1.0:
            for branch, output, bias in (("attn", "o", cfg.o_bias), ("mlp", "down", cfg.mlp_bias)):
                if cfg.norm_placement == "pre":
                    folds |= _projection(f"{stack}/{branch}/{output}", cfg.residual_multiplier, bias)
                else:
                    folds |= _scaled(f"{stack}/{branch}/post_norm", cfg.residual_multiplier, norm, biased)
    ones: dict[str, Any] = {"logits_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0}
    return folds, dataclasses.replace(cfg, **ones)


def _queries(cfg: ModelConfig, attention: str, factor: float) -> dict[str, Fold]:
    if cfg.clip_qkv is not None:
        raise ValueError("model.clip_qkv: a model with muP's attention multiplier cannot be exported; set it to null")
    if cfg.qk_norm is not None:
        return _scaled(f"{attention}/q_norm", factor, _norm(cfg), False)
    return _projection(f"{attention}/q", factor, cfg.qkv_bias)


def _norm(cfg: ModelConfig) -> Callable[[float], Fold]:
    """factor -> what it does to a norm's scale; an offset scale stands for 1 + w."""
    offset = 1.0 if cfg.norm_offset else 0.0
    return lambda factor: lambda w: ((w.astype(np.float32) + offset) * factor - offset).astype(w.dtype)


def _times(factor: float) -> Fold:
    return lambda w: (w.astype(np.float32) * factor).astype(w.dtype)


def _scaled(path: str, factor: float, norm: Callable[[float], Fold], biased: bool) -> dict[str, Fold]:
    return {f"{path}/scale": norm(factor)} | ({f"{path}/bias": _times(factor)} if biased else {})


def _projection(path: str, factor: float, biased: bool) -> dict[str, Fold]:
    return {f"{path}/kernel": _times(factor)} | ({f"{path}/bias": _times(factor)} if biased else {})
