"""The runnable model: straight-line code over the parts of this package.

Shape legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from spiralformer.generate import generate


class SpiralFormer(fx.GraphModule):
    """A compiled architecture. ``print(model.code)`` shows its forward as Python.

    Shape:
        tokens (B, L) of int64, 1 <= L -> logits (B, L, V).
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "SpiralFormer") -> None:
        super().__init__(root, graph, class_name)

    def generate(
        self,
        tokens_BL: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue every row; see `spiralformer.generate.generate`."""
        return generate(self, tokens_BL, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
