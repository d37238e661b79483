"""The mixture-of-experts branch of a layer: router, experts, and the statistics of their load."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxlm.nn import routing
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.experts import Form, Projection, mixture
from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.linear import ADAPTER, dora_factor
from jaxlm.nn.mlp import Mlp, residual_init
from jaxlm.nn.norms import make_norm
from jaxlm.nn.qtensor import kernel_param
from jaxlm.types import Array


class Experts(nn.Module):
    """One projection of all experts, [E, in, out], with its adapter where the collection `lora` has one."""

    shape: tuple[int, int, int]
    init_scale: float = 1.0

    @nn.compact
    def __call__(self) -> Projection:
        init = nn.initializers.normal(self.init_scale / math.sqrt(self.shape[1]))
        kernel: Any = kernel_param(self, init, self.shape)
        adapter: dict[str, Array] = {
            name: self.get_variable("lora", name) for name in ADAPTER if self.has_variable("lora", name)
        }
        found: Projection = {"kernel": kernel} | {name: adapter[name] for name in "ab" if name in adapter}
        return found | ({"factor": dora_factor(kernel, adapter)} if "magnitude" in adapter else {})


class MoE(nn.Module):
    """`x [B, L, D] -> sum over chosen experts of gate_e(x) * expert_e(x)` (+ shared experts), and `routing.statistics`.

    Padding (segment 0) chooses no expert: its sum is 0, and it counts nowhere.
    """

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, segments: Array | None = None) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        moe = cfg.moe
        assert moe is not None
        if cfg.norm_placement != "post":
            x = make_norm(cfg, "norm")(x)
        logits, bias_E = routing.Router(moe, name="router")(x)
        logits_TxE = logits.reshape(-1, moe.experts)
        weights_T = None if segments is None else (segments.reshape(-1) != 0).astype(jnp.float32)
        wanted_Txk, gates_Txk = routing.choose(moe, logits_TxE, bias_E)
        if weights_T is not None:
            wanted_Txk = jnp.where(weights_T[:, None] > 0, wanted_Txk, moe.experts)
        kept_Txk = routing.drop(moe, wanted_Txk)
        by_place = (*x.shape[:-1], moe.top_k)
        key = self.make_rng("dropout") if cfg.lora is not None and self.has_rng("dropout") else None
        y = mixture(
            self._form(math.prod(by_place)),
            x,
            gates_Txk.reshape(by_place),
            kept_Txk.reshape(by_place),
            self._projections(),
            key,
        )
        if moe.n_shared_experts:
            inside = dataclasses.replace(cfg, d_ff=moe.n_shared_experts * self._width())
            y = y + Mlp(inside, bare=True, name="shared")(x)
        aux = routing.statistics(moe, logits_TxE, wanted_Txk, kept_Txk, weights_T)
        return (y if cfg.norm_placement == "pre" else make_norm(cfg, "post_norm")(y)), aux

    def _width(self) -> int:
        moe = self.cfg.moe
        assert moe is not None
        return moe.d_ff if moe.d_ff is not None else self.cfg.F

    def _form(self, pairs: int) -> Form:
        cfg, moe = self.cfg, self.cfg.moe
        assert moe is not None
        room = None if moe.capacity_factor is None else math.ceil(moe.capacity_factor * pairs / moe.experts)
        dropped = 0.0 if cfg.lora is None else cfg.lora.dropout
        return Form(moe.experts, cfg.activation, dropped, self.compute.grouped or grouped_matmul.choose(), room)

    def _projections(self) -> dict[str, Projection]:
        cfg, moe, width = self.cfg, self.cfg.moe, self._width()
        assert moe is not None
        found = {"up": Experts((moe.experts, cfg.D, width), name="up")()}
        if cfg.gated:
            found["gate"] = Experts((moe.experts, cfg.D, width), name="gate")()
        return found | {"down": Experts((moe.experts, width, cfg.D), residual_init(cfg), name="down")()}
