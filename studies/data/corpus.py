"""Real text as arrays of tokens: prepared once for a study, memory-mapped by every trial.

A batch is a function of (seed, step) alone, so a resumed trial sees what it would have seen.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchspace.disk import open_regular, write_file
from searchspace.errors import SpecError, show
from searchspace.tables import table
from studies.data.codec import TOKENIZER, Bytes, Codec, TextForm, Tokenizer, codec_of, read_tokenizer
from studies.data.dataset import FACTS, PARTS, DataFacts, Dataset, Headline, Metric, prepare_once, read_facts
from studies.data.documents import Document, documents, source_files
from studies.data.settings import TextData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_SCANNED, _LOOKED_AT = 1 << 24, 1 << 16  # tokens in memory at once; bytes from which much is told
_PROMPT, _SHOWN, _TEMPERATURE = b"def ", 160, 0.7  # of the text that a finished model shows
_PREPARED_BYTES = 64 * 2**20
"""Text that is counted to tell what a study would do; more is taken for plenty."""
_PLENTY = 1 << 48  # more than any budget trains on
_FORMATS = {b"\x93NUMPY": "a .npy file", b"PK\x03\x04": "a zip or .npz file", b"\x1f\x8b": "compressed",
            (20240520).to_bytes(4, "little"): "a .bin file with the header of llm.c"}  # fmt: skip


class Corpus(Dataset):
    """Training and held-out tokens of text; a model learns to predict the next one."""

    metrics = table(
        "a metric",
        (
            Metric("bits_per_byte", "bits/byte", "held-out bits per byte", better="lower"),
            Metric("loss", "nats/token", "held-out loss, nats per token", better="lower"),
        ),
    )

    @property
    def headline(self) -> Headline:
        return Headline(self.metrics["bits_per_byte"], 1 / math.log(2) / self.facts.bytes_per_token)

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, each (B, L) of int64."""
        import numpy as np

        self._check_length(self.train, seq_len)
        draw = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = draw.integers(0, len(self.train) - seq_len, size=batch_size)
        return _windows(self.train, starts, seq_len)

    def eval_batches(self, tokens: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same held-out windows every time, evenly spaced, at least one, in batches of one size."""
        import numpy as np

        self._check_length(self.val, seq_len)
        count = max(1, min(tokens, len(self.val)) // seq_len)
        batch_size = min(batch_size, count)
        count -= count % batch_size
        starts = np.linspace(0, len(self.val) - seq_len - 1, count).astype(np.int64)
        for i in range(0, count, batch_size):
            yield _windows(self.val, starts[i : i + batch_size], seq_len)

    def _check_length(self, tokens: NDArray[Any], seq_len: int) -> None:
        if len(tokens) <= seq_len:
            raise SpecError(
                "data",
                f"has {len(tokens)} tokens, fewer than one sequence of {seq_len}",
                "give more text, or lower seq_len",
            )

    def loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())

    def measure(self, logits_BLV: Tensor, targets_BL: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(logits_BLV, targets_BL)}

    def result(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"bits_per_byte": self.headline.value(means["loss"]), "loss": means["loss"]}

    def score(self, metrics: Mapping[str, float]) -> float:
        return metrics["loss"]  # what bits per byte are computed from, to the last bit

    def show(self, model: Any, seed: int = 0) -> tuple[str, str]:
        import torch

        ids = self.codec.encode(_PROMPT)
        out = model.generate(torch.tensor([ids]), _SHOWN, temperature=_TEMPERATURE, seed=seed)
        return f"a sample at temperature {_TEMPERATURE}:", self.codec.decode(out[0].tolist())

    @property
    def codec(self) -> Codec:
        """What its tokens stand for."""
        return codec_of(self.folder, self.facts.text)


def prepare_corpus(config: TextData, folder: str | Path, base: Path = Path()) -> Corpus:
    """Write the arrays of ``config`` under ``folder``, once; from then on they are the data, whatever the sources do.

    Args:
        config: what to read.
        folder: where to.
        base: where relative paths of ``config`` begin, before the working folder.

    Raises:
        SpecError: if there is nothing to read, or the folder holds other data, or something else.
    """

    def write(work: Path) -> DataFacts:
        facts = (_link_tokens if config.kind == "tokens" else _write_tokens)(config, work, base)
        if not facts.train_tokens or not facts.val_tokens:
            raise SpecError("data", "leaves nothing to train on or to hold out", "give more files, or another held_out")
        return facts

    return prepare_once(Corpus, config, Path(folder), write)


def _windows(tokens: NDArray[Any], starts: NDArray[Any], seq_len: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch  # who only reads results needs no torch

    rows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    window = torch.from_numpy(rows)
    return window[:, :-1], window[:, 1:]


def _is_held_out(name: str, share: float) -> bool:
    """By a hash of the name, so that adding documents moves none from one side to the other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def _write_tokens(config: TextData, folder: Path, base: Path) -> DataFacts:
    """Documents as they come, so that any number of them fits in memory."""
    import numpy as np

    if config.tokenizer is not None:
        write_file(folder / TOKENIZER, read_tokenizer(find_path(config.tokenizer, base)))
    text: TextForm = "bytes" if config.tokenizer is None else "tokenizer"
    codec = codec_of(folder, text)
    dtype = _dtype_for(codec.vocab_size)
    separator = np.array(codec.separator, dtype)
    losses = _TextLoss()
    tokens, text_bytes, count = {False: 0, True: 0}, 0, 0
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        for document in documents(config, base):
            held_out = document.held_out
            if held_out is None:
                held_out = _is_held_out(document.name, config.held_out)
            raw = isinstance(codec, Bytes)
            ids = np.frombuffer(document.text, dtype) if raw else np.array(codec.encode(document.text), dtype)
            losses.look(document, codec, ids)
            file = val if held_out else train
            if tokens[held_out] and not document.continues:
                file.write(separator.tobytes())
                tokens[held_out] += len(separator)
            file.write(ids.tobytes())
            tokens[held_out] += len(ids)
            text_bytes += len(document.text)
            count += not document.continues
    if count and not (tokens[True] and tokens[False]):  # one document, or few: the end is held out
        tokens = _split_end(folder, sum(tokens.values()), config.held_out, dtype.itemsize)
    total = tokens[False] + tokens[True]
    source = "standard library of this Python" if config.kind == "python_source" else show(config.path)
    files = config.kind in ("python_source", "text")
    notes = list(losses.notes()) if config.kind != "python_source" else []
    if config.kind == "text" and config.max_bytes and count < (known := len(source_files(config, base))):
        notes.append(f"data.max_bytes takes the first {count} of {known} files, by name")
    return DataFacts(
        kind=config.kind,
        vocab_size=codec.vocab_size,
        bytes_per_token=1.0 if isinstance(codec, Bytes) else max(text_bytes / max(total, 1), 1e-3),
        dtype=dtype.name,
        train_tokens=tokens[False],
        val_tokens=tokens[True],
        text=text,
        source=f"{source}, {count} {'files' if files else 'documents'}",
        notes=tuple(notes),
    )


class _TextLoss:
    """Notices what is no text, and what a tokenizer leaves out."""

    def __init__(self) -> None:
        self._seen, self._broken, self._given, self._kept = 0, 0, 0, 0

    def look(self, document: Document, codec: Codec, ids: NDArray[Any]) -> None:
        if document.continues:
            return
        self._seen += 1
        try:
            text = document.text[:_LOOKED_AT].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(document.text[:_LOOKED_AT]) - 4:  # a character may be cut at the end
                self._broken += 1
            return
        if not isinstance(codec, Bytes) and self._given < _LOOKED_AT:
            piece = ids[: max(1, len(ids) * len(text.encode()) // len(document.text))]
            self._given += len(text)
            self._kept += len(codec.decode([token for token in piece.tolist() if token != codec.unknown]))

    def notes(self) -> tuple[str, ...]:
        found = []
        if self._broken:
            found.append(f"{self._broken} of {self._seen} files or documents are not UTF-8 text")
        if self._given and self._kept < 0.9 * self._given:
            lost = 1 - self._kept / self._given
            found.append(f"the tokenizer leaves out about {lost:.0%} of the text: bits per byte are too low by that")
        return tuple(found)


def _dtype_for(vocab_size: int) -> np.dtype[Any]:
    import numpy as np

    return np.dtype("uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32")


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


def find_path(name: str, base: Path) -> Path:
    """A file or folder named in a study: beside its file, or else in the working folder; ``~`` is one's home."""
    home = Path(os.path.expanduser(name))
    return base / home if (base / home).exists() else home


def token_folder(config: TextData, base: Path) -> Path:
    """The folder of token files that ``config`` names. Raises `SpecError` if it names none, or several."""
    if not isinstance(config.path, str):
        raise SpecError("data.path", "data of kind tokens needs one path", "give a folder with train.bin and val.bin")
    return find_path(config.path, base)


def _link_tokens(config: TextData, folder: Path, base: Path) -> DataFacts:
    """Token files of somebody's own, or of ``spiralformer tokenize``, which says what they are."""
    source = token_folder(config, base)
    found = look_at_tokens(source, config)
    for name in PARTS:
        (folder / name).symlink_to((source / name).resolve())
    if found.text == "tokenizer":
        write_file(folder / TOKENIZER, read_tokenizer(source))
    return found


def look_at_tokens(
    source: Path, config: TextData, parts: Sequence[str] = PARTS, codec_in: Path | None = None
) -> DataFacts:
    """What a folder of token files holds, looked through once.

    Args:
        source: the folder.
        config: what it does not say itself.
        parts: files to look at.
        codec_in: where a tokenizer.json may lie too.

    Raises:
        SpecError: if a file is missing, of another format, or holds an id beyond the vocabulary.
    """
    import numpy as np

    for part in parts:
        if not (source / part).is_file():
            what = f"there is no {part} in {show(str(source))}"
            raise SpecError("data.path", what, "give a folder with train.bin and val.bin")
    known = read_facts(source) if (source / FACTS).is_file() else None
    name = known.dtype if known is not None else config.dtype
    vocab_size = config.vocab_size or (known.vocab_size if known is not None else None)
    text: TextForm = "tokenizer" if (source / TOKENIZER).is_file() else known.text if known is not None else "none"
    codec = codec_of(source, text) if text != "none" else None
    if codec is None and codec_in is not None and (codec_in / TOKENIZER).is_file():
        codec = codec_of(codec_in, "tokenizer")
    if vocab_size is None and codec is not None:
        vocab_size = codec.vocab_size
    if vocab_size is None:
        raise SpecError("data.vocab_size", "token files do not say how large their vocabulary is", "give vocab_size")
    notes: list[str] = []
    counts = {part: _look_through(source / part, np.dtype(name), vocab_size, notes) for part in parts}
    bytes_per_token = config.bytes_per_token
    if bytes_per_token is None and known is not None and known.says_bytes:
        bytes_per_token = known.bytes_per_token
    if bytes_per_token is None and codec is not None:
        bytes_per_token = _bytes_per_token(source / parts[-1], np.dtype(name), codec)
    if bytes_per_token is None:
        notes.append(
            "the token files do not say how many bytes a token stands for: what is called bits per byte is bits per "
            "token; give data.bytes_per_token"
        )
    return DataFacts(
        kind=known.kind if known is not None else "tokens",
        vocab_size=vocab_size,
        bytes_per_token=bytes_per_token or 1.0,
        dtype=name,
        train_tokens=counts.get("train.bin", 0),
        val_tokens=counts.get("val.bin", 0),
        text=text,
        says_bytes=bytes_per_token is not None,
        source=show(config.path),
        notes=(*(known.notes if known is not None else ()), *notes),
    )


def _look_through(file: Path, dtype: np.dtype[Any], vocab_size: int, notes: list[str]) -> int:
    """The number of tokens in a file. Raises `SpecError` if they are none of this vocabulary."""
    import numpy as np

    with open_regular(file) as opened:
        size, head = os.fstat(opened.fileno()).st_size, opened.read(1024)
        for mark, what in _FORMATS.items():
            if head.startswith(mark):
                raise SpecError("data.path", f"is {what}", "write the bare token ids: array.tofile(file)", str(file))
        if size % dtype.itemsize:
            what = f"has {size:,} bytes, no multiple of the {dtype.itemsize} of {dtype.name}"
            raise SpecError("data.dtype", what, "give the dtype it was written with", str(file))
        count = size // dtype.itemsize
        if not count:
            raise SpecError("data.path", "is empty", "give token ids", str(file))
        tokens = np.memmap(opened, dtype=dtype, mode="r")
    odd_zero, even_zero = True, True
    for start in range(0, count, _SCANNED):
        block = tokens[start : start + _SCANNED]
        if (largest := int(block.max())) >= vocab_size:
            where = start + int(block.argmax())
            what = f"holds id {largest} at token {where:,}, the vocabulary has {vocab_size}"
            remedy = (
                f"give vocab_size {largest + 1} or more, or the dtype it was written with ({dtype.name} is assumed)"
            )
            raise SpecError("data.vocab_size", what, remedy, str(file))
        odd_zero = odd_zero and not block[1::2].any()
        even_zero = even_zero and not block[::2].any()
    if odd_zero and not even_zero and count > 3:
        notes.append(
            f"every second token of {file.name} is 0: was it written with a wider dtype than {dtype.name} (data.dtype)?"
        )
    return int(count)


def _bytes_per_token(file: Path, dtype: np.dtype[Any], codec: Codec) -> float:
    """Of the first tokens of a file, as their tokenizer writes them."""
    import numpy as np

    tokens = np.fromfile(file, dtype, count=_LOOKED_AT)
    return max(len(codec.decode(tokens.tolist()).encode()) / max(1, len(tokens)), 1e-3)


def look_at_text(config: TextData, base: Path, *, prepare: bool = True) -> DataFacts:
    """Facts of text, with nothing left behind; where they can't be told, there is plenty of it.

    Args:
        config: what to read.
        base: where relative paths begin.
        prepare: count the tokens too, where that takes seconds.

    Raises:
        SpecError: if there is none, or it is no data of its kind.
    """
    if config.kind == "tokens":
        return look_at_tokens(token_folder(config, base), config)
    files = source_files(config, base)
    if prepare and config.kind != "hf" and sum(file.stat().st_size for file in files) <= _PREPARED_BYTES:
        few = replace(config, max_bytes=min(config.max_bytes or _PREPARED_BYTES, _PREPARED_BYTES))
        with tempfile.TemporaryDirectory() as scratch:
            return prepare_corpus(few, Path(scratch) / "data", base).facts
    codec = None if config.tokenizer is None else Tokenizer(find_path(config.tokenizer, base))
    return DataFacts(
        kind=config.kind,
        vocab_size=256 if codec is None else codec.vocab_size,
        dtype="uint32",
        train_tokens=_PLENTY,
        val_tokens=_PLENTY,
        text="bytes" if codec is None else "tokenizer",
        source=str(config.path),
    )
