"""Batches of sequences of different lengths: a row's logits depend on its own tokens alone.

Every row is moved to the left, so that its chunk grid begins with its first token. A causal model then sees nothing of
what stands after; one that sees its whole input is told how long each row is.

Shape legend: B batch, L tokens, M latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Rows moved to the left."""

    tokens_BL: Tensor
    lengths_B: Tensor
    first_B: Tensor
    """Where each row began."""


def align(tokens_BL: Tensor, mask_BL: Tensor) -> Aligned:
    """Move every row to the left.

    Args:
        tokens_BL: padded on the left, on the right, or both.
        mask_BL: 1 where there is a token, 0 where there is padding.

    Raises:
        ValueError: for a mask of another shape, with holes, with an empty row, or with other numbers than 0 and 1.
    """
    if mask_BL.shape != tokens_BL.shape:
        raise ValueError(f"attention_mask: expected {tuple(tokens_BL.shape)}, got {tuple(mask_BL.shape)}")
    real_BL = mask_BL.to(torch.bool)
    lengths_B, first_B = real_BL.sum(dim=1), real_BL.int().argmax(dim=1)
    order_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    if not torch.compiler.is_compiling():
        if mask_BL.dtype != torch.bool and ((mask_BL != 0) & (mask_BL != 1)).any():
            raise ValueError("attention_mask: holds other numbers than 0 and 1; packed texts can't be told apart")
        last_B1 = (first_B + lengths_B)[:, None]
        if not torch.equal(real_BL, (order_BL >= first_B[:, None]) & (order_BL < last_B1)) or (lengths_B == 0).any():
            raise ValueError("attention_mask: mark one run of tokens in every row, padded on the left or the right")
    return Aligned(tokens_BL.gather(1, (order_BL + first_B[:, None]) % tokens_BL.shape[1]), lengths_B, first_B)


def restore(values: Tensor, first_B: Tensor) -> Tensor:
    """Positions of aligned rows (B, L, ...) back to where they came from; those of padding hold anything."""
    length = values.shape[1]
    order_BL = (torch.arange(length, device=values.device) - first_B[:, None]) % length
    return values.gather(1, order_BL[..., None].expand(-1, -1, values.shape[2]))


def visible(lengths_B: Tensor | None, chunk: int, offset: int, tokens_BL: Tensor) -> Tensor | None:
    """Which latents of a level are closed by real tokens, (B, M); None: all.

    A row that closes none sees all: what it makes of them is read by nobody.
    """
    if lengths_B is None:
        return None
    closed_B1 = ((lengths_B + offset) // chunk)[:, None]
    latents = torch.arange((tokens_BL.shape[1] + offset) // chunk, device=tokens_BL.device)
    return latents < closed_B1


def padded_left(tokens_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The same batch with all its padding on the left, and its mask."""
    aligned, length = align(tokens_BL, mask_BL), tokens_BL.shape[1]
    padding_B = length - aligned.lengths_B
    moved_BL = restore(aligned.tokens_BL[..., None], padding_B)[..., 0]
    return moved_BL, torch.arange(length, device=tokens_BL.device) >= padding_B[:, None]
