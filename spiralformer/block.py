"""A block: a stack of layers that owns parameters and may be called many times.

Every layer is two sub-layers, attention and feed-forward, of one form (arXiv 2604.15259, code):

    u = branch(recall(pre_norm(x), e));  x = post_norm(residual(x, peri_norm(u)))

Shape legend: B batch, L positions, D model, F feed-forward hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spiralformer.attention import Attention, Call, KeyValueCache
from spiralformer.checkpointing import GradientCheckpointingLayer
from spiralformer.decoding import Opening, Rows
from spiralformer.rope import Rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Resolved settings of one block; every number final, every part a class."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    """Positions that each attends to."""
    ffn: Callable[[int, int, bool], nn.Module]
    """Made with (D, F, bias)."""
    ffn_dim: int
    norm: Callable[..., nn.Module]
    """Made with (D, eps=)."""
    norm_places: tuple[bool, bool, bool] = (True, False, False)
    """Whether there is a norm before the branch, on its output, after the residual sum."""
    norm_eps: float
    layer: Callable[[BlockConfig], nn.Module]
    """`Layer`, `SharedLayer` or `ParallelLayer`."""
    residual: Callable[[int, float], nn.Module]
    """Made with (D, scale)."""
    recall: Callable[[int], nn.Module] | None = None
    """Made with (D)."""
    rotary_dim: int
    rotary_base: float
    axes: tuple[int, ...] = ()
    """Sides of a grid that positions go over; none: a row."""
    qk_norm: bool | str = False
    bias: bool = False
    dropout: float = 0.0
    causal: bool = True
    branch_scale: float = 1.0
    """Factor on every residual branch."""
    max_len: int
    """Positions tabulated for the rotary embedding."""


class SubLayer(nn.Module):
    """A branch between its norms, and how its output meets the state.

    Shape:
        x (B, L, D) -> (B, L, D).
    """

    def __init__(self, branch: nn.Module, c: BlockConfig) -> None:
        super().__init__()
        self.pre_norm, self.peri_norm, self.post_norm = _norms(c)
        self.branch = branch
        self.dropout = nn.Dropout(c.dropout)
        self.residual = c.residual(c.d_model, c.branch_scale)

    def forward(self, x_BLD: Tensor, recalled: tuple[nn.Module, Tensor] | None, *context: object) -> Tensor:
        return _after(self, self.branch, x_BLD, recalled, *context)


def _norms(c: BlockConfig) -> list[nn.Module]:
    return [c.norm(c.d_model, eps=c.norm_eps) if has else nn.Identity() for has in c.norm_places]


def _after(
    around: SubLayer | SharedLayer,
    branch: nn.Module,
    x_BLD: Tensor,
    recalled: tuple[nn.Module, Tensor] | None,
    *context: object,
) -> Tensor:
    """The state after a branch, by the norms and the residual around it, (B, L, D)."""
    u_BLD = around.pre_norm(x_BLD)
    if recalled is not None:
        recall, e_BLD = recalled
        u_BLD = recall(u_BLD, e_BLD)
    u_BLD = around.peri_norm(branch(u_BLD, *context))
    return around.post_norm(around.residual(x_BLD, around.dropout(u_BLD)))


class Layer(nn.Module):
    """Attention, then feed-forward; internal recall's one map serves both (arXiv 2604.15259)."""

    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.attn = SubLayer(_attention(c), c)
        self.ffn = SubLayer(c.ffn(c.d_model, c.ffn_dim, c.bias), c)
        self.recall = c.recall(c.d_model) if c.recall is not None else None

    def forward(self, x_BLD: Tensor, call: Call) -> Tensor:
        recalled = (self.recall, call.recall) if self.recall is not None and call.recall is not None else None
        return self.ffn(self.attn(x_BLD, recalled, call), recalled)


class SharedLayer(nn.Module):
    """Attention, then feed-forward, with one norm for each place and one residual for both (arXiv 2604.15259, code)."""

    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.pre_norm, self.peri_norm, self.post_norm = _norms(c)
        self.attn, self.ffn = _attention(c), c.ffn(c.d_model, c.ffn_dim, c.bias)
        self.dropout = nn.Dropout(c.dropout)
        self.residual = c.residual(c.d_model, c.branch_scale)
        self.recall = c.recall(c.d_model) if c.recall is not None else None

    def forward(self, x_BLD: Tensor, call: Call) -> Tensor:
        recalled = (self.recall, call.recall) if self.recall is not None and call.recall is not None else None
        return _after(self, self.ffn, _after(self, self.attn, x_BLD, recalled, call), recalled)


class ParallelLayer(nn.Module):
    """x + attn(norm(x)) + ffn(norm(x)), as in GPT-NeoX."""

    def __init__(self, c: BlockConfig) -> None:
        super().__init__()
        self.attn, self.ffn = SubLayer(_attention(c), c), SubLayer(c.ffn(c.d_model, c.ffn_dim, c.bias), c)

    def forward(self, x_BLD: Tensor, call: Call) -> Tensor:
        attn, ffn = self.attn, self.ffn
        attn_BLD = attn.dropout(attn.branch(attn.pre_norm(x_BLD), call))
        ffn_BLD = ffn.dropout(ffn.branch(ffn.pre_norm(x_BLD)))
        return attn.residual(x_BLD, attn_BLD + ffn_BLD)


LAYERS = (Layer, SharedLayer, ParallelLayer)


def _attention(c: BlockConfig) -> Attention:
    return Attention(
        c.d_model,
        c.heads,
        c.kv_heads,
        c.head_dim,
        causal=c.causal,
        window=c.window,
        qk_norm=c.qk_norm,
        bias=c.bias,
        eps=c.norm_eps,
    )


class Block(GradientCheckpointingLayer):
    """A stack of layers over one level's positions.

    Shape:
        (B, L, D) -> (B, L, D); L may be 0. Position j is told to the rotary embedding as first + j * stride.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rotary_dim, config.rotary_base, config.max_len, config.axes)
        self.layers = nn.ModuleList([config.layer(config) for _ in range(config.layers)])

    def forward(
        self,
        x_BLD: Tensor,
        recall_BLD: Tensor | None = None,
        *,
        stride: int = 1,
        first: int = 0,
        visible: Tensor | None = None,
    ) -> Tensor:
        if x_BLD.shape[1] == 0:
            return x_BLD
        cos_LR, sin_LR = self.rotary(x_BLD.shape[1], stride, first, x_BLD.device)
        if visible is not None:  # where there is nothing to see, softmax would give no numbers
            visible = (visible | ~visible.any(dim=1, keepdim=True))[:, None, None]
        call = Call(cos_LR, sin_LR, recall_BLD, visible)
        return self.run(x_BLD, call)

    def run(self, x_BLD: Tensor, call: Call, caches: Sequence[KeyValueCache] = ()) -> Tensor:
        """The layers, one after another, each with its cache if there are any."""
        for i, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, call._replace(cache=caches[i]) if caches else call)
        return x_BLD

    def open(self, opening: Opening) -> BlockMemory:
        """What decoding remembers at one call site."""
        return BlockMemory(self, opening)


class BlockMemory:
    """Keys and values of every layer at one call site."""

    def __init__(self, block: Block, opening: Opening) -> None:
        c, self.block = block.config, block
        capacity = 0 if opening.max_len is None else opening.clock.count(opening.max_len)
        shape = (opening.batch_size, c.kv_heads, capacity, c.head_dim)
        self.caches = [KeyValueCache(shape, opening.like, opening.cache_dtype) for _ in range(c.layers)]
        self.out_R1D: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the caches."""
        return sum(cache.num_bytes for cache in self.caches)

    def prefill(
        self,
        x_BLD: Tensor,
        recall_BLD: Tensor | None = None,
        *,
        lengths: Sequence[int],
        stride: int = 1,
        first: int = 0,
    ) -> Tensor:
        if x_BLD.shape[1] == 0:
            return x_BLD
        cos_LR, sin_LR = self.block.rotary(x_BLD.shape[1], stride, first, x_BLD.device)
        return self.block.run(x_BLD, Call(cos_LR, sin_LR, recall_BLD), self.caches)

    def take(
        self, x_R1D: Tensor, recall_R1D: Tensor | None = None, *, rows: Rows, stride: int = 1, first: int = 0
    ) -> None:
        rotary, device = self.block.rotary, x_R1D.device
        if rows.place is not None:
            cos, sin = rotary(1, stride, first + rows.place * stride, device)
        else:
            cos, sin = rotary.at([first + place * stride for place in rows.places], device)
        self.out_R1D = self.block.run(x_R1D, Call(cos, sin, recall_R1D, rows=rows), self.caches)

    def give(self, rows: Rows) -> Tensor:
        assert self.out_R1D is not None
        return self.out_R1D

    def select(self, rows_B: Tensor) -> None:
        for cache in self.caches:
            cache.select(rows_B)

    def mark(self) -> None:
        """Nothing: positions that are taken back are written over."""

    def back_to(self, mark: None) -> None:
        pass
