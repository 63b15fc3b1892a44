"""Real text as arrays of tokens: prepared once for a study, memory-mapped by every trial.

A batch is a function of (seed, step) alone, so a resumed trial sees what it would have seen.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchspace.errors import SpecError, show
from studies.config import DataConfig

_SEPARATOR = b"\n\x00\n"
_FACTS = "corpus.json"


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What a prepared corpus is; kept beside its arrays."""

    kind: str
    vocab_size: int
    bytes_per_token: float
    dtype: str
    train_tokens: int
    val_tokens: int
    source: str
    """What it was made from, for records."""
    digest: str
    """Of the settings it was made with."""


class Corpus:
    """Training and held-out tokens of a prepared folder, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = CorpusFacts(**json.loads((self.folder / _FACTS).read_text(encoding="utf-8")))
        self._train = self._map("train")
        self._val = self._map("val")

    def _map(self, part: str) -> NDArray[Any]:
        return np.memmap(self.folder / f"{part}.bin", dtype=self.facts.dtype, mode="r")

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one training step, each (B, L) of int64."""
        self._check_length(self._train, seq_len)
        draw = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = draw.integers(0, len(self._train) - seq_len, size=batch_size)
        return _windows(self._train, starts, seq_len)

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same held-out windows every time, evenly spaced, at least one, in batches of one size."""
        self._check_length(self._val, seq_len)
        count = max(1, min(tokens, len(self._val)) // seq_len)
        batch_size = min(batch_size, count)
        count -= count % batch_size
        starts = np.linspace(0, len(self._val) - seq_len - 1, count).astype(np.int64)
        for i in range(0, count, batch_size):
            yield _windows(self._val, starts[i : i + batch_size], seq_len)

    def _check_length(self, tokens: NDArray[Any], seq_len: int) -> None:
        if len(tokens) <= seq_len:
            raise SpecError(
                "data",
                f"has {len(tokens)} tokens, fewer than one sequence of {seq_len}",
                "give more text, or lower seq_len",
            )

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token to bits per byte of text."""
        return loss / math.log(2) / self.facts.bytes_per_token


def prepare_corpus(config: DataConfig, folder: str | Path) -> Corpus:
    """Write the arrays of ``config`` under ``folder``, once; from then on they are the data, whatever the sources do.

    Raises:
        SpecError: if there is nothing to read, or the folder holds data of other settings.
    """
    folder = Path(folder)
    digest = hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()
    if (folder / _FACTS).is_file():
        corpus = Corpus(folder)
        if corpus.facts.digest != digest:
            raise SpecError("data", "differs from the data prepared here", "use another folder", file=str(folder))
        return corpus
    files = list(source_files(config))
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make = _link_tokens if config.kind == "tokens" else _write_bytes
        facts = make(config, files, work, digest)
        if not facts.train_tokens or not facts.val_tokens:
            raise SpecError("data", "leaves nothing to train on or to hold out", "give more files, or another held_out")
        (work / _FACTS).write_text(json.dumps(asdict(facts), indent=2), encoding="utf-8")
        work.replace(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Corpus(folder)


def decode_bytes(tokens: list[int]) -> str:
    """Byte tokens as text."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


def encode_bytes(text: str) -> list[int]:
    """Text as byte tokens."""
    return list(text.encode("utf-8"))


def _windows(tokens: NDArray[Any], starts: NDArray[Any], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    window = torch.from_numpy(rows)
    return window[:, :-1], window[:, 1:]


def source_files(config: DataConfig) -> Iterator[Path]:
    """The files that ``config`` names, in a stable order."""
    if config.kind == "python_source":
        root = Path(sysconfig.get_path("stdlib"))
        yield from (p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and p.stat().st_size)
        return
    if config.path is None:
        raise SpecError("data.path", f"data of kind {config.kind} needs a path", "give a file, folder or glob")
    if config.kind == "tokens":
        folder = Path(config.path if isinstance(config.path, str) else config.path[0])
        for part in ("train.bin", "val.bin"):
            if not (folder / part).is_file():
                raise SpecError(
                    "data.path",
                    f"there is no {part} in {show(str(folder))}",
                    "give a folder with train.bin and val.bin",
                )
            yield folder / part
        return
    found = 0
    for pattern in (config.path,) if isinstance(config.path, str) else config.path:
        path = Path(pattern)
        matches = sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        for match in matches:
            if match.is_file() and match.stat().st_size:
                found += 1
                yield match
    if not found:
        raise SpecError("data.path", f"no file matches {show(config.path)}", "give files, folders or globs that exist")


def _is_held_out(name: str, share: float) -> bool:
    """By a hash of the name, so that adding files moves none from one side to the other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def _write_bytes(config: DataConfig, files: list[Path], folder: Path, digest: str) -> CorpusFacts:
    library = Path(sysconfig.get_path("stdlib"))
    root = library if config.kind == "python_source" else Path(os.path.commonpath(files)) if len(files) > 1 else None
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    if len(files) == 1:  # one file: its end is held out
        text = files[0].read_bytes()
        border = int(len(text) * (1 - config.held_out))
        parts = {False: [text[:border]], True: [text[border:]]}
    else:
        for file in files:
            name = str(file.relative_to(root)) if root else file.name
            parts[_is_held_out(name, config.held_out)].append(file.read_bytes())
        for side in (True, False):  # few files may all hash to one side
            if not parts[side]:
                parts[side].append(parts[not side].pop())
    arrays = {part: _SEPARATOR.join(texts) for part, texts in (("train", parts[False]), ("val", parts[True]))}
    for part, data in arrays.items():
        (folder / f"{part}.bin").write_bytes(data)
    source = "standard library of this Python" if root == library else show(config.path)
    return CorpusFacts(
        kind=config.kind,
        vocab_size=256,
        bytes_per_token=1.0,
        dtype="uint8",
        train_tokens=len(arrays["train"]),
        val_tokens=len(arrays["val"]),
        source=f"{source}, {len(files)} files",
        digest=digest,
    )


def _link_tokens(config: DataConfig, files: list[Path], folder: Path, digest: str) -> CorpusFacts:
    sizes = []
    for file in files:
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
        sizes.append(file.stat().st_size // np.dtype(config.dtype).itemsize)
    if config.vocab_size is None:
        raise SpecError("data.vocab_size", "token files do not say how large their vocabulary is", "give vocab_size")
    return CorpusFacts(
        kind="tokens",
        vocab_size=config.vocab_size,
        bytes_per_token=config.bytes_per_token or 1.0,
        dtype=config.dtype,
        train_tokens=sizes[0],
        val_tokens=sizes[1],
        source=show(config.path),
        digest=digest,
    )
