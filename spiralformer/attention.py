"""Multi-head self-attention with grouped key-value heads and rotary positions.

Shape legend: B batch, L positions, D model, N query heads, K key-value heads, H head dim, R rotated dims.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.rope import rotate


class KeyValueCache:
    """Keys and values of one layer at one call site, filled position by position.

    Shape:
        keys and values (B, K, capacity, H).
    """

    def __init__(
        self, batch_size: int, kv_heads: int, capacity: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k_BKLH: Tensor, v_BKLH: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions at the end; returns all keys and values so far, in the given dtype."""
        end = self.length + k_BKLH.shape[2]
        self.keys[:, :, self.length : end] = k_BKLH
        self.values[:, :, self.length : end] = v_BKLH
        self.length = end
        return self.keys[:, :, :end].to(k_BKLH.dtype), self.values[:, :, :end].to(v_BKLH.dtype)

    @property
    def num_bytes(self) -> int:
        """Memory held, filled or not."""
        return 2 * self.keys.numel() * self.keys.element_size()


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

    def forward(self, x_BLD: Tensor, cos_LR: Tensor, sin_LR: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q_BNLH, k_BKLH, v_BKLH = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q_BNLH = rotate(self.q_norm(q_BNLH), cos_LR, sin_LR)
        k_BKLH = rotate(self.k_norm(k_BKLH), cos_LR, sin_LR)
        if cache is not None:
            k_BKLH, v_BKLH = cache.append(k_BKLH, v_BKLH)
        if self.kv_heads != self.heads:
            k_BKLH = k_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v_BKLH = v_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
        # One query at the end of its keys sees all of them; several begin where the keys begin.
        causal = self.causal and length > 1
        mixed_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BKLH, v_BKLH, is_causal=causal)
        return self.out(mixed_BNLH.transpose(1, 2).flatten(2))
