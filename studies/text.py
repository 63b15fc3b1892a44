"""Text to tokens and back: bytes, or a ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from searchspace.errors import SpecError, show

TOKENIZER = "tokenizer.json"
_BYTE_SEPARATOR = b"\n\x00\n"
_NOTHING = "<0x00>"
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", _NOTHING)
"""Special tokens that end a document, by the names they have in common tokenizers."""


class Codec(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    separator: list[int]
    """Between documents."""

    def encode(self, text: bytes) -> list[int]:
        """UTF-8 text as token ids."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text; what is no text becomes a replacement character."""


class Bytes:
    """Every byte a token."""

    def __init__(self) -> None:
        self.vocab_size, self.separator = 256, list(_BYTE_SEPARATOR)

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class Tokenizer:
    """A file of the library ``tokenizers``.

    Args:
        file: ``tokenizer.json``.

    Raises:
        SpecError: if it can't be read, or the library is missing.
    """

    def __init__(self, file: Path) -> None:
        try:
            tokenizers = import_module("tokenizers")
        except ImportError as error:
            raise SpecError("data.tokenizer", "needs tokenizers", "pip install 'spiralformer[hf]'") from error
        if not file.is_file():
            raise SpecError("data.tokenizer", f"there is no file {show(str(file))}", "give a tokenizer.json")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # what the library raises has no type of its own
            raise SpecError(
                "data.tokenizer", f"is no tokenizer: {error}", "give a tokenizer.json", str(file)
            ) from error
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        end = next((i for name in ENDS if (i := self._tokenizer.token_to_id(name)) is not None), None)
        self.separator = [] if end is None else [end]

    def encode(self, text: bytes) -> list[int]:
        found: list[int] = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def codec_of(folder: Path) -> Codec:
    """The codec of a prepared corpus or a bundle: its tokenizer.json, or else bytes."""
    return Tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else Bytes()


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
