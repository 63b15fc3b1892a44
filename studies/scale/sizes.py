"""A candidate at another size: the same graph, wider and deeper."""

from __future__ import annotations

import math
from dataclasses import replace

from searchspace.arch import ArchSpec, BlockSpec, head_dim
from searchspace.errors import SpecError
from studies.sections import SizeConfig

_OF_FFN = 8  # hidden widths are whole multiples of it


def scaled(arch: ArchSpec, size: SizeConfig) -> ArchSpec:
    """An architecture at a size: heads keep their width, their number and feed-forward widths grow with the model's.

    Raises:
        SpecError: if it can't be built there.
    """
    blocks = {name: _scaled(block, arch.d_model, size) for name, block in arch.blocks.items()}
    try:
        return replace(arch, d_model=size.d_model, blocks=blocks)
    except SpecError as error:
        error.path = f"at width {size.label}: {error.path}"
        raise


def _scaled(block: BlockSpec, d_model: int, size: SizeConfig) -> BlockSpec:
    ratio = size.d_model / d_model
    wanted = max(1.0, size.d_model / head_dim(block, d_model))
    if block.head_dim is not None:
        heads = max(1, round(block.heads * ratio))
    else:  # a divisor of the width that leaves heads an even width, nearest to the one they had
        fit = [n for n in range(1, size.d_model // 2 + 1) if size.d_model % (2 * n) == 0] or [1]
        heads = min(fit, key=lambda n: abs(math.log(n / wanted)))
    groups = None if block.kv_heads is None else max(1, round(heads * block.kv_heads / block.heads))
    while groups is not None and heads % groups:
        groups -= 1
    hidden = None if block.ffn_dim is None else max(_OF_FFN, _OF_FFN * round(block.ffn_dim * ratio / _OF_FFN))
    return replace(block, layers=block.layers * size.depth, heads=heads, kv_heads=groups, ffn_dim=hidden)
