"""Text to tokens and back: bytes, or a ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from searchspace.disk import read_bytes
from searchspace.errors import SpecError, show

if TYPE_CHECKING:
    from builder.exchange.bundle import Bundle

TextForm: TypeAlias = Literal["bytes", "tokenizer", "none"]
"""What tokens stand for: bytes, what a tokenizer.json beside them says, or nobody knows."""

TOKENIZER = "tokenizer.json"
_MOST_BYTES, _MOST_TOKENS = 256 * 2**20, 1 << 24  # the largest tokenizers in use have 20 MiB and a million tokens
_BYTE_SEPARATOR = b"\n\x00\n"
_NOTHING = "<0x00>"
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", _NOTHING)
"""Special tokens that end a document, by the names they have in common tokenizers."""


class Codec(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    separator: list[int]
    """Between documents."""
    unknown: int | None
    """Stands for text that the vocabulary lacks."""

    def encode(self, text: bytes) -> list[int]:
        """UTF-8 text as token ids."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text; what is no text becomes a replacement character."""


class Bytes:
    """Every byte a token."""

    def __init__(self) -> None:
        self.vocab_size, self.separator = 256, list(_BYTE_SEPARATOR)
        self.unknown: int | None = None

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class Tokenizer:
    """A file of the library ``tokenizers``.

    Args:
        file: ``tokenizer.json``, or a folder with one.

    Raises:
        SpecError: if it can't be read, or the library is missing.
    """

    def __init__(self, file: Path) -> None:
        try:
            tokenizers = import_module("tokenizers")
        except ImportError as error:
            raise SpecError("data.tokenizer", "needs tokenizers", "pip install 'spiralformer[hf]'") from error
        text = read_tokenizer(file)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(text)
            # What belongs to the batches of whoever saved it, not to the text: it would be lost, or told by chance.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None):
                self._tokenizer.model.dropout = None
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._tokenizer.encode("a 0\u2603\n", add_special_tokens=False)  # some can't, whatever they load
        except BaseException as error:  # the library panics with what is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"is no tokenizer: {show(reason, 120)}"
            raise SpecError("data.tokenizer", what, "give a tokenizer.json", str(file)) from error
        self.vocab_size = max(ids, default=-1) + 1  # ids may have holes
        if not 1 <= self.vocab_size <= _MOST_TOKENS:
            what = f"has ids up to {self.vocab_size - 1:,}" if self.vocab_size else "has an empty vocabulary"
            raise SpecError("data.tokenizer", what, f"give one of up to {_MOST_TOKENS:,} tokens", str(file))
        end = next((i for name in ENDS if (i := self._tokenizer.token_to_id(name)) is not None), None)
        self.separator = [] if end is None else [end]
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown = self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None

    def encode(self, text: bytes) -> list[int]:
        found: list[int] = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer.json, given as such or by the folder that holds it. Raises `SpecError`."""
    return read_bytes(path / TOKENIZER if path.is_dir() else path, _MOST_BYTES)


def codec_of(folder: Path, text: TextForm) -> Codec:
    """The codec of a prepared corpus or a bundle.

    Args:
        folder: holds the tokenizer.json, if there is one.
        text: what its tokens stand for, as it says itself; ``none`` where it does not know: then a tokenizer.json
            that somebody puts there tells.

    Raises:
        SpecError: if nothing tells, or the tokenizer is missing or damaged.
    """
    if text == "bytes":
        return Bytes()
    if text == "none" and not (folder / TOKENIZER).is_file():
        what = "was trained on token files, so text can't be encoded"
        raise SpecError("", what, f"use token ids, or put the {TOKENIZER} of its data into it", file=str(folder))
    return Tokenizer(folder / TOKENIZER)


def codec_of_bundle(folder: Path, bundle: Bundle) -> Codec:
    """What a bundle's tokens stand for, as its manifest says. Raises `SpecError` if that does not fit its model."""
    task = bundle.manifest.get("data", {}).get("task", "text_lm")
    if task != "text_lm":
        what = f"has learned the task {task}, which has no text"
        remedy = "use it from Python" if task == "custom" else "score it with `spiralformer eval` and no --data"
        raise SpecError("", what, remedy, file=str(folder))
    text = bundle.manifest.get("data", {"text": "bytes" if bundle.arch.vocab_size == 256 else "none"}).get("text")
    codec = codec_of(folder, "bytes" if text == "bytes" else "tokenizer" if text == "tokenizer" else "none")
    if codec.vocab_size > bundle.arch.vocab_size:
        what = f"its tokens reach {codec.vocab_size - 1}, the model knows {bundle.arch.vocab_size}"
        raise SpecError("", what, "put the tokenizer of its training data there", str(folder / TOKENIZER))
    return codec


def byte_tokenizer() -> str:
    """`Bytes` as a tokenizer.json: id b is byte b. Byte 0, which stands between documents, is special and unreadable.

    Bytes are written as GPT-2 writes them, since its decoder replaces what is no text alone, not the whole of it.
    """
    readable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in readable]
    vocab = {chr(byte): byte for byte in readable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocab = {_NOTHING if byte == 0 else name: byte for name, byte in vocab.items()}
    special = {"id": 0, "content": _NOTHING, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": _NOTHING, "fuse_unk": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{**special, "normalized": False, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }
    )
