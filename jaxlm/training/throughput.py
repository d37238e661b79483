"""How fast a run is: tokens per second, FLOPs of a model by formula, peak FLOPs of known devices, memory."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.nn.config import ModelConfig

PEAK_BFLOAT16: Mapping[str, float] = {
    # Dense (no sparsity) bfloat16 FLOP/s of one JAX device, from the makers' data sheets. Patterns cover the whole name
    # that JAX gives the device, so that a slice of one ("NVIDIA H200 MIG 1g.18gb") is unknown rather than wrong.
    r"NVIDIA GB200": 2.5e15,
    r"NVIDIA B200": 2.25e15,
    r"NVIDIA H200|NVIDIA H100 80GB HBM3|NVIDIA GH200 \d+GB": 989e12,
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": 835e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"(NVIDIA )?A100-SXM4-\d+GB|(NVIDIA )?A100-PCIE-\d+GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"TPU v6 lite|TPU v6e": 918e12,
    r"TPU v5|TPU v5p": 459e12,
    r"TPU v5 lite|TPU v5e": 197e12,
    r"TPU v4": 275e12,
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s that one device can reach at most, or None where it is not known; it is never guessed.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
      dtype: compute dtype; only bfloat16 is tabulated.
    """
    if dtype != "bfloat16":
        return None
    found = (peak for pattern, peak in PEAK_BFLOAT16.items() if re.fullmatch(pattern, device_kind))
    return next(found, None)


def matmul_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Weights that one token is multiplied with, by projection, over all layers.

    Of a mixture of experts only the `top_k` chosen and the shared ones count (and the router). The embedding is a
    lookup and does not count; the head does, tied or not.
    """
    D, width = cfg.D, cfg.H * cfg.K
    counts = {"q": D * width, "k": D * cfg.G * cfg.K, "v": D * cfg.G * cfg.K, "o": width * D}
    counts = {name: cfg.N * count for name, count in counts.items()}
    dense_layers = cfg.N if cfg.moe is None else len(set(cfg.moe.dense_layers) & set(range(cfg.N)))
    in_mlp = dense_layers * D * cfg.F
    if cfg.moe is not None:
        expert_layers = cfg.N - dense_layers
        in_mlp += expert_layers * (cfg.moe.top_k + cfg.moe.n_shared_experts) * D * (cfg.moe.d_ff or cfg.F)
        counts["router"] = expert_layers * D * cfg.moe.experts
    counts |= dict.fromkeys(("gate", "up", "down") if cfg.gated else ("up", "down"), in_mlp)
    return counts | {"unembed": D * cfg.V}


def idle_parameters(cfg: ModelConfig) -> int:
    """Weights of the experts that a token does not pass, over all layers; 0 without experts."""
    if cfg.moe is None:
        return 0
    layers = len(set(range(cfg.N)) - set(cfg.moe.dense_layers))
    expert = (3 if cfg.gated else 2) * cfg.D * (cfg.moe.d_ff or cfg.F)
    return layers * (cfg.moe.experts - cfg.moe.top_k) * expert


def visible_keys(cfg: ModelConfig, length: int) -> float:
    """Keys that a query attends to, on average over the positions of a sequence and summed over layers.

    Causal: `(L + 1) / 2` in a full layer, that is, half of the square; in a sliding layer at most the window.
    """
    total = 0.0
    for layer in range(cfg.N):
        window = length
        if cfg.layer_type(layer) == "sliding" and cfg.window is not None:
            window = min(cfg.window, length)
        total += (window * (window + 1) / 2 + (length - window) * window) / length
    return total


def flops_per_token(cfg: ModelConfig, length: int, training: bool = True) -> float:
    """Floating point operations that the model needs for one token, by formula.

    Forward: `2 N + 4 H K visible`, with N the active matmul weights and `visible` the mean number of keys a query sees
    (the causal factor: about half the length). Training: three times that, so `6 N + 12 H K visible`. What is computed
    again under rematerialisation is not counted (model FLOPs, not hardware FLOPs). With adapters the frozen weights
    need no gradient of their own (4 N), the adapters do.

    Args:
      cfg: the model's shape; `vocab_size` must be set.
      length: tokens in a sequence.
      training: forward and backward, or forward alone.

    Source: Kaplan et al., 2001.08361, section 2.1; Chowdhery et al., 2204.02311, appendix B.
    """
    weights = matmul_parameters(cfg)
    attention = 4.0 * cfg.H * cfg.K * visible_keys(cfg, length)
    if cfg.lora is None:
        forward = 2.0 * sum(weights.values()) + attention
        return 3 * forward if training else forward
    adapters = _adapter_weights(cfg)
    if not training:
        return 2.0 * (sum(weights.values()) + adapters) + attention
    return 4.0 * sum(weights.values()) + 6.0 * adapters + 3 * attention


def _adapter_weights(cfg: ModelConfig) -> float:
    """Weights of adapters that a token passes: rank times (inputs + outputs), of experts the share that is chosen."""
    from jaxlm.nn.targets import resolve  # brings Flax, which reports do without

    D, width, kv, moe = cfg.D, cfg.H * cfg.K, cfg.G * cfg.K, cfg.moe
    experts, expert = (1, cfg.F) if moe is None else (moe.experts, moe.d_ff or cfg.F)
    sides = {"q": D + width, "k": D + kv, "v": D + kv, "o": width + D, "qkv": D + width + 2 * kv}
    sides |= {"router": D + experts, "embed": D, "unembed": D + cfg.V}
    total = 0.0
    for path, slot in resolve(cfg).items():
        name, F = path.rpartition("/")[2], cfg.F if path.startswith("dense_layers") else expert
        if moe is not None and "/shared/" in path:
            F *= moe.n_shared_experts
        through = sides | {"gate": D + F, "up": D + F, "down": F + D, "gate_up": D + 2 * F}
        chosen = moe.top_k / moe.experts if moe is not None and slot.ranks.ndim == 2 else 1.0
        total += chosen * float(slot.ranks.sum()) * through[name]
    return total


class Meter:
    """Tokens per second over the last seconds, with compilation, evaluations and pauses left out.

    The first tick ends compilation: it starts the clock. Example:

        meter = Meter(total=1000)
        for step ...: values = meter.tick(step, tokens_so_far)
        with meter.paused(): evaluate()
    """

    def __init__(
        self,
        total: int,
        flops_per_token: float | None = None,
        peak: float | None = None,
        window: float = 20.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start a meter.

        Args:
          total: the run's last step.
          flops_per_token: of the model; None where a step is not one forward and backward pass over its tokens.
          peak: FLOP/s of all devices together, or None.
          window: seconds that the rate looks back.
          now: a clock in seconds.
        """
        self._total, self._flops, self._peak, self._window, self._now = total, flops_per_token, peak, window, now
        self._born = now()
        self._first: tuple[int, float] | None = None
        self._idle = 0.0
        self._ticks: deque[tuple[float, float]] = deque()

    def tick(self, step: int, tokens: float) -> dict[str, float]:
        """Note that a step is done.

        Args:
          step: its number.
          tokens: tokens since the start of the run, this step included.

        Returns:
          `seconds` since this meter was made, and once they are known `tokens_per_second`, `peak_fraction` (0 to 1,
          only with a peak) and `eta` (seconds that the remaining steps take, pauses like those so far included).
        """
        now = self._now()
        busy = now - self._idle
        values = {"seconds": now - self._born}
        self._ticks.append((busy, tokens))
        while len(self._ticks) > 2 and busy - self._ticks[1][0] >= self._window:
            self._ticks.popleft()
        then, before = self._ticks[0]
        if busy > then:
            rate = (tokens - before) / (busy - then)
            values["tokens_per_second"] = rate
            if self._flops is not None and self._peak is not None:
                values["peak_fraction"] = rate * self._flops / self._peak
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            values["eta"] = (now - self._first[1]) / (step - self._first[0]) * max(self._total - step, 0)
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not the training step's: evaluations, checkpoints, samples."""
        start = self._now()
        try:
            yield
        finally:
            self._idle += self._now() - start


def memory_bytes(device: Any = None) -> int | None:
    """Memory of a run in bytes: the peak of `device` where its runtime counts it, else what this process holds now."""
    statistics = device.memory_stats() if device is not None else None
    if statistics and "bytes_in_use" in statistics:
        return int(statistics.get("peak_bytes_in_use", statistics["bytes_in_use"]))
    return _resident_bytes()


def _resident_bytes() -> int | None:
    import resource

    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
