"""A loop that ends, row by row, where it has come to rest: by its state, or by its logits (arXiv 2502.05171).

Shape legend: B batch, L positions, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn


class Halting(nn.Module):
    """Runs a loop's iterations until every row rests; in training, all of them.

    By ``state``: its relative change in norm since the one before, over all positions, is below the threshold. By
    ``logits``: the Kullback-Leibler divergence between predictions from the two is, mean over positions, in nats.

    Args:
        by: ``state`` or ``logits``.
        threshold: below which a row rests.
        ends: after how many iterations each state comes that it is given.
        chunk: of the loop's level.
        offset: of it.
    """

    def __init__(self, by: str, threshold: float, ends: Sequence[int], chunk: int, offset: int) -> None:
        super().__init__()
        self.by, self.threshold, self.ends, self.chunk, self.offset = by, threshold, tuple(ends), chunk, offset
        self.used: list[int] = []
        """Iterations of each row of the last batch."""

    def forward(
        self,
        state_BLD: Tensor,
        states: Generator[Tensor, Tensor, None],
        finish: Callable[[Tensor], Tensor],
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """What ``finish`` makes of each row's state where it rests, or after its last iteration.

        Args:
            state_BLD: with which the loop begins.
            states: gives the states, and is sent the one to go on from.
            finish: of a state, what follows the loop.
            lengths_B: tokens of each row, where some are padding.
        """
        used_B = torch.zeros(len(state_BLD), dtype=torch.long, device=state_BLD.device)
        done_B = torch.zeros_like(used_B, dtype=torch.bool)
        found = None
        new_BLD = next(states)
        for iterations in self.ends:
            used_B = torch.where(done_B, used_B, iterations)
            new_BLD = torch.where(done_B[:, None, None], state_BLD, new_BLD)
            if self.by == "logits":
                before, found = found, finish(new_BLD)
                moved_B = done_B.new_full((len(done_B),), torch.inf, dtype=torch.float32)
                moved_B = moved_B if before is None else _divergence(found, before, lengths_B)
            else:
                moved_B = self._change(new_BLD, state_BLD, lengths_B)
            state_BLD = new_BLD
            if not self.training:
                done_B = done_B | (moved_B < self.threshold)
                if bool(done_B.all()):
                    break
            if iterations < self.ends[-1]:
                new_BLD = states.send(state_BLD)
        states.close()
        self.used = used_B.tolist()
        return finish(state_BLD) if found is None else found

    def _change(self, new_BLD: Tensor, old_BLD: Tensor, lengths_B: Tensor | None) -> Tensor:
        change_BLD = new_BLD - old_BLD
        if lengths_B is not None:
            real_BL1 = _real(new_BLD, (lengths_B + self.offset) // self.chunk)[..., None]
            new_BLD, change_BLD = new_BLD * real_BL1, change_BLD * real_BL1
        return change_BLD.flatten(1).norm(dim=1) / new_BLD.flatten(1).norm(dim=1).clamp_min(1e-30)


def _real(x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.arange(x_BLD.shape[1], device=x_BLD.device) < lengths_B[:, None]


def _divergence(logits_BLV: Tensor, before_BLV: Tensor, lengths_B: Tensor | None) -> Tensor:
    """KL(now || before) of each row, mean over positions, in nats."""
    now, then = logits_BLV.float().log_softmax(-1), before_BLV.float().log_softmax(-1)
    moved_BL = (now.exp() * (now - then)).sum(-1)
    if lengths_B is None:
        return moved_BL.mean(-1)
    return torch.where(_real(moved_BL, lengths_B), moved_BL, 0.0).sum(-1) / lengths_B
