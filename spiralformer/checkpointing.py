"""Gradient checkpointing: keep a module's inputs alone, and run it again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class GradientCheckpointingLayer(nn.Module):
    """A module that may be run again; a Hugging Face export has transformers' class of this name in its place."""

    gradient_checkpointing = False

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, **settings)
        return super().__call__(*inputs, **settings)
