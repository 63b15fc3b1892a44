"""Memory as state highways (MeSH, arXiv 2510.07739, section 3): slots, routers, writes and reads.

Slots start as m_0 = the given stream and zeros, and only ever grow by w_b * update, so slot b is
[b = 0] * m_0 + sum_k w_kb u_k. A read is then a weighted sum of the updates themselves: the B x L x S x D
buffer is never built.

Shape legend: B batch, L tokens, S slots, D model.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Memory(NamedTuple):
    """What slot 0 began with, and every write since: its weights (B, L, S) and its update (B, L, D)."""

    first_BLD: Tensor
    weights_BLS: tuple[Tensor, ...] = ()
    updates_BLD: tuple[Tensor, ...] = ()


class OpenMemory(nn.Module):
    """A memory whose slot 0 holds the input."""

    def forward(self, x_BLD: Tensor) -> Memory:
        return Memory(x_BLD)


class Router(nn.Module):
    """Softmax over slots of a linear map of the state.

    Shape:
        (B, L, D) -> (B, L, S).
    """

    def __init__(self, d_model: int, slots: int) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, slots)

    def weights(self, state_BLD: Tensor) -> Tensor:
        """Of each slot, (B, L, S)."""
        return self.router(state_BLD).softmax(dim=-1)


class WriteMemory(Router):
    """m_b <- m_b + w_b * update, w from the state (MeSH eq. for w_write)."""

    def forward(self, memory: Memory, update_BLD: Tensor, state_BLD: Tensor) -> Memory:
        return Memory(
            memory.first_BLD,
            (*memory.weights_BLS, self.weights(state_BLD)),
            (*memory.updates_BLD, update_BLD),
        )


class ReadMemory(Router):
    """sum_b r_b m_b, r from the state (MeSH eq. for w_read)."""

    def forward(self, memory: Memory, state_BLD: Tensor) -> Tensor:
        read_BLS = self.weights(state_BLD)
        state_BLD = read_BLS[..., :1] * memory.first_BLD
        for write_BLS, update_BLD in zip(memory.weights_BLS, memory.updates_BLD, strict=True):
            state_BLD = state_BLD + (read_BLS * write_BLS).sum(dim=-1, keepdim=True) * update_BLD
        return state_BLD
