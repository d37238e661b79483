"""What a model is: frozen, typed configuration of the architecture, free of files and devices."""

import dataclasses
import math
from typing import Annotated, Literal

import msgspec

FF_MULTIPLE = 64
"""An unset feed-forward width is rounded up to a multiple of this, which keeps it friendly to matrix units."""


Count = Annotated[int, msgspec.Meta(ge=1)]
AtLeast0 = Annotated[float, msgspec.Meta(ge=0)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2104.09864), half-split layout, and its extensions.

    Attributes:
      theta: base of the geometric sequence of wavelengths.
      kind: how the wavelengths are stretched beyond the original context.
      factor: stretch factor of `linear`, `dynamic`, `llama3`, `yarn`; null derives it where the kind allows it.
      partial: share of the head width that is rotated, from the front.
      original_length: context length that the weights were trained on before extension.
      low_factor, high_factor: the two limits of `llama3`, in wavelengths per original context.
      beta_fast, beta_slow: the two limits of `yarn`, in rotations per original context.
      attention_factor: multiplies cos and sin (`yarn`, `longrope`); null uses the formula of the kind.
      mscale, mscale_all_dim: the two numbers of yarn's attention factor.
      truncate: whether yarn's limits are rounded to whole dimensions.
      short_factor, long_factor: per-frequency divisors of `longrope`.
    """

    theta: Above0 = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: Above0 | None = None
    partial: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    original_length: Count | None = None
    low_factor: Above0 = 1.0
    high_factor: Above0 = 4.0
    beta_fast: Above0 = 32.0
    beta_slow: Above0 = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the dense feed-forward layer.

    Attributes:
      experts: number of experts E.
      top_k: experts per token.
      d_ff: width of one expert; null is the model's d_ff.
      renormalize: whether the top-k gates are divided by their sum.
      scoring: what logits become: a softmax over all experts, or a sigmoid each (DeepSeek-V3, 2412.19437).
      n_group, topk_group: experts stand in n_group equal groups, and a token chooses among those of its topk_group best
        ones; a group counts as much as its two best experts together (DeepSeek-V3).
      routed_scaling_factor: what the gates are multiplied by in the end.
      n_shared_experts: experts that every token passes, as one of n_shared_experts * d_ff.
      jitter: in training the router sees its input times a random factor in 1 +- jitter (Switch, 2101.03961).
      balance: how load is kept even: an auxiliary loss, a selection bias moved after each step, or not at all.
      aux_weight: weight of the auxiliary loss, which is 1 at perfect balance.
      z_weight: weight of mean(logsumexp(router logits)^2) (ST-MoE, 2202.08906).
      bias_rate: step of the selection bias (DeepSeek-V3, 2412.19437).
      capacity_factor: room per expert over the mean load of a microbatch, beyond which second choices are dropped
        before first ones and later tokens before earlier ones; null drops nothing.
      dense_layers: indices of layers that keep a dense feed-forward layer.
    """

    experts: Count = 8
    top_k: Count = 2
    d_ff: Count | None = None
    renormalize: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    n_group: Count = 1
    topk_group: Count = 1
    routed_scaling_factor: Above0 = 1.0
    n_shared_experts: Annotated[int, msgspec.Meta(ge=0)] = 0
    jitter: Share = 0.0
    balance: Literal["aux", "bias", "none"] = "aux"
    aux_weight: AtLeast0 = 0.01
    z_weight: AtLeast0 = 0.0
    bias_rate: AtLeast0 = 0.001
    capacity_factor: Above0 | None = None
    dense_layers: tuple[int, ...] = ()

    def check_groups(self) -> None:
        """Raise ValueError, naming the fields, for groups that cannot be chosen from."""
        if self.experts % self.n_group:
            raise ValueError(
                f"model.moe.n_group: {self.n_group} does not divide model.moe.experts {self.experts}; change one"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"model.moe.topk_group: {self.topk_group} of model.moe.n_group {self.n_group} groups; lower it"
            )
        if self.n_group > 1 and self.top_k > self.topk_group * (self.experts // self.n_group):
            raise ValueError(
                f"model.moe.top_k: {self.top_k} is more than the experts of model.moe.topk_group {self.topk_group} "
                "groups; change one"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2106.09685), in PEFT's vocabulary.

    Attributes:
      r: rank R.
      alpha: scale numerator; the adapter adds `alpha / r * x A B` (`alpha / sqrt(r)` with rslora).
      targets: `all-linear` (every projection, no head) or a list of Hugging Face module names.
      dropout: of the adapter's input in training; in projections and experts, not in routers, embedding and head.
      rslora: rank-stabilised scale (2312.03732).
      dora: weight-decomposed adapters (2402.09353).
      init: `default` (A Kaiming-uniform, B zero), or `pissa` (principal components of the weight, 2404.02948; the
        frozen base is then what they leave over, `jaxlm.params.lora.residual`).
      plus_ratio: learning rate of B over that of A (LoRA+, 2402.12354); null: the same.
      rank_pattern, alpha_pattern: per-module overrides, PEFT's patterns: {regular expression: value}.
      modules_to_save: modules trained whole beside the adapters, by Hugging Face's names (`lm_head`, `embed_tokens`).
      base: directory or name of the base model, as adapter files give it; null: the one that training starts from.
    """

    r: Count = 16
    alpha: Above0 = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dropout: Share = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa"] = "default"
    plus_ratio: Above0 | None = None
    rank_pattern: dict[str, Count] | tuple[tuple[str, Count], ...] = ()
    alpha_pattern: dict[str, Above0] | tuple[tuple[str, Above0], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None

    def __post_init__(self) -> None:
        """Lists and dicts become tuples, so that a configuration can be the key of a compiled program."""
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            pairs = pattern.items() if isinstance(pattern, dict) else pattern
            object.__setattr__(self, name, tuple((key, value) for key, value in pairs))
        if self.targets != "all-linear":
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Fields left null are derived; the derived values are the properties named by the dimension letters D, H, G, K, F,
    V, N of `jaxlm.types`. `dataclasses.replace` therefore always gives a consistent configuration.

    Attributes:
      d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, vocab_size: the shape. Null: `n_heads = d_model /
        head_dim`, `n_kv_heads = n_heads`, `head_dim = d_model / n_heads`, `d_ff` = 8/3 (gated) or 4 times d_model,
        rounded up to a multiple of 64.
      norm, norm_eps: kind of normalisation. norm_offset: the weight is stored around 0 and used as 1 + w (Gemma).
      norm_placement: before each branch, after it (OLMo 2), or both (Gemma 2).
      qk_norm: RMS norm of queries and keys, over each head or over the whole projection.
      qkv_bias, o_bias, mlp_bias: biases of the projections.
      activation, gated: the feed-forward layer is `down(act(gate x) * up x)` if gated, else `down(act(up x))`.
      tie_embeddings: whether the head is the embedding. embed_scale: embeddings are multiplied by it.
      embed_std: standard deviation of fresh embeddings; null is 0.02 if tied, else 1.
      positions: rotary, learned absolute (max_length of them), or none.
      max_length: longest sequence the model is meant for.
      rope: rotary settings; local_rope: those of sliding layers where they differ (Gemma 3).
      window: width of sliding attention, the query itself included. layer_types: repeating pattern of `sliding` and
        `full` over the layers; null: all slide if window is set.
      attention_scale: score scale; null is head_dim^-0.5. attention_softcap, logit_softcap: `c * tanh(x / c)`.
      clip_qkv: queries, keys and values are clamped to +- this.
      parallel_residual: attention and feed-forward read the same input and are added together.
      residual: false removes the skip connections (for experiments on depth).
      logits_multiplier, attention_multiplier, residual_multiplier: the forward scalars of muP, 1 without it.
      dropout: on embeddings and on each branch's output, in training.
      moe: mixture of experts. lora: adapters whose trees stand beside the parameters.
      bos_token_id, eos_token_id, pad_token_id: special tokens; several ends are possible.
      family: Hugging Face model_type that the weights came from; export prefers it, nothing else looks at it.
    """

    d_model: int = 256
    n_layers: int = 4
    n_heads: int | None = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    norm_placement: Literal["pre", "post", "both"] = "pre"
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"] = "silu"
    gated: bool = True
    tie_embeddings: bool = True
    embed_scale: float | None = None
    embed_std: float | None = None
    positions: Literal["rope", "learned", "none"] = "rope"
    max_length: int = 2048
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    window: int | None = None
    layer_types: tuple[Literal["sliding", "full"], ...] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clip_qkv: float | None = None
    parallel_residual: bool = False
    residual: bool = True
    logits_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    dropout: float = 0.0
    moe: MoEConfig | None = None
    lora: LoraConfig | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    family: str | None = None

    @property
    def D(self) -> int:
        return self.d_model

    @property
    def N(self) -> int:
        return self.n_layers

    @property
    def H(self) -> int:
        return self.n_heads if self.n_heads is not None else self.d_model // (self.head_dim or self.d_model)

    @property
    def G(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.H

    @property
    def K(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.H

    @property
    def F(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        width = self.d_model * (8 / 3 if self.gated else 4)
        return math.ceil(width / FF_MULTIPLE) * FF_MULTIPLE

    @property
    def V(self) -> int:
        if self.vocab_size is None:
            raise ValueError("model.vocab_size: not set; give a number or a tokenizer")
        return self.vocab_size

    def layer_type(self, layer: int) -> str:
        """`sliding` or `full`, for the layer of this index."""
        if self.layer_types is None:
            return "full" if self.window is None else "sliding"
        return self.layer_types[layer % len(self.layer_types)]

    def validate(self) -> None:
        """Raise ValueError, naming the fields, for a shape that cannot be."""
        for field in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"model.{field}: {value} is not positive; use a whole number from 1 up")
        if self.head_dim is None and self.d_model % self.H:
            raise ValueError(
                f"model.d_model: {self.d_model} is not a multiple of model.n_heads {self.H}; change one or set head_dim"
            )
        if self.n_heads is None and (self.head_dim is None or self.d_model % self.head_dim):
            raise ValueError("model.n_heads: null needs model.head_dim, a divisor of model.d_model; set one of them")
        if self.H % self.G:
            raise ValueError(f"model.n_heads: {self.H} is not a multiple of model.n_kv_heads {self.G}; change one")
        if self.positions == "rope" and self.K % 2:
            raise ValueError(f"model.head_dim: {self.K} is odd, which rotary positions cannot use; choose an even one")
        if self.rope.kind == "default" and self.rope.factor is not None:
            raise ValueError(
                f"model.rope.factor: {self.rope.factor} stretches nothing with model.rope.kind default; set kind to "
                "linear, dynamic, llama3 or yarn"
            )
        if self.layer_types is not None and "sliding" in self.layer_types and self.window is None:
            raise ValueError("model.window: null, but model.layer_types has sliding layers; set the window's width")
        if self.moe is not None and not 1 <= self.moe.top_k <= self.moe.experts:
            raise ValueError(
                f"model.moe.top_k: {self.moe.top_k} is not in 1..{self.moe.experts} (model.moe.experts); change one"
            )
        if self.moe is not None:
            self.moe.check_groups()
