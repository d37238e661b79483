"""One layer of the transformer: an attention branch and a feed-forward branch around a residual stream."""

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxlm.nn.attention import Attention, Context
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dropout import dropout
from jaxlm.nn.mlp import Mlp
from jaxlm.types import Array

BRANCH = "branch"
"""Name of the values that the remat policy `block` keeps."""


class Block(nn.Module):
    """x [B, L, D] -> (x [B, L, D], cached keys and values or None, auxiliary losses, statistics, what is collected)."""

    cfg: ModelConfig
    compute: Compute
    layer_type: str = "full"
    sparse: bool = False

    @nn.compact
    def __call__(
        self, x: Array, context: Context, cached: tuple[Array, Array] | None = None
    ) -> tuple[Array, tuple[Array, Array] | None, dict[str, Array]]:
        mixed, cached, kept = Attention(self.cfg, self.compute, self.layer_type, name="attn")(x, context, cached)
        if self.cfg.parallel_residual:
            fed, aux = self._feed(x, context)
            return self._add(x, mixed + fed), cached, aux | kept
        x = self._add(x, mixed)
        fed, aux = self._feed(x, context)
        return self._add(x, fed), cached, aux | kept

    def _feed(self, x: Array, context: Context) -> tuple[Array, dict[str, Array]]:
        if self.sparse:
            from jaxlm.nn.moe import MoE

            return MoE(self.cfg, self.compute, name="mlp")(x, context.segments)
        return Mlp(self.cfg, name="mlp")(x), {}

    def _add(self, x: Array, branch: Array) -> Array:
        cfg = self.cfg
        branch = checkpoint_name(branch, BRANCH)
        if cfg.dropout and self.has_rng("dropout"):
            branch = dropout(branch, cfg.dropout, self.make_rng("dropout"))
        if cfg.residual_multiplier != 1.0:
            branch = branch * cfg.residual_multiplier
        return x + branch if cfg.residual else branch
