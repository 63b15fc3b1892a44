"""A plugin in one file: a pool with weights, a topology, a feed-forward, a metric and a task.

spiralformer verify --plugin examples/plugins/blend.py
spiralformer search examples/plugins/digits.yaml --plugin examples/plugins/blend.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builder import Loop, Value, feed_forward, pool, topology
from searchspace import Plugin, key, table
from spiralformer.feedforward import GatedFeedForward
from spiralformer.pooling import Pool, mean_of_members
from studies import AddedMetric, DataConfig, DataFacts, Headline, Metric, Pairs, Task, prepare_pairs

# -- a pool: its class, made with (chunk, offset, d_model) because it says width=True -----------------


class BlendPool(Pool):
    """A linear map of a chunk's mean and of its largest values, side by side."""

    def __init__(self, chunk: int, offset: int, d_model: int) -> None:
        super().__init__(chunk, offset)
        self.mix = nn.Linear(2 * d_model, d_model, bias=False)

    def reduce(self, *chunks: Tensor, missing: int) -> Tensor:
        return self.mix(
            torch.cat((mean_of_members(chunks[0], missing), largest_of_members(chunks[0], missing)), dim=-1)
        )


def largest_of_members(x_BMGD: Tensor, missing: int) -> Tensor:
    """Maximum over G; the first chunk lacks its first ``missing`` members."""
    is_first_M = torch.arange(x_BMGD.shape[1], device=x_BMGD.device) == 0
    absent_G = torch.arange(x_BMGD.shape[2], device=x_BMGD.device) < missing
    return x_BMGD.masked_fill((is_first_M[:, None] & absent_G)[..., None], -torch.inf).amax(dim=2)


# -- a feed-forward, made with (d_model, hidden, bias) -------------------------------------------------


class ReluGated(GatedFeedForward):
    """ReGLU (arXiv 2002.05202): relu(gate) * up, then out."""

    def activate(self, gate_BLF: Tensor) -> Tensor:
        return F.relu(gate_BLF)


# -- a topology: how a loop is written out --------------------------------------------------------------


def dense(loop: Loop) -> Value:
    """Each state is a learned weighted sum of the loop's input and all updates so far (arXiv 2402.02622)."""
    state, updates = loop.start, []
    for t in loop.iterations:
        updates.append(loop.iterate(t, state))
        terms, factors = [loop.start, *updates], [1.0, *[1.0 / len(updates)] * len(updates)]
        joined = loop.to.weighted(f"{loop.name}.t{t}.join", terms, factors, learned=True, key=loop.key)
        state = loop.normalise(t, joined)
    return state


# -- a metric of the task that is there already ---------------------------------------------------------


def top5(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """How often the next token is among the five likeliest."""
    found_BL = (logits_BLV.topk(5).indices == targets_BL[..., None]).any(-1)
    asked_BL = targets_BL != -100
    return (found_BL & asked_BL).sum() / asked_BL.sum()


# -- a task: its settings, its data, and what is measured on them ------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsData(DataConfig):
    """Rows of digits, made as they are asked for."""

    kind: Literal["digits"] = key("Source: digits.", default="digits")
    length: int = key("Digits in a row.", default=24, low=2, high=999)
    rows: int = key("Of them to train on.", default=2000, low=16, high=10_000_000)


class Digits(Pairs):
    """A row of digits, and the same backwards."""

    metrics = table(
        "a metric",
        (
            Metric("right", "right", "share of held-out digits that are right", better="higher"),
            Metric("loss", "nats/digit", "held-out loss, nats per digit", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["right"], -1.0)

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        right = (logits_BLV.argmax(-1) == targets_BL).float().mean()
        return {"right": right, "loss": self.loss(logits_BLV, targets_BL)}


def facts_of(config: DigitsData) -> DataFacts:
    """What the data are, told before they are made."""
    return DataFacts(
        kind="digits",
        task="digits",
        vocab_size=10,
        dtype="uint8",
        positions=config.length,
        train_tokens=2 * config.rows * config.length,
        val_tokens=400 * config.length,
        source=f"{config.rows} rows of {config.length} digits",
    )


def prepare(config: DigitsData, folder, base) -> Digits:
    """Written once under the folder; from then on they are the data."""

    def make(part: str):
        count, seed = (config.rows, 0) if part == "train" else (200, 1)
        digits = np.random.default_rng(seed).integers(0, 10, (count, config.length))
        return np.concatenate((digits, digits[:, ::-1]), axis=1)

    return prepare_pairs(Digits, config, facts_of(config), folder, make)


PLUGIN = Plugin(
    name="blend",
    version="1.0",
    api=1,
    rows=(
        pool(
            "blend",
            BlendPool,
            width=True,
            params=lambda chunk, d: 2 * d * d,
            at_latent=lambda chunk, d: 2 * d * d,
            init="small",
        ),
        feed_forward("reglu", ReluGated, hidden=lambda d: 8 * d // 3, maps_in=2),
        topology("dense", dense),
        AddedMetric("top5", "top 5", "share of next tokens among the five likeliest", "higher", "text_lm", top5),
        Task(
            "digits",
            "writes digits backwards",
            causal=False,
            kinds=("digits",),
            config=DigitsData,
            dataset=Digits,
            prepare=prepare,
            examine=None,
            look=lambda config, base, prepare: facts_of(config),
        ),
    ),
)
