"""Documents from wherever people keep text: files, JSON lines, Parquet, Hugging Face datasets. One at a time."""

from __future__ import annotations

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from searchspace.disk import check_regular, open_regular
from searchspace.errors import SpecError, show
from studies.data.settings import TextData

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".rar", ".br")
# Read to tell text from binary; in memory at once; the longest JSON line; Parquet rows at once.
_BLOCK, _PIECE, _LINE, _ROWS = 1 << 13, 1 << 22, 1 << 26, 64


class Document(NamedTuple):
    """A text, and a name that does not change when others are added."""

    name: str
    text: bytes
    """UTF-8, as far as the source is."""
    held_out: bool | None = None
    """Whether it is for evaluation; None leaves that to its name."""
    continues: bool = False
    """Whether it goes on where the one before ended: large files come in pieces."""


def documents(config: TextData, base: Path = Path()) -> Iterator[Document]:
    """Every document that ``config`` names, in a stable order, none of them empty.

    Args:
        config: what to read.
        base: where relative paths begin, before the working folder.

    Raises:
        SpecError: if a file, a field or a package is missing, or a file holds something else.
    """
    readers = {"jsonl": _json_lines, "parquet": _parquet, "hf": _hugging_face}
    left = config.max_bytes
    for document in readers.get(config.kind, _files)(config, base):
        if not document.text:
            continue
        yield document if left is None else document._replace(text=document.text[:left])
        if left is not None and (left := left - len(document.text)) <= 0:
            return


@lru_cache(maxsize=1)
def _library() -> tuple[Path, ...]:
    """The modules of this Python's library."""
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name != "site-packages"]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return tuple(path for path in sorted(found) if path.stat().st_size)


def source_files(config: TextData, base: Path = Path()) -> list[Path]:
    """The files that ``config`` names, in a stable order; none for ``hf``, whose library looks itself.

    Raises:
        SpecError: if there are none, or one is compressed or, where text is expected, binary.
    """
    if config.kind == "python_source":
        return list(_library())
    if config.path is None:
        raise SpecError("data.path", f"data of kind {config.kind} needs a path", "give a file, folder or glob")
    if config.kind == "hf":
        return []
    found: list[Path] = []
    empty = 0
    ends = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}.get(config.kind, ())
    for pattern in (config.path,) if isinstance(config.path, str) else config.path:
        for match in _matches(pattern, base, ends):
            if match.stat().st_size:
                found.append(match)
            else:
                empty += 1
    if not found:
        if empty:
            what = f"{empty} file{'s match' if empty > 1 else ' matches'} {show(config.path)}, all empty"
            raise SpecError("data.path", what, "give files with something in them")
        where = " and ".join(dict.fromkeys(str(place.absolute()) for place in (base, Path())))
        what = f"no file matches {show(config.path)}, looked for in {where}"
        raise SpecError("data.path", what, "give files, folders or globs that exist")
    for file in found:
        _check_kind(file, config.kind)
    return found


def _matches(pattern: str, base: Path, ends: tuple[str, ...]) -> list[Path]:
    """Regular files by a name, a folder or a pattern, beside ``base`` or in the working folder; a name comes first."""
    home = Path(os.path.expanduser(pattern))
    for place in dict.fromkeys((base.absolute() / home, Path().absolute() / home)):
        try:
            if place.is_dir():
                return [file for file in _walk(place) if not ends or file.suffix in ends]
            if place.is_file():
                return [place]
            matches = sorted(file for file in map(Path, glob.glob(str(place), recursive=True)) if file.is_file())
        except (OSError, ValueError, re.error):  # names that no file can have
            continue
        if matches:
            return matches
    return []


def _walk(folder: Path) -> list[Path]:
    """Files below a folder but those that are hidden, or lie in hidden folders."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [file for name in files if not name.startswith(".") and (file := Path(place, name)).is_file()]
    return sorted(found)


def _check_kind(file: Path, kind: str) -> None:
    if file.suffix.lower() in _COMPRESSED:
        raise SpecError("data.path", "is compressed", "decompress it, or leave it out", str(file))
    if kind != "text":
        return
    with open_regular(file) as opened:
        block = opened.read(_BLOCK)
    if b"\0" in block:
        wide = block[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "is UTF-16 text" if wide else "is no text: it holds zero bytes"
        raise SpecError("data.path", what, "save it as UTF-8" if wide else "leave it out", str(file))


def _named(config: TextData, base: Path) -> Iterator[tuple[str, Path]]:
    """Files with their names below the folder that holds them all."""
    files = source_files(config, base)
    library = Path(sysconfig.get_path("stdlib"))
    root = library if config.kind == "python_source" else Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        yield str(file.relative_to(root)), file


def _files(config: TextData, base: Path) -> Iterator[Document]:
    """In pieces that end with a line, so that a file of any size fits in memory."""
    for name, file in _named(config, base):
        with open_regular(file) as opened:
            continues = False
            while piece := opened.read(_PIECE):
                if len(piece) == _PIECE:
                    piece += opened.readline(_PIECE)
                yield Document(name, piece, continues=continues)
                continues = True


def _json_lines(config: TextData, base: Path) -> Iterator[Document]:
    for name, file in _named(config, base):
        with open_regular(file) as lines:
            number = 0
            while line := lines.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    what = f"line {number} has over {_LINE >> 20} MiB"
                    raise SpecError("data.path", what, "give one JSON object on each line", str(file))
                if line.strip():
                    yield Document(f"{name}:{number}", _text_of(_row(line, number, file), config, f"{file}:{number}"))


def _row(line: bytes, number: int, file: Path) -> Any:
    remedy = "give one JSON object on each line"
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise SpecError("data.path", f"line {number} is nested too deeply", remedy, str(file)) from error
    except ValueError as error:
        if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            remedy = f"this looks like one array over all lines; {remedy}"
        raise SpecError("data.path", f"line {number} is not JSON: {error}", remedy, str(file)) from error
    if isinstance(row, list):
        raise SpecError("data.path", f"line {number} is a list", f"{remedy}, not an array of them", str(file))
    return row


def _parquet(config: TextData, base: Path) -> Iterator[Document]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise SpecError("data.kind", "parquet needs the package pyarrow", "pip install 'spiralformer[hf]'") from error
    for name, file in _named(config, base):
        check_regular(file)
        try:
            table = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise SpecError("data.path", f"is not Parquet: {error}", "give .parquet files", str(file)) from error
        known = table.schema_arrow.names
        if config.text_field not in known:
            raise SpecError(
                "data.text_field", f"there is no column {show(config.text_field)}", _columns(known), str(file)
            )
        number = 0
        # Few rows at a time: a value that stands there once may be said a million times.
        for batch in table.iter_batches(batch_size=_ROWS, columns=[config.text_field]):
            for value in batch.column(0):
                number += 1
                row = {config.text_field: value.as_py()}
                yield Document(f"{name}:{number}", _text_of(row, config, f"{file} row {number}"))


def _hugging_face(config: TextData, base: Path) -> Iterator[Document]:
    """Streamed: nothing is downloaded whole. The held-out split may be one of the dataset's own."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise SpecError("data.kind", "hf needs the package datasets", "pip install 'spiralformer[hf]'") from error
    if not isinstance(config.path, str):
        raise SpecError("data.path", "data of kind hf needs one path", "give a dataset's name or folder")
    for split, held_out in (
        (config.split, None if config.held_out_split is None else False),
        (config.held_out_split, True),
    ):
        if split is None:
            continue
        try:
            rows = datasets.load_dataset(config.path, config.subset, split=split, streaming=True)
        except Exception as error:  # the library raises whatever its readers and the network do
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise SpecError(
                "data.path", f"can't load {show(config.path)}, split {split}: {reason}", "check it"
            ) from error
        for number, row in enumerate(rows):
            text = _text_of(row, config, f"{config.path} row {number}")
            yield Document(f"{split}:{number}", text, held_out)


def _text_of(row: Any, config: TextData, where: str) -> bytes:
    field = config.text_field
    if not isinstance(row, dict) or field not in row:
        known = list(row) if isinstance(row, dict) else []
        raise SpecError("data.text_field", f"there is no field {show(field)} in {where}", _columns(known))
    text = row[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        what = f"{show(field)} in {where} is a {type(text).__name__}, not text"
        raise SpecError("data.text_field", what, "name the field that holds the text")
    return text.encode("utf-8", errors="replace")


def _columns(known: list[str]) -> str:
    return f"there are: {', '.join(known)}" if known else "give objects with a text field"
