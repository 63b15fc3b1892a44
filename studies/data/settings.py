"""What ``data:`` of a study says: one class for each task's sources, told apart by ``kind``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from searchspace.errors import SpecError, one_of
from searchspace.plain import NO_VALUE, encode, key

TextKind: TypeAlias = Literal["python_source", "text", "jsonl", "parquet", "hf", "tokens"]

_OF_TEXT = ("max_bytes", "tokenizer", "held_out")
TEXT_KEYS: dict[TextKind, tuple[str, ...]] = {
    "python_source": _OF_TEXT,
    "text": ("path", *_OF_TEXT),
    "jsonl": ("path", "text_field", *_OF_TEXT),
    "parquet": ("path", "text_field", *_OF_TEXT),
    "hf": ("path", "text_field", "subset", "split", "held_out_split", *_OF_TEXT),
    "tokens": ("path", "dtype", "vocab_size", "bytes_per_token"),
}
"""Keys that each kind has a use for, beside ``kind``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to train on."""

    kind: str

    def settings(self) -> dict[str, Any]:
        """What was given, as plain data."""
        given: dict[str, Any] = encode(self)
        return {"kind": self.kind, **given}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData(DataConfig):
    """Text: this Python's library, text, JSON lines, Parquet, a Hugging Face dataset, or tokens.

    Raises:
        SpecError: for a key that its kind has no use for.
    """

    kind: TextKind = key(
        "Source: this Python's library, text, JSON lines, Parquet, a Hugging Face dataset, or tokens.",
        default="python_source",
    )
    path: str | tuple[str, ...] | None = key(
        "Files, folders or globs; hf: the dataset's name or folder; tokens: a folder with train.bin and val.bin.",
        default=None,
    )
    text_field: str = key("jsonl, parquet, hf: the field that holds the text.", default="text")
    subset: str | None = key("hf: configuration of the dataset.", default=None)
    split: str = key("hf: what to train on.", default="train")
    held_out_split: str | None = key("hf: what to evaluate on, instead of a share of split.", default=None)
    max_bytes: int | None = key("Bytes of text to take at most.", default=None, low=1)
    tokenizer: str | None = key("A tokenizer.json, or a folder with one; default: every byte a token.", default=None)
    held_out: float = key(
        "Share of the documents (of one, its end) kept for evaluation.", default=0.05, low=0.001, high=0.5
    )
    dtype: Literal["uint8", "uint16", "uint32"] = key("Of the token files.", default="uint16")
    vocab_size: int | None = key("Of the token files.", default=None, low=2)
    bytes_per_token: float | None = key("Of the token files, for bits per byte.", default=None, low=0.01)

    def __post_init__(self) -> None:
        known = ("kind", *TEXT_KEYS[self.kind])
        for field in fields(self):
            if field.name not in known and field.default is not NO_VALUE and getattr(self, field.name) != field.default:
                what = f"data of kind {self.kind} has no use for it"
                raise SpecError(f"data.{field.name}", what, f"leave it out; {one_of(TEXT_KEYS[self.kind], '')}")
