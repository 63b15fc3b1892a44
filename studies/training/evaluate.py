"""How well a trained bundle predicts text it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from builder.exchange.bundle import Bundle, load_bundle
from builder.halting import Halt, told
from builder.schedules import tried_models
from searchspace.disk import open_regular
from searchspace.errors import SpecError
from studies.data.codec import Codec, codec_of_bundle
from studies.data.corpus import find_path, look_at_tokens
from studies.data.dataset import FACTS, Examination
from studies.data.documents import documents
from studies.data.settings import TextData
from studies.tasks.table import decode_data, task_named

_BATCH_TOKENS = 16_384  # logits of 50,000 words take 3 GiB for so many


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean losses over non-overlapping windows; every token but the first of a window is predicted once."""

    tokens: int
    text_bytes: float | None
    loss: float
    """Nats per token."""
    by_position: tuple[float, ...]
    """Nats per token by place in the window: how much longer context helps."""
    halted: Mapping[str, float] = field(default_factory=dict)
    """Iterations and FLOPs of a model that stops where it has come to rest."""

    @property
    def bits_per_byte(self) -> float | None:
        """None where nothing tells how many bytes the tokens stand for."""
        return None if self.text_bytes is None else self.loss * self.tokens / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    bundle: Path,
    data: TextData,
    *,
    most_tokens: int = 1_000_000,
    device: str = "cpu",
    schedules: Sequence[str] = (),
    halt: Halt | None = None,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Score a bundle on all of ``data``.

    Args:
        bundle: folder that export made.
        data: documents, encoded as the bundle says; of ``tokens``, the held-out file, read as the bundle's own.
        most_tokens: looked at, from the start.
        device: where to compute.
        schedules: to run the loops under, as ``h=30``.
        halt: when the loop of most iterations stops; default: as the bundle says.
        tick: told how many windows of how many are done.

    Raises:
        SpecError: if the bundle is damaged, nothing tells what its tokens stand for, or the data is no data of it,
            or shorter than one window.
    """
    loaded = load_bundle(bundle, device=device, schedules=schedules, halt=halt)
    used: list[int] = []
    rows, bytes_per_token = text_rows(bundle, loaded, data, most_tokens)
    windows, length = len(rows), rows.shape[1] - 1
    sums, batch = torch.zeros(length, dtype=torch.float64), max(1, _BATCH_TOKENS // length)
    for first in range(0, windows, batch):
        rows_BL = torch.from_numpy(rows[first : first + batch].astype(np.int64)).to(device)
        with torch.no_grad():
            logits_BLV = loaded.model(rows_BL[:, :-1])
        used += loaded.model.iterations_used
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1).float(), rows_BL[:, 1:].flatten(), reduction="none")
        sums += loss_BL.view(len(rows_BL), length).double().sum(0).cpu()
        tick(min(first + batch, windows), windows)
    count = windows * length
    by_position = tuple((sums / windows).tolist())
    text_bytes = None if bytes_per_token is None else count * bytes_per_token
    halted = {} if loaded.halt is None else told(loaded.arch, loaded.halt, used)
    return Evaluation(count, text_bytes, float(sums.sum()) / count, by_position, halted)


def examine_bundle(
    bundle: Path, *, most_tokens: int, device: str = "cpu", schedules: Sequence[str] = (), halt: Halt | None = None
) -> Examination:
    """Score a bundle on examples that its task makes anew, its loops under other schedules if some are given.

    With ``halt``, the loop of most iterations stops where it has come to rest, and the metrics say how often it ran.

    Raises:
        SpecError: if the bundle is damaged, or its task makes none.
    """
    loaded = load_bundle(bundle, device=device, schedules=schedules, halt=halt)
    facts = loaded.manifest.get("data", {})
    task = task_named(facts.get("task", "text_lm"))
    if task is not None and task.name == "custom":
        what = f"was trained on {facts.get('source', 'an object')}, handed over from Python"
        raise SpecError("", what, "score it there: builder.load_bundle(FOLDER).model", str(bundle))
    if task is not None and task.examine is None and task.name != "text_lm":
        what = f"learned the task {task.name}, which says nothing of how to score it"
        raise SpecError("", what, "do it in Python: builder.load_bundle(FOLDER).model", str(bundle))
    if task is None or task.examine is None:
        raise SpecError("--data", "is missing: this model's task makes no examples", "give text to score it on")
    given = facts.get("settings") or loaded.manifest.get("data_settings", {})  # the first with paths as they were found
    settings = decode_data(given, "data_settings")
    if loaded.halt is None:
        return task.examine(loaded.model, settings, most_tokens, tried_models(loaded.model, loaded.arch))
    used: list[int] = []
    loaded.model.register_forward_hook(lambda *_: used.extend(loaded.model.iterations_used))
    found = task.examine(loaded.model, settings, most_tokens, {})
    return replace(found, metrics={**found.metrics, **told(loaded.arch, loaded.halt, used)})


def text_rows(folder: Path, bundle: Bundle, data: TextData, most_tokens: int) -> tuple[NDArray[Any], float | None]:
    """Text as a bundle reads it: windows of its length and the token after each, and bytes of text per token if known.

    Args:
        folder: of the bundle.
        bundle: loaded.
        data: documents, encoded as the bundle says; of ``tokens``, the held-out file, read as the bundle's own.
        most_tokens: looked at, from the start.

    Raises:
        SpecError: if nothing tells what its tokens stand for, or the data is no data of it, or shorter than one window.
    """
    if data.kind == "tokens":
        tokens, bytes_per_token = _token_file(folder, bundle, data, most_tokens)
    else:
        codec = codec_of_bundle(folder, bundle)
        try:
            tokens, bytes_per_token = _encoded(codec, data, most_tokens)
        except SpecError as error:
            error.path = "--data" if error.path in ("data", "data.path") else error.path
            raise
    if tokens.size and int(tokens.max()) >= bundle.arch.vocab_size:
        what = f"token {int(tokens.max())} is beyond the model's {bundle.arch.vocab_size}"
        raise SpecError("--data", what, "encode it as the model's training data was")
    length = min(bundle.arch.seq_len, tokens.size - 1)
    if length < 2:
        raise SpecError("--data", f"has {tokens.size} tokens", "give more text")
    # One token of a window is the target of the one before.
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length], bytes_per_token


def _encoded(codec: Codec, data: TextData, most: int) -> tuple[np.ndarray, float]:
    found: list[int] = []
    text_bytes = 0
    for document in documents(data):
        if found and not document.continues:
            found += codec.separator
        found += codec.encode(document.text)
        text_bytes += len(document.text)
        if len(found) > most:
            break
    return np.array(found[: most + 1], dtype=np.int64), text_bytes / max(len(found), 1)


def _token_file(folder: Path, bundle: Bundle, data: TextData, most: int) -> tuple[np.ndarray, float | None]:
    """Held-out tokens; what the folder does not say of them, the bundle's own data do."""
    own = bundle.manifest.get("data", {})
    if not isinstance(data.path, str):
        raise SpecError("--data", "token files need one folder", "give a folder with val.bin")
    source = find_path(data.path, Path())
    vocab_size = bundle.arch.vocab_size
    dtype = own.get("dtype")
    if dtype not in ("uint8", "uint16", "uint32"):
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    given = own.get("bytes_per_token") if own.get("says_bytes", True) else None
    known = given if isinstance(given, int | float) and math.isfinite(given) and given > 0 else None
    if (source / FACTS).is_file():
        known = None  # it says so itself
    config = replace(data, vocab_size=vocab_size, dtype=dtype, bytes_per_token=known)
    facts = look_at_tokens(source, config, ("val.bin",), folder)
    with open_regular(source / "val.bin") as file:
        tokens = np.fromfile(file, facts.dtype, count=most + 1)
    return tokens.astype(np.int64), facts.bytes_per_token if facts.says_bytes else None


def position_bins(by_position: tuple[float, ...]) -> list[tuple[str, float]]:
    """Means over positions 1, 2-3, 4-7, ...: doubling context."""
    rows, first = [], 0
    while first < len(by_position):
        last = min(2 * first + 1, len(by_position))
        part = by_position[first:last]
        rows.append((f"{first + 1}" if len(part) == 1 else f"{first + 1}-{last}", sum(part) / len(part)))
        first = last
    return rows
