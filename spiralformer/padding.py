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

    tokens: Tensor
    """(B, L), or embedded (B, L, D)."""
    lengths_B: Tensor
    first_B: Tensor
    """Where each row began."""


def align(tokens: Tensor, mask_BL: Tensor) -> Aligned:
    """Move every row to the left.

    Args:
        tokens: (B, L) or embedded (B, L, D), padded on the left, on the right, or both.
        mask_BL: 1 where there is a token, 0 where there is padding.

    Raises:
        ValueError: for a mask of another shape, with holes, with an empty row, or with other numbers than 0 and 1.
    """
    if mask_BL.shape != tokens.shape[:2]:
        raise ValueError(f"attention_mask: expected {tuple(tokens.shape[:2])}, got {tuple(mask_BL.shape)}")
    real_BL = mask_BL.to(torch.bool)
    lengths_B, first_B = real_BL.sum(dim=1), real_BL.int().argmax(dim=1)
    order_BL = torch.arange(tokens.shape[1], device=tokens.device)
    if not torch.compiler.is_compiling():
        if mask_BL.dtype != torch.bool and ((mask_BL != 0) & (mask_BL != 1)).any():
            raise ValueError("attention_mask: holds other numbers than 0 and 1; packed texts can't be told apart")
        last_B1 = (first_B + lengths_B)[:, None]
        if not torch.equal(real_BL, (order_BL >= first_B[:, None]) & (order_BL < last_B1)) or (lengths_B == 0).any():
            raise ValueError("attention_mask: mark one run of tokens in every row, padded on the left or the right")
    moved_BL = (order_BL + first_B[:, None]) % tokens.shape[1]
    if tokens.dim() == 3:
        moved_BL = moved_BL[..., None].expand_as(tokens)
    return Aligned(tokens.gather(1, moved_BL), lengths_B, first_B)


def restore(values: Tensor, first_B: Tensor) -> Tensor:
    """Positions of aligned rows (B, L, ...) back to where they came from; those of padding hold anything."""
    length = values.shape[1]
    order_BL = (torch.arange(length, device=values.device) - first_B[:, None]) % length
    return values.gather(1, order_BL[..., None].expand(-1, -1, values.shape[2]))


class Unpacked(NamedTuple):
    """Texts that stood one after another, each in a row of its own."""

    rows: Tensor
    """(T, longest, D), padded on the right."""
    lengths_T: Tensor
    text_BL: Tensor
    """Where each token went: to which row."""
    place_BL: Tensor
    """And to which place in it."""


def unpack(embeds_BLD: Tensor, place_BL: Tensor) -> Unpacked:
    """Take packed texts apart.

    Args:
        embeds_BLD: texts one after another in each row.
        place_BL: of each token in its text; 0 begins one.

    Raises:
        ValueError: if the places are not 0, 1, 2, ... in every text.
    """
    place_BL = place_BL.expand(embeds_BLD.shape[:2])
    order_BL = torch.arange(place_BL.shape[1], device=place_BL.device).expand_as(place_BL)
    begins_BL = place_BL == 0
    since_BL = order_BL - torch.where(begins_BL, order_BL, -1).cummax(dim=1).values
    if not begins_BL[:, 0].all() or not torch.equal(since_BL, place_BL):
        raise ValueError("position_ids: are counted 0, 1, 2, ... from the first token of each text")
    text_BL = begins_BL.flatten().cumsum(0).view_as(place_BL) - 1
    lengths_T = text_BL.flatten().bincount()
    rows = embeds_BLD.new_zeros(len(lengths_T), int(lengths_T.max()), embeds_BLD.shape[2])
    return Unpacked(rows.index_put((text_BL, place_BL), embeds_BLD), lengths_T, text_BL, place_BL)


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
    moved_BL = restore(aligned.tokens[..., None], padding_B)[..., 0]
    return moved_BL, torch.arange(length, device=tokens_BL.device) >= padding_B[:, None]
