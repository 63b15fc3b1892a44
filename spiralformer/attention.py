"""Multi-head self-attention with grouped key-value heads and rotary positions.

Shape legend: B batch, L positions, D model, N query heads, K key-value heads, H head dim, R rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiralformer.decoding import Rows, index_of, pick
from spiralformer.rope import rotate
from spiralformer.starts import Scales, Starts

_ROOM = 64  # positions that a cache without a limit begins with; it doubles


class KeyValueCache:
    """Keys and values of one layer at one call site.

    Args:
        shape: (B, K, positions, H).
        like: a tensor of its device.
        dtype: in which they are kept.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor, dtype: torch.dtype) -> None:
        self.keys = like.new_zeros(shape, dtype=dtype)
        self.values = like.new_zeros(shape, dtype=dtype)
        self.prefix: tuple[Tensor, Tensor] | None = None
        """Keys and values (B, K, P, H) before the first, that every position sees (prefix tuning)."""

    def add(self, k_BKLH: Tensor, v_BKLH: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep positions: a whole prompt, or (``rows``) the next one of some rows.

        Returns:
            Keys and values that these rows have so far, in the given dtype, and which of them each row may see,
            (R, 1, 1, L); None: all.
        """
        end = k_BKLH.shape[2] if rows is None else max(rows.places) + 1
        self._make_room(end)
        seen = None
        if rows is None:
            self.keys[:, :, :end], self.values[:, :, :end] = k_BKLH, v_BKLH
        elif rows.place is not None:
            self.keys[:, :, end - 1 : end], self.values[:, :, end - 1 : end] = k_BKLH, v_BKLH
        else:
            index, places = index_of(rows, self.keys), torch.tensor(rows.places, device=self.keys.device)
            self.keys[index, :, places] = k_BKLH[:, :, 0].to(self.keys.dtype)
            self.values[index, :, places] = v_BKLH[:, :, 0].to(self.values.dtype)
            seen = (torch.arange(end, device=places.device) <= places[:, None])[:, None, None]
        keys, values = (self.keys, self.values) if rows is None else (pick(self.keys, rows), pick(self.values, rows))
        return keys[:, :, :end].to(k_BKLH.dtype), values[:, :, :end].to(v_BKLH.dtype), seen

    def behind_prefix(
        self, k_BKLH: Tensor, v_BKLH: Tensor, visible: Tensor | None, rows: Rows | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with the prefix before them, and which of them may be seen, (B or 1, 1, L or 1, P + L)."""
        assert self.prefix is not None
        k_BKPH, v_BKPH = (part if rows is None else pick(part, rows) for part in self.prefix)
        if causal:
            visible = torch.ones(1, 1, *[k_BKLH.shape[2]] * 2, dtype=torch.bool, device=k_BKLH.device).tril()
        if visible is not None:
            visible = F.pad(visible, (k_BKPH.shape[2], 0), value=True)
        return torch.cat((k_BKPH, k_BKLH), dim=2), torch.cat((v_BKPH, v_BKLH), dim=2), visible

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order."""
        self.keys, self.values = self.keys[rows_B], self.values[rows_B]
        if self.prefix is not None:
            self.prefix = self.prefix[0][rows_B], self.prefix[1][rows_B]

    def _make_room(self, end: int) -> None:
        batch, heads, room, width = self.keys.shape
        if end > room:
            more = (batch, heads, max(end, 2 * room, _ROOM) - room, width)
            self.keys = torch.cat((self.keys, self.keys.new_zeros(more)), dim=2)
            self.values = torch.cat((self.values, self.values.new_zeros(more)), dim=2)

    @property
    def num_bytes(self) -> int:
        """Memory held, filled or not."""
        return 2 * self.keys.numel() * self.keys.element_size()


class Call(NamedTuple):
    """What a layer is told at one call of its block, beside the stream."""

    cos: Tensor
    """Of the rotary embedding, (L, R), or (B, 1, 1, R) where rows stand at different positions."""
    sin: Tensor
    recall: Tensor | None = None
    """A stream (B, L, D) injected again."""
    visible: Tensor | None = None
    """Which keys may be seen, of shape (B, 1, 1, L); None: all, or the past of a causal block."""
    cache: KeyValueCache | None = None
    rows: Rows | None = None
    """Decoding one position of these rows; None: all positions at once."""


class Attention(nn.Module):
    """Self-attention over one level's positions.

    Args:
        d_model: width of the stream.
        heads: query heads.
        kv_heads: key-value heads; each serves heads / kv_heads query heads.
        head_dim: width of a head.
        causal: position i sees only 0 .. i.
        window: position i sees i - window + 1 .. i; one that is not causal, window // 2 on both sides.
        qk_norm: RMS-normalise queries and keys per head before rotation; or ``after_rotation``.
        bias: biases on both projections.
        eps: of the qk norm.

    Shape:
        x (B, L, D) -> (B, L, D).
    """

    recorded: list[Tensor] | None = None
    """Where weights (B, N, L, L') are put, one way of attending or another having made them (`recording`)."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        window: int | None = None,
        qk_norm: bool | str,
        bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.causal, self.window = heads, kv_heads, head_dim, causal, window
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, d_model, bias=bias)
        self.norm_last = qk_norm == "after_rotation"
        self.q_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()

    def starts(self, scales: Scales) -> Starts:
        return {"out.weight": ("normal", scales.branch)}

    def forward(self, x_BLD: Tensor, call: Call) -> Tensor:
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q_BNLH, k_BKLH, v_BKLH = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.norm_last:
            q_BNLH = self.q_norm(rotate(q_BNLH, call.cos, call.sin))
            k_BKLH = self.k_norm(rotate(k_BKLH, call.cos, call.sin))
        else:
            q_BNLH = rotate(self.q_norm(q_BNLH), call.cos, call.sin)
            k_BKLH = rotate(self.k_norm(k_BKLH), call.cos, call.sin)
        visible = call.visible
        # A single query that is decoded stands at the end of its keys; several begin where the keys begin.
        causal = self.causal and call.rows is None
        if call.cache is not None:
            k_BKLH, v_BKLH, visible = call.cache.add(k_BKLH, v_BKLH, call.rows)
        if self.window is not None:
            near = self.within(k_BKLH, call.rows)
            visible, causal = near if visible is None else near & visible, False
        if call.cache is not None and call.cache.prefix is not None:
            k_BKLH, v_BKLH, visible = call.cache.behind_prefix(k_BKLH, v_BKLH, visible, call.rows, causal)
            causal = False
        mixed_BLNH = self.attend(q_BNLH, k_BKLH, v_BKLH, None if causal else visible, causal)
        return self.out(mixed_BLNH.flatten(2))

    def within(self, k_BKLH: Tensor, rows: Rows | None) -> Tensor:
        """Which keys are in a query's window, (1, 1, L, L), or of single queries (R or 1, 1, 1, L)."""
        assert self.window is not None
        key_L = torch.arange(k_BKLH.shape[2], device=k_BKLH.device)
        if rows is None:
            back_LL = key_L[:, None] - key_L
        elif rows.place is not None:
            back_LL = rows.place - key_L[None]
        else:
            back_LL = torch.tensor(rows.places, device=key_L.device)[:, None, None] - key_L
        near = (back_LL >= 0) & (back_LL < self.window) if self.causal else back_LL.abs() <= self.window // 2
        if near.dim() == 2 and torch.compiler.is_exporting():  # for any length; strides of axes of one would tie it
            return near
        return near[:, None] if near.dim() == 3 else near[None, None]

    def attend(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        """Values mixed by the softmax of scaled products, (B, L, N, H); a Hugging Face export chooses how by name."""
        if self.kv_heads != self.heads:
            k_BKLH = k_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v_BKLH = v_BKLH.repeat_interleave(self.heads // self.kv_heads, dim=1)
        mixed_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BKLH, v_BKLH, attn_mask=visible, is_causal=causal)
        return mixed_BNLH.transpose(1, 2)
