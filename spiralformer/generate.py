"""Continuing sequences: sampling from logits, with or without a cache.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spiralformer.decoding import DecodeState
from spiralformer.padding import padded_left


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the scores; 0 takes the best."""
    top_k: int | None = None
    """Keep only the k best."""
    top_p: float | None = None
    """Keep the fewest best tokens whose probabilities sum to this."""

    def __post_init__(self) -> None:
        in_range = self.temperature >= 0 and (self.top_k is None or self.top_k >= 1)
        if not in_range or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(f"need temperature >= 0, top_k >= 1 and 0 < top_p <= 1, got {self}")


def sample_next(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token per row.

    Shape:
        (B, V) -> (B,).
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None:
        worst_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst_B1, -torch.inf)
    if sampling.top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(dim=-1)
        surplus_BV = probs_BV.cumsum(dim=-1) - probs_BV >= sampling.top_p
        logits_BV = logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(surplus_BV, -torch.inf))
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(-1)


class Decoder(Protocol):
    """What can continue a text: `spiralformer.model.SpiralFormer`."""

    training: bool

    @property
    def undecodable(self) -> str: ...

    def __call__(self, tokens_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def decode_state(self, batch_size: int, max_len: int | None = None) -> DecodeState: ...

    def prefill(self, tokens_BL: Tensor, state: DecodeState, attention_mask_BL: Tensor | None = None) -> Tensor: ...

    def decode(self, tokens_B: Tensor, state: DecodeState) -> Tensor: ...


@torch.no_grad()
def generate(
    model: Decoder,
    tokens_BL: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    attention_mask_BL: Tensor | None = None,
    *,
    seed: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue every row; run in evaluation mode.

    Args:
        model: tokens (B, L) to logits (B, L, V).
        tokens_BL: the prompts, of length at least 1.
        max_new_tokens: tokens to add.
        sampling: how to draw.
        attention_mask_BL: 0 where a prompt is padded, on the left or on the right; every row continues as it would
            alone.
        seed: for a repeatable sample.
        use_cache: decode token by token where the model can; else run the whole prefix for each token.

    Returns:
        Prompt as given and continuation, (B, L + max_new_tokens).

    Raises:
        ValueError: on an empty prompt or settings out of range.
    """
    if tokens_BL.dim() != 2 or tokens_BL.shape[1] == 0:
        raise ValueError(f"prompts must be (batch, length >= 1), got {tuple(tokens_BL.shape)}")
    generator = None if seed is None else torch.Generator(tokens_BL.device).manual_seed(seed)
    was_training, cached = model.training, use_cache and not model.undecodable
    given_BL, state = tokens_BL, None
    if cached:
        longest = tokens_BL.shape[1] if attention_mask_BL is None else int(attention_mask_BL.sum(dim=1).max())
        state = model.decode_state(tokens_BL.shape[0], longest + max_new_tokens)
    elif attention_mask_BL is not None:
        tokens_BL, attention_mask_BL = padded_left(tokens_BL, attention_mask_BL)
    model.train(False)
    try:
        for i in range(max_new_tokens):
            if state is None:
                logits_BV = model(tokens_BL, attention_mask_BL)[:, -1]
            elif i == 0:
                logits_BV = model.prefill(tokens_BL, state, attention_mask_BL)
            else:
                logits_BV = model.decode(tokens_BL[:, -1], state)
            next_B1 = sample_next(logits_BV, sampling, generator)[:, None]
            tokens_BL, given_BL = torch.cat((tokens_BL, next_B1), dim=1), torch.cat((given_BL, next_B1), dim=1)
            if attention_mask_BL is not None:
                attention_mask_BL = torch.cat((attention_mask_BL, torch.ones_like(next_B1, dtype=torch.bool)), dim=1)
    finally:
        model.train(was_training)
    return given_BL
