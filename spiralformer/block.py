"""A block: a stack of layers that owns parameters and may be called many times.

Shape legend: B batch, L positions, D model, F feed-forward hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.attention import Attention
from spiralformer.norm import make_norm
from spiralformer.rope import Rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Resolved settings of one block; every number final."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: str
    ffn_dim: int
    norm: str
    norm_place: str
    norm_eps: float
    parallel_residual: bool
    rotary_dim: int
    rotary_base: float
    qk_norm: bool
    bias: bool
    dropout: float
    causal: bool
    branch_scale: float
    """Factor on every residual branch."""
    max_len: int
    """Positions tabulated for the rotary embedding."""


class FeedForward(nn.Module):
    """Two linear maps around GELU or squared ReLU.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.out = nn.Linear(hidden, d_model, bias=bias)
        self.squared = kind == "relu2"

    def forward(self, x_BLD: Tensor) -> Tensor:
        hidden_BLF = self.up(x_BLD)
        return self.out(F.relu(hidden_BLF).square() if self.squared else F.gelu(hidden_BLF))


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): silu(gate) * up, then out.

    Shape:
        (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLD).chunk(2, dim=-1)
        return self.out(F.silu(gate_BLF) * up_BLF)


class _Layer(nn.Module):
    """Parts that every kind of layer has."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        c = config
        self.attn_norm = make_norm(c.norm, c.d_model, c.norm_eps)
        self.attn = Attention(
            c.d_model, c.heads, c.kv_heads, c.head_dim, causal=c.causal, qk_norm=c.qk_norm, bias=c.bias, eps=c.norm_eps
        )
        self.ffn_norm = make_norm(c.norm, c.d_model, c.norm_eps)
        self.ffn = (
            GatedFeedForward(c.d_model, c.ffn_dim, c.bias)
            if c.ffn == "swiglu"
            else FeedForward(c.d_model, c.ffn_dim, c.ffn, c.bias)
        )
        self.dropout = nn.Dropout(c.dropout)
        self.branch_scale = c.branch_scale

    def branch(self, update_BLD: Tensor) -> Tensor:
        return self.dropout(update_BLD) * self.branch_scale if self.branch_scale != 1.0 else self.dropout(update_BLD)


class PreNormLayer(_Layer):
    """x + attn(norm(x)), then x + ffn(norm(x))."""

    def forward(self, x_BLD: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        x_BLD = x_BLD + self.branch(self.attn(self.attn_norm(x_BLD), cos_LR, sin_LR))
        return x_BLD + self.branch(self.ffn(self.ffn_norm(x_BLD)))


class PostNormLayer(_Layer):
    """norm(x + attn(x)), then norm(x + ffn(x)): outer normalization (arXiv 2604.15259, section 5)."""

    def forward(self, x_BLD: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        x_BLD = self.attn_norm(x_BLD + self.branch(self.attn(x_BLD, cos_LR, sin_LR)))
        return self.ffn_norm(x_BLD + self.branch(self.ffn(x_BLD)))


class ParallelLayer(_Layer):
    """x + attn(norm(x)) + ffn(norm(x)), as in GPT-NeoX."""

    def forward(self, x_BLD: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        attn_BLD = self.attn(self.attn_norm(x_BLD), cos_LR, sin_LR)
        return x_BLD + self.branch(attn_BLD) + self.branch(self.ffn(self.ffn_norm(x_BLD)))


def _layer_class(config: BlockConfig) -> type[_Layer]:
    if config.parallel_residual:
        return ParallelLayer
    return {"pre": PreNormLayer, "post": PostNormLayer}[config.norm_place]


class Block(nn.Module):
    """A stack of layers over one level's positions.

    Shape:
        (B, L, D) -> (B, L, D); L may be 0.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rotary_dim, config.rotary_base, config.max_len)
        layer = _layer_class(config)
        self.layers = nn.ModuleList([layer(config) for _ in range(config.layers)])

    def forward(self, x_BLD: Tensor) -> Tensor:
        if x_BLD.shape[1] == 0:
            return x_BLD
        cos_LR, sin_LR = self.rotary(x_BLD.shape[1])
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_LR, sin_LR)
        return x_BLD
