"""The runnable model: straight-line code over the parts of this package.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from spiralformer.decoding import DecodeState, decode, prefill
from spiralformer.generate import Sampling, generate


class SpiralFormer(fx.GraphModule):
    """A compiled architecture. ``print(model.code)`` shows its forward as Python.

    Shape:
        tokens (B, L) of int64, 1 <= L -> logits (B, L, V).
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "SpiralFormer") -> None:
        super().__init__(root, graph, class_name)

    def decode_state(self, batch_size: int, max_len: int, *, cache_dtype: torch.dtype | None = None) -> DecodeState:
        """An empty state for decoding; see `spiralformer.decoding.DecodeState`."""
        return DecodeState(self, batch_size, max_len, cache_dtype)

    def prefill(self, tokens_BL: Tensor, state: DecodeState) -> Tensor:
        """Run a prompt in parallel into an empty state; gives the last token's logits (B, V)."""
        return prefill(self, tokens_BL, state)

    def decode(self, tokens_B: Tensor, state: DecodeState) -> Tensor:
        """One more token for every sequence; gives its logits (B, V), equal to ``self(...)[:, -1]``."""
        return decode(self, tokens_B, state)

    def generate(
        self,
        tokens_BL: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue every row; see `spiralformer.generate.generate`."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        return generate(self, tokens_BL, max_new_tokens, sampling, seed=seed, use_cache=use_cache)
