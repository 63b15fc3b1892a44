"""How parameters begin: what a part may say of its own."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Draw: TypeAlias = Literal["normal", "fill", "keep"]
"""Normal with a standard deviation, filled with a number, or as the part's ``reset`` says."""
Start: TypeAlias = tuple[Draw, float]
Starts: TypeAlias = dict[str, Start]
"""By the parameter's name within the part."""


class Scales(NamedTuple):
    """Standard deviations that depend on the whole model."""

    small: float
    """sqrt(2 / (5 D)) ("small init", arXiv 1910.05895, as in GPT-NeoX)."""
    branch: float
    """Of the maps that end a residual branch: small / sqrt(2 N) for N unrolled layers (GPT-2, MeSH)."""
    embedding: float
    """Of an embedding that nothing scales: sqrt(D) small; small where the head uses it too."""
