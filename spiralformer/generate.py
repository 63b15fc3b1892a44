"""Continuing sequences: sampling from logits, with or without a cache.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from spiralformer.decoding import DecodeState, decode, prefill, why_not


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


@torch.no_grad()
def generate(
    model: fx.GraphModule,
    tokens_BL: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue every row; run in evaluation mode.

    Args:
        model: tokens (B, L) to logits (B, L, V).
        tokens_BL: the prompts, all of one length, at least 1. Padding on the left would move the chunk grid.
        max_new_tokens: tokens to add.
        sampling: how to draw.
        seed: for a repeatable sample.
        use_cache: decode token by token where the model can; else run the whole prefix for each token.

    Returns:
        Prompt and continuation, (B, L + max_new_tokens).

    Raises:
        ValueError: on an empty prompt or settings out of range.
    """
    if tokens_BL.dim() != 2 or tokens_BL.shape[1] == 0:
        raise ValueError(f"prompts must be (batch, length >= 1), got {tuple(tokens_BL.shape)}")
    generator = None if seed is None else torch.Generator(tokens_BL.device).manual_seed(seed)
    cached = use_cache and not why_not(model)
    was_training = model.training
    model.eval()
    try:
        state = DecodeState(model, tokens_BL.shape[0], tokens_BL.shape[1] + max_new_tokens, None) if cached else None
        for i in range(max_new_tokens):
            if state is None:
                logits_BV = model(tokens_BL)[:, -1]
            else:
                logits_BV = decode(model, tokens_BL[:, -1], state) if i else prefill(model, tokens_BL, state)
            next_B = sample_next(logits_BV, sampling, generator)
            tokens_BL = torch.cat((tokens_BL, next_B[:, None]), dim=1)
    finally:
        model.train(was_training)
    return tokens_BL
