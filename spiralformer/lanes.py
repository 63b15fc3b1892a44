"""Loops whose state is more than one stream: lanes side by side (hyper-connections), and an LSTM's cell.

Shape legend: B batch, L positions, N lanes, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spiralformer.starts import Scales, Starts

_STAY = 3.0  # of a lane's own entry in the logits of the mixing matrix: 0.87 of it stays where there are four
_SPREAD = 0.5  # of these logits: lanes that mix alike would stay alike
_SINKHORN = 20  # turns of rows, then columns


class OpenLanes(nn.Module):
    """So many lanes, each the input.

    Shape:
        (B, L, D) -> (B, L, N, D).
    """

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.lanes = lanes

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD[..., None, :].expand(*x_BLD.shape[:-1], self.lanes, x_BLD.shape[-1])


class WriteLanes(nn.Module):
    """M lanes + take update: M is doubly stochastic, so the lanes' mean is kept; a share of the update for each lane.

    Static hyper-connections (arXiv 2409.19606); M by Sinkhorn and Knopp's turns from free logits.

    Shape:
        lanes (B, L, N, D), update (B, L, D) -> (B, L, N, D).
    """

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.lanes = lanes
        self.mix = nn.Parameter(torch.zeros(lanes * lanes))
        self.take = nn.Parameter(torch.ones(lanes))

    def starts(self, scales: Scales) -> Starts:
        """Lanes stay nearly as they are, and each takes the whole update."""
        return {"mix": ("normal", _SPREAD), "take": ("fill", 1.0)}

    def mixing(self) -> Tensor:
        """M, (N, N): from lane to lane."""
        own_NN = torch.eye(self.lanes, device=self.mix.device)
        logits_NN = self.mix.float().view(self.lanes, self.lanes) + _STAY * own_NN
        for _ in range(_SINKHORN):
            logits_NN = logits_NN.log_softmax(dim=0).log_softmax(dim=1)
        return logits_NN.exp()

    def forward(self, lanes_BLND: Tensor, update_BLD: Tensor) -> Tensor:
        mixed_BLND = self.mixing().to(lanes_BLND.dtype) @ lanes_BLND
        return mixed_BLND + self.take[:, None] * update_BLD[..., None, :]


class ReadLanes(nn.Module):
    """A sum of the lanes with a learned factor for each; it begins with one of them.

    Shape:
        (B, L, N, D) -> (B, L, D).
    """

    def __init__(self, lanes: int, first: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(lanes))
        self.first = first

    def forward(self, lanes_BLND: Tensor) -> Tensor:
        return lanes_BLND[..., self.first, :] + (self.factors[:, None] * lanes_BLND).sum(dim=-2)


class LstmCell(nn.Module):
    """sigmoid(f) cell + sigmoid(i) tanh(g); f, i and g are linear in update and state.

    Shape:
        update, state, cell, each (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.from_update = nn.Linear(d_model, 3 * d_model)
        self.from_state = nn.Linear(d_model, 3 * d_model, bias=False)

    def forward(self, update_BLD: Tensor, state_BLD: Tensor, cell_BLD: Tensor) -> Tensor:
        forget, take, new = (self.from_update(update_BLD) + self.from_state(state_BLD)).chunk(3, dim=-1)
        # The forget gate begins open (Jozefowicz et al., 2015).
        return (forget + 1.0).sigmoid() * cell_BLD + take.sigmoid() * new.tanh()


class LstmState(nn.Module):
    """sigmoid(o) tanh(cell); o is linear in update and state.

    Shape:
        update, state, cell, each (B, L, D) -> (B, L, D).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.from_update = nn.Linear(d_model, d_model)
        self.from_state = nn.Linear(d_model, d_model, bias=False)

    def forward(self, update_BLD: Tensor, state_BLD: Tensor, cell_BLD: Tensor) -> Tensor:
        return (self.from_update(update_BLD) + self.from_state(state_BLD)).sigmoid() * cell_BLD.tanh()
