"""Multi-head self-attention with grouped key-value heads and rotary positions.

Shape legend: B batch, L positions, D model, N query heads, K key-value heads, H head dim, R rotated dims.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.rope import rotate


class Attention(nn.Module):
    """Self-attention over one level's positions.

    Args:
        d_model: width of the stream.
        heads: query heads.
        kv_heads: key-value heads; each serves heads / kv_heads query heads.
        head_dim: width of a head.
        causal: position i sees only 0 .. i.
        qk_norm: RMS-normalise queries and keys per head before rotation.
        bias: biases on both projections.
        eps: of the qk norm.

    Shape:
        x (B, L, D), tables (L, R) -> (B, L, D).
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        qk_norm: bool,
        bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.causal = heads, kv_heads, head_dim, causal
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        q_BNLH, k_BKLH, v_BKLH = self.project(x_BLD)
        q_BNLH, k_BKLH = rotate(q_BNLH, cos_LR, sin_LR), rotate(k_BKLH, cos_LR, sin_LR)
        return self.attend(q_BNLH, k_BKLH, v_BKLH, causal=self.causal)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normalised, not yet rotated."""
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q_BNLH, k_BKLH, v_BKLH = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return self.q_norm(q_BNLH), self.k_norm(k_BKLH), v_BKLH

    def attend(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, causal: bool) -> Tensor:
        """Attention and output projection; keys may be longer than queries when not ``causal``."""
        if self.kv_heads != self.heads:
            k_BKLH = k_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v_BKLH = v_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
        mixed_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BKLH, v_BKLH, is_causal=causal)
        return self.out(mixed_BNLH.transpose(1, 2).flatten(2))
