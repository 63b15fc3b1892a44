"""Nested expressions, whose depth and length are controlled apart: trained shallow, tried deeper and longer.

``((1&0)|(0^1))=`` asks for a bit, ``((3+4)*(2-1))=`` for a number modulo five. An expression of n leaves may be from
log2(n) to n - 1 deep; a loop that takes one level off with each iteration solves any depth.

``answer: rewrite`` asks for one step of locate and replace instead (arXiv 2512.02677): every innermost operation
becomes its value, and a finished model is run on what it has written until a value is left.

Shape legend: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from searchspace.errors import SpecError
from searchspace.plain import key
from searchspace.tables import table
from studies.data.dataset import DataFacts, Examination, Headline, Metric
from studies.data.settings import DataConfig
from studies.tasks.graded import HARDER, Graded
from studies.tasks.pairs import LEFT_OUT, prepare_pairs, shares_right

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray
    from torch import Tensor

Tree: TypeAlias = "int | tuple[str, Tree, Tree]"
"""A leaf's value, or an operation on two of them."""
Algebra: TypeAlias = Literal["boolean", "modular"]
_OPERATIONS: Mapping[Algebra, str] = {"boolean": "&|^", "modular": "+-*"}
_VALUES: Mapping[Algebra, int] = {"boolean": 2, "modular": 5}
_SIGNS = " ()=&|^+-*01234"
"""Tokens, by their number; the first is padding."""
_LEVEL = (10**6, 10**3)
"""A level is so many times the number of its algebra, and its depth, and its leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedLogicData(DataConfig):
    """Nested expressions and their values, made as they are asked for; the same every time."""

    kind: Literal["nested_logic"] = key("Source: nested expressions.", default="nested_logic")
    algebra: Algebra = key(
        "boolean: and, or, xor of bits. modular: sums, differences, products modulo 5.", default="boolean"
    )
    leaves: int = key("Of an expression to train on, at most; seq_len is 4 leaves - 2.", default=8, low=2, high=256)
    depth: int = key("To train on, at most.", default=3, low=1, high=64)
    answer: Literal["value", "rewrite"] = key(
        "value: what it comes to. rewrite: the expression with its innermost operations worked out; tried step by step "
        "until a value is left (arXiv 2512.02677).",
        default="value",
    )
    rows: int = key("Expressions to train on.", default=50_000, low=16, high=10_000_000)
    held_out: int = key("More of them, to evaluate on.", default=1_000, low=16, high=1_000_000)
    test_depths: tuple[int, ...] = key("Deeper ones to try, of as many leaves; the hardest last.", default=(4, 5, 6, 7))
    test_leaves: tuple[int, ...] = key("Longer ones to try, as deep as trained where they can be.", default=(16, 32))

    def __post_init__(self) -> None:
        if self.leaves > 2**self.depth or self.depth >= self.leaves:
            what = f"expressions of {self.leaves} leaves are from {_least_depth(self.leaves)} to {self.leaves - 1} deep"
            raise SpecError("data.depth", what, "change depth or leaves")
        for name, values, least, most in (
            ("test_depths", self.test_depths, self.depth + 1, self.leaves - 1),
            ("test_leaves", self.test_leaves, self.leaves + 1, 4096),
        ):
            if list(values) != sorted({*values}) or any(not least <= value <= most for value in values):
                what = f"{[*values]} are not from {least} to {most}, in order"
                raise SpecError(f"data.{name}", what, "leave out those that are not")


class NestedLogic(Graded):
    """Prepared expressions; the value stands behind the sign that asks for it, the last token."""

    @property
    def rewrites(self) -> bool:
        """Whether it is rewritten step by step."""
        return self.facts.settings.get("answer") == "rewrite"

    metrics = table(
        "a metric",
        (
            Metric("right", "right", "share of held-out expressions whose value is right", better="higher"),
            *HARDER,
            Metric("loss", "nats", "held-out loss, nats per expression", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["right"], -1.0)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        right, _ = shares_right(logits_BLV, targets_BL)
        return {"right": right, "loss": self.loss(logits_BLV, targets_BL)}

    def pairs(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
        inputs_BL, answers_BL = super().pairs(rows)
        return inputs_BL, answers_BL if self.rewrites else answers_BL.masked_fill(answers_BL == 0, LEFT_OUT)

    def answers(self, model: Any, level: int, positions: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        if not self.rewrites:
            return super().answers(model, level, positions)
        return [
            (inputs_BL, _rewritten(model, inputs_BL), answers_BL.masked_fill(answers_BL == 0, LEFT_OUT))
            for inputs_BL, answers_BL in self.tried(level, positions)
        ]

    def make(self, level: int, count: int, seed: int) -> NDArray[Any]:
        algebra, depth, leaves = _read(level)
        return make_expressions(count, algebra, (depth, depth), (leaves, leaves), seed)

    def name(self, level: int) -> str:
        _, depth, leaves = _read(level)
        return f"depth {depth}, {leaves} leaves"

    def draw(self, inputs_L: Tensor, said_L: Tensor, targets_L: Tensor) -> str:
        text = "".join(_SIGNS[token] for token in inputs_L.tolist()).strip()
        said, right = int(said_L[-1]), int(targets_L[-1])
        return f"{text}{_SIGNS[said]}" + ("" if said == right else f"  x, it is {_SIGNS[right]}")


def _rewritten(model: Any, inputs_BL: Tensor) -> Tensor:
    """What is left when a model has rewritten each row until it is a value, or as often as it has tokens; (B, L).

    A value and the sign that asks for it are done: no model has been trained to rewrite them.
    """
    import torch

    length, device = inputs_BL.shape[1], next(model.parameters()).device
    rows_BL = inputs_BL.clone()
    for _ in range(length):
        going_B = (rows_BL != 0).sum(dim=1) > 2
        if not going_B.any():
            break
        with torch.no_grad():
            said_BL = model(rows_BL[going_B].to(device)).argmax(dim=-1).cpu()
        written_BL = torch.zeros_like(said_BL)
        for row, said, given in zip(written_BL, said_BL, rows_BL[going_B], strict=True):
            kept = said[(said != 0) & (given != 0)]
            row[length - len(kept) :] = kept
        if torch.equal(written_BL, rows_BL[going_B]):
            break
        rows_BL[going_B] = written_BL
    value_B = torch.where((rows_BL != 0).sum(dim=1) == 2, rows_BL[:, -2], 0)
    return torch.cat((inputs_BL[:, :-1], value_B[:, None]), dim=1)


def make_expressions(
    count: int,
    algebra: Algebra,
    depths: tuple[int, int],
    leaves: tuple[int, int],
    seed: int,
    *,
    rewrites: bool = False,
) -> NDArray[Any]:
    """Rows (count, 2 L) of uint8: expressions padded in front, then their values behind the last token.

    Args:
        count: of rows.
        algebra: of the operations.
        depths: least and most, each as often as the others.
        leaves: least and most, as far as the depth allows; L is 4 leaves - 2.
        seed: of the draws.
        rewrites: instead of the values, the expressions with every innermost operation worked out: its value stands
            where it began, and nothing where its other tokens were.
    """
    import random

    import numpy as np

    draw = random.Random(f"{seed} {algebra} {depths} {leaves}")
    length = 4 * leaves[1] - 2
    rows = np.zeros((count, 2 * length), np.uint8)
    for row in rows:
        depth = draw.randint(*depths)
        tree = _tree(draw.randint(max(leaves[0], depth + 1), min(leaves[1], 2**depth)), depth, algebra, draw)
        text = f"{written(tree)}="
        row[length - len(text) : length] = [_SIGNS.index(sign) for sign in text]
        if rewrites:
            row[2 * length - len(text) :] = [_SIGNS.index(sign) for sign in rewritten(text)]
        else:
            row[-1] = _SIGNS.index(str(value_of(tree)))
    return rows


def _read(level: int) -> tuple[Algebra, int, int]:
    """Algebra, depth and leaves of a level."""
    kind, rest = divmod(level, _LEVEL[0])
    return [*_OPERATIONS][kind], *divmod(rest, _LEVEL[1])


def _least_depth(leaves: int) -> int:
    return (leaves - 1).bit_length()


def _tree(leaves: int, depth: int, algebra: Algebra, draw: random.Random) -> Tree:
    """A random expression of just so many leaves and just that depth."""
    if depth == 0:
        return draw.randrange(_VALUES[algebra])
    most = 2 ** (depth - 1)
    deep = draw.randint(max(depth, leaves - most), min(leaves - 1, most))
    other = leaves - deep
    parts = [
        _tree(deep, depth - 1, algebra, draw),
        _tree(other, draw.randint(_least_depth(other), min(depth - 1, other - 1)), algebra, draw),
    ]
    draw.shuffle(parts)
    return draw.choice(_OPERATIONS[algebra]), parts[0], parts[1]


def written(tree: Tree) -> str:
    """With every operation in parentheses."""
    return str(tree) if isinstance(tree, int) else f"({written(tree[1])}{tree[0]}{written(tree[2])})"


def rewritten(text: str) -> str:
    """An expression with every innermost operation's value in the place of its first sign, blanks after it."""

    def worked_out(found: re.Match[str]) -> str:
        return f"{value_of((found[2], int(found[1]), int(found[3])))}    "

    return re.sub(r"\((\d)([^\d()])(\d)\)", worked_out, text)


def value_of(tree: Tree) -> int:
    """What it comes to; sums, differences and products modulo 5."""
    if isinstance(tree, int):
        return tree
    sign, left, right = tree[0], value_of(tree[1]), value_of(tree[2])
    found = {
        "&": left & right, "|": left | right, "^": left ^ right,
        "+": (left + right) % 5, "-": (left - right) % 5, "*": left * right % 5,
    }  # fmt: skip
    return found[sign]


def prepare_nested_logic(config: NestedLogicData, folder: Path, base: Path = Path()) -> NestedLogic:
    """Write expressions under ``folder``, once. Raises `SpecError` if it holds other data, or something else."""

    def make(part: str) -> NDArray[Any]:
        count, seed = (config.rows, 0) if part == "train" else (config.held_out, 1)
        depths, leaves = (1, config.depth), (2, config.leaves)
        return make_expressions(count, config.algebra, depths, leaves, seed, rewrites=config.answer == "rewrite")

    return prepare_pairs(NestedLogic, config, facts_of(config), folder, make)


def examine(model: Any, config: NestedLogicData, most_tokens: int, tried: Mapping[int, Any]) -> Examination:
    """Score a model on fresh expressions, by depth and by length."""
    found: Examination = NestedLogic.of(facts_of(config)).examine(model, most_tokens, tried)
    return found


def facts_of(config: NestedLogicData) -> DataFacts:
    """What the data of these settings are, before they are made."""
    length = 4 * config.leaves - 2
    longer = [(max(config.depth, _least_depth(leaves)), leaves) for leaves in config.test_leaves]
    deeper = [(depth, config.leaves) for depth in config.test_depths]
    kind, levels = [*_OPERATIONS].index(config.algebra), [(config.depth, config.leaves), *longer, *deeper]
    return DataFacts(
        kind="nested_logic",
        task="nested_logic",
        vocab_size=len(_SIGNS),
        dtype="uint8",
        train_tokens=2 * length * config.rows,
        val_tokens=2 * length * config.held_out,
        positions=length,
        levels=tuple(kind * _LEVEL[0] + depth * _LEVEL[1] + leaves for depth, leaves in levels),
        settings=config.settings(),
        source=f"{config.rows} {config.algebra} expressions of up to {config.leaves} leaves and depth {config.depth}",
    )
