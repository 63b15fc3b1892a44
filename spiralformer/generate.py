"""Sampling from logits.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sample_next(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row.

    Args:
        logits_BV: unnormalised scores.
        temperature: divides the scores; 0 takes the best.
        top_k: keep only the k best; None keeps all.
        generator: source of randomness, on the logits' device.

    Shape:
        (B, V) -> (B,).
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    if top_k is not None:
        worst_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst_B1, -torch.inf)
    probs_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens_BL: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue every row; the whole prefix is run again for each token.

    Args:
        model: tokens (B, L) to logits (B, L, V); run in evaluation mode.
        tokens_BL: the prompts, all of one length, at least 1.
        max_new_tokens: tokens to add.
        temperature: 0 is greedy.
        top_k: sample among the k best only.
        seed: for a repeatable sample.

    Returns:
        Prompt and continuation, (B, L + max_new_tokens).

    Raises:
        ValueError: on an empty prompt or settings out of range.
    """
    if tokens_BL.dim() != 2 or tokens_BL.shape[1] == 0:
        raise ValueError(f"prompts must be (batch, length >= 1), got {tuple(tokens_BL.shape)}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"need temperature >= 0 and top_k >= 1, got {temperature=}, {top_k=}")
    generator = None if seed is None else torch.Generator(tokens_BL.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits_BV = model(tokens_BL)[:, -1]
            next_B = sample_next(logits_BV, temperature=temperature, top_k=top_k, generator=generator)
            tokens_BL = torch.cat((tokens_BL, next_B[:, None]), dim=1)
    finally:
        model.train(was_training)
    return tokens_BL
