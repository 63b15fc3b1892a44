"""Real text as arrays of tokens: prepared once for a study, memory-mapped by every trial.

A batch is a function of (seed, step) alone, so a resumed trial sees what it would have seen.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
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
from studies.documents import documents
from studies.text import TOKENIZER, Bytes, Codec, codec_of

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

    @property
    def codec(self) -> Codec:
        """What its tokens stand for."""
        return codec_of(self.folder)

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token to bits per byte of text."""
        return loss / math.log(2) / self.facts.bytes_per_token


def prepare_corpus(config: DataConfig, folder: str | Path) -> Corpus:
    """Write the arrays of ``config`` under ``folder``, once; from then on they are the data, whatever the sources do.

    Raises:
        SpecError: if there is nothing to read, or the folder holds data of other settings.
    """
    folder = Path(folder)
    given = {name: value for name, value in asdict(config).items() if value != getattr(DataConfig(), name)}
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()
    if (folder / _FACTS).is_file():
        corpus = Corpus(folder)
        if corpus.facts.digest != digest:
            raise SpecError("data", "differs from the data prepared here", "use another folder", file=str(folder))
        return corpus
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make = _link_tokens if config.kind == "tokens" else _write_tokens
        facts = make(config, work, digest)
        if not facts.train_tokens or not facts.val_tokens:
            raise SpecError("data", "leaves nothing to train on or to hold out", "give more files, or another held_out")
        (work / _FACTS).write_text(json.dumps(asdict(facts), indent=2), encoding="utf-8")
        work.replace(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Corpus(folder)


def _windows(tokens: NDArray[Any], starts: NDArray[Any], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    window = torch.from_numpy(rows)
    return window[:, :-1], window[:, 1:]


def _is_held_out(name: str, share: float) -> bool:
    """By a hash of the name, so that adding documents moves none from one side to the other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def _write_tokens(config: DataConfig, folder: Path, digest: str) -> CorpusFacts:
    """Documents as they come, so that any number of them fits in memory."""
    if config.tokenizer is not None:
        shutil.copyfile(_tokenizer_file(config.tokenizer), folder / TOKENIZER)
    codec = codec_of(folder)
    dtype = np.dtype("uint8" if codec.vocab_size <= 1 << 8 else "uint16" if codec.vocab_size <= 1 << 16 else "uint32")
    separator = np.array(codec.separator, dtype)
    tokens, text_bytes, count = {False: 0, True: 0}, 0, 0
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        for document in documents(config):
            held_out = document.held_out
            if held_out is None:
                held_out = _is_held_out(document.name, config.held_out)
            raw = isinstance(codec, Bytes)
            ids = np.frombuffer(document.text, dtype) if raw else np.array(codec.encode(document.text), dtype)
            file = val if held_out else train
            if tokens[held_out]:
                file.write(separator.tobytes())
                tokens[held_out] += len(separator)
            file.write(ids.tobytes())
            tokens[held_out] += len(ids)
            text_bytes += len(document.text)
            count += 1
    if count and not (tokens[True] and tokens[False]):  # one document, or few: the end is held out
        tokens = _split_end(folder, sum(tokens.values()), config.held_out, dtype.itemsize)
    total = tokens[False] + tokens[True]
    source = "standard library of this Python" if config.kind == "python_source" else show(config.path)
    return CorpusFacts(
        kind=config.kind,
        vocab_size=codec.vocab_size,
        bytes_per_token=1.0 if isinstance(codec, Bytes) else text_bytes / max(total, 1),
        dtype=dtype.name,
        train_tokens=tokens[False],
        val_tokens=tokens[True],
        source=f"{source}, {count} {'files' if config.kind in ('python_source', 'text') else 'documents'}",
        digest=digest,
    )


def _split_end(folder: Path, total: int, share: float, itemsize: int) -> dict[bool, int]:
    """Move the end of what was written to the held-out side."""
    train, val = folder / "train.bin", folder / "val.bin"
    if not train.stat().st_size:
        val.replace(train)
    border = int(total * (1 - share))
    with train.open("r+b") as file, val.open("wb") as end:
        file.seek(border * itemsize)
        shutil.copyfileobj(file, end)
        file.truncate(border * itemsize)
    return {False: border, True: total - border}


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    return path / TOKENIZER if path.is_dir() else path


def _link_tokens(config: DataConfig, folder: Path, digest: str) -> CorpusFacts:
    """Token files of somebody's own, or of ``spiralformer tokenize``, which says what they are."""
    if config.path is None:
        raise SpecError("data.path", "data of kind tokens needs a path", "give a folder with train.bin and val.bin")
    source = Path(config.path if isinstance(config.path, str) else config.path[0])
    known: dict[str, Any] = {}
    if (source / _FACTS).is_file():
        known = json.loads((source / _FACTS).read_text(encoding="utf-8"))
    dtype = str(known.get("dtype", config.dtype))
    sizes = []
    for name in ("train.bin", "val.bin"):
        if not (source / name).is_file():
            what = f"there is no {name} in {show(str(source))}"
            raise SpecError("data.path", what, "give a folder with train.bin and val.bin")
        (folder / name).symlink_to((source / name).resolve())
        sizes.append((source / name).stat().st_size // np.dtype(dtype).itemsize)
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    vocab_size = config.vocab_size or known.get("vocab_size")
    if vocab_size is None:
        raise SpecError("data.vocab_size", "token files do not say how large their vocabulary is", "give vocab_size")
    return CorpusFacts(
        kind=str(known.get("kind", "tokens")),
        vocab_size=vocab_size,
        bytes_per_token=config.bytes_per_token or known.get("bytes_per_token", 1.0),
        dtype=dtype,
        train_tokens=sizes[0],
        val_tokens=sizes[1],
        source=show(config.path),
        digest=digest,
    )
