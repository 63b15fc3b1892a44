"""A block: a stack of layers that owns parameters and may be called many times.

Every layer is two sub-layers, attention and feed-forward, of one form (arXiv 2604.15259, code):

    u = branch(recall(pre_norm(x), e));  x = post_norm(residual(x, peri_norm(u)))

Shape legend: B batch, L positions, D model, F feed-forward hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spiralformer.attention import Attention, KeyValueCache
from spiralformer.norm import make_norm
from spiralformer.recall import make_recall
from spiralformer.rope import Rotary

NORM_PLACES: dict[str, tuple[bool, bool, bool]] = {
    # kind: whether there is a norm before the branch, on its output, after the residual sum
    "pre": (True, False, False),
    "peri": (True, True, False),
    "post": (False, False, True),
    "sandwich": (True, False, True),
}


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
    residual: str
    recall: str | None
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


class AddResidual(nn.Module):
    """x + scale * u.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        return x_BLD + u_BLD if self.scale == 1.0 else torch.add(x_BLD, u_BLD, alpha=self.scale)


class GateResidual(nn.Module):
    """sigmoid(W_x x) x + sigmoid(W_u u) scale u.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.keep = nn.Linear(d_model, d_model, bias=False)
        self.take = nn.Linear(d_model, d_model, bias=False)
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        return self.keep(x_BLD).sigmoid() * x_BLD + self.take(u_BLD).sigmoid() * (self.scale * u_BLD)


class GruResidual(nn.Module):
    """A GRU cell: the update is its input, the state its hidden state.

    Shape:
        x (B, L, D), u (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int, scale: float) -> None:
        super().__init__()
        self.from_update = nn.Linear(d_model, 3 * d_model)
        self.from_state = nn.Linear(d_model, 3 * d_model)
        self.scale = scale

    def forward(self, x_BLD: Tensor, u_BLD: Tensor) -> Tensor:
        update_r, update_z, update_n = self.from_update(self.scale * u_BLD).chunk(3, dim=-1)
        state_r, state_z, state_n = self.from_state(x_BLD).chunk(3, dim=-1)
        reset, keep = (update_r + state_r).sigmoid(), (update_z + state_z).sigmoid()
        return torch.lerp((update_n + reset * state_n).tanh(), x_BLD, keep)


def _make_residual(c: BlockConfig) -> nn.Module:
    if c.residual == "add":
        return AddResidual(c.branch_scale)
    return {"gate": GateResidual, "gru": GruResidual}[c.residual](c.d_model, c.branch_scale)


class SubLayer(nn.Module):
    """A branch between its norms, and how its output meets the state.

    Shape:
        x (B, L, D) -> (B, L, D).
    """

    def __init__(self, branch: nn.Module, c: BlockConfig) -> None:
        super().__init__()
        norms = [c.norm if has else "none" for has in NORM_PLACES[c.norm_place]]
        self.pre_norm, self.peri_norm, self.post_norm = (make_norm(kind, c.d_model, c.norm_eps) for kind in norms)
        self.branch = branch
        self.dropout = nn.Dropout(c.dropout)
        self.residual = _make_residual(c)

    def forward(self, x_BLD: Tensor, recalled: tuple[nn.Module, Tensor] | None, *context: object) -> Tensor:
        u_BLD = self.pre_norm(x_BLD)
        if recalled is not None:
            recall, e_BLD = recalled
            u_BLD = recall(u_BLD, e_BLD)
        u_BLD = self.peri_norm(self.branch(u_BLD, *context))
        return self.post_norm(self.residual(x_BLD, self.dropout(u_BLD)))


class Layer(nn.Module):
    """Attention, then feed-forward; internal recall's one map serves both (arXiv 2604.15259)."""

    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.attn = SubLayer(_attention(c), c)
        self.ffn = SubLayer(_feed_forward(c), c)
        self.recall = make_recall(c.recall, c.d_model) if c.recall is not None else None

    def forward(
        self, x_BLD: Tensor, e_BLD: Tensor | None, cos_LR: Tensor, sin_LR: Tensor, cache: KeyValueCache | None
    ) -> Tensor:
        recalled = (self.recall, e_BLD) if self.recall is not None and e_BLD is not None else None
        return self.ffn(self.attn(x_BLD, recalled, cos_LR, sin_LR, cache), recalled)


class ParallelLayer(nn.Module):
    """x + attn(norm(x)) + ffn(norm(x)), as in GPT-NeoX."""

    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.attn, self.ffn = SubLayer(_attention(c), c), SubLayer(_feed_forward(c), c)

    def forward(
        self, x_BLD: Tensor, e_BLD: Tensor | None, cos_LR: Tensor, sin_LR: Tensor, cache: KeyValueCache | None
    ) -> Tensor:
        attn, ffn = self.attn, self.ffn
        attn_BLD = attn.dropout(attn.branch(attn.pre_norm(x_BLD), cos_LR, sin_LR, cache))
        ffn_BLD = ffn.dropout(ffn.branch(ffn.pre_norm(x_BLD)))
        return attn.residual(x_BLD, attn_BLD + ffn_BLD)


def _attention(c: BlockConfig) -> Attention:
    return Attention(
        c.d_model, c.heads, c.kv_heads, c.head_dim, causal=c.causal, qk_norm=c.qk_norm, bias=c.bias, eps=c.norm_eps
    )


def _feed_forward(c: BlockConfig) -> nn.Module:
    if c.ffn == "swiglu":
        return GatedFeedForward(c.d_model, c.ffn_dim, c.bias)
    return FeedForward(c.d_model, c.ffn_dim, c.ffn, c.bias)


class Block(nn.Module):
    """A stack of layers over one level's positions.

    Shape:
        (B, L, D) -> (B, L, D); L may be 0. Position j is told to the rotary embedding as first + j * stride.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rotary_dim, config.rotary_base, config.max_len)
        layer = ParallelLayer if config.parallel_residual else Layer
        self.layers = nn.ModuleList([layer(config) for _ in range(config.layers)])
        self.recompute = False
        """Whether training keeps only the block's inputs, and runs it again in the backward pass."""

    def forward(
        self,
        x_BLD: Tensor,
        e_BLD: Tensor | None = None,
        stride: int = 1,
        first: int = 0,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        if x_BLD.shape[1] == 0:
            return x_BLD
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._run, x_BLD, e_BLD, stride, first, caches, use_reentrant=False)
        return self._run(x_BLD, e_BLD, stride, first, caches)

    def _run(
        self,
        x_BLD: Tensor,
        e_BLD: Tensor | None,
        stride: int,
        first: int,
        caches: Sequence[KeyValueCache] | None,
    ) -> Tensor:
        length = x_BLD.shape[1]
        seen = caches[0].length if caches is not None else 0
        cos_LR, sin_LR = self.rotary(length, stride, first + seen * stride)
        for i, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, e_BLD, cos_LR, sin_LR, caches[i] if caches is not None else None)
        return x_BLD
