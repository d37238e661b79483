"""A plain Llama-like model in torch, as one would write it: RMSNorm, rotary positions, SwiGLU, fused attention."""

import torch
from torch import nn
from torch.nn import functional

from scripts.bench.shapes import Shape


class Layer(nn.Module):
    """Attention and feed-forward around a residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = shape.heads, shape.kv_heads, shape.width // shape.heads
        inner = self.head * shape.kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(shape.width, 1e-5), nn.RMSNorm(shape.width, 1e-5)
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k, self.v = (nn.Linear(shape.width, inner, bias=False) for _ in range(2))
        self.o = nn.Linear(shape.width, shape.width, bias=False)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        q = rotate(self.q(h).view(b, t, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(b, t, self.kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, t, self.kv_heads, -1).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Token ids and targets -> mean cross-entropy; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, 1e-5)
        head = shape.width // shape.heads
        angles = torch.outer(torch.arange(shape.length), 1e4 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = functional.linear(self.norm(x), self.embed.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding of x [b, h, t, k]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
