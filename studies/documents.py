"""Documents from wherever people keep text: files, JSON lines, Parquet, Hugging Face datasets. One at a time."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from searchspace.errors import SpecError, show
from studies.config import DataConfig


class Document(NamedTuple):
    """A text, and a name that does not change when others are added."""

    name: str
    text: bytes
    """UTF-8, as far as the source is."""
    held_out: bool | None = None
    """Whether it is for evaluation; None leaves that to its name."""


def documents(config: DataConfig) -> Iterator[Document]:
    """Every document that ``config`` names, in a stable order, none of them empty.

    Raises:
        SpecError: if a file, a field or a package is missing.
    """
    readers = {"jsonl": _json_lines, "parquet": _parquet, "hf": _hugging_face}
    left = config.max_bytes
    for document in readers.get(config.kind, _files)(config):
        if not document.text:
            continue
        yield document if left is None else document._replace(text=document.text[:left])
        if left is not None and (left := left - len(document.text)) <= 0:
            return


def source_files(config: DataConfig) -> list[Path]:
    """The files that ``config`` names, in a stable order; none for ``hf``, whose library looks itself."""
    if config.kind == "python_source":
        root = Path(sysconfig.get_path("stdlib"))
        return [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and p.stat().st_size]
    if config.path is None:
        raise SpecError("data.path", f"data of kind {config.kind} needs a path", "give a file, folder or glob")
    if config.kind == "hf":
        return []
    found = []
    ends = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}.get(config.kind, ())
    for pattern in (config.path,) if isinstance(config.path, str) else config.path:
        path = Path(pattern)
        matches = sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        for match in matches:
            if match.is_file() and match.stat().st_size and (not path.is_dir() or not ends or match.suffix in ends):
                found.append(match)
    if not found:
        raise SpecError("data.path", f"no file matches {show(config.path)}", "give files, folders or globs that exist")
    return found


def _named(config: DataConfig) -> Iterator[tuple[str, Path]]:
    """Files with their names below the folder that holds them all."""
    files = source_files(config)
    library = Path(sysconfig.get_path("stdlib"))
    root = library if config.kind == "python_source" else Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        yield str(file.relative_to(root)), file


def _files(config: DataConfig) -> Iterator[Document]:
    for name, file in _named(config):
        yield Document(name, file.read_bytes())


def _json_lines(config: DataConfig) -> Iterator[Document]:
    for name, file in _named(config):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        what = f"line {number} is not JSON: {error}"
                        raise SpecError("data.path", what, "give one JSON object on each line", str(file)) from error
                    yield Document(f"{name}:{number}", _text_of(row, config.text_field, f"{file}:{number}"))


def _parquet(config: DataConfig) -> Iterator[Document]:
    parquet = import_module("pyarrow.parquet")
    for name, file in _named(config):
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
        for batch in table.iter_batches(columns=[config.text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield Document(f"{name}:{number}", _text_of({config.text_field: text}, config.text_field, str(file)))


def _hugging_face(config: DataConfig) -> Iterator[Document]:
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
            text = _text_of(row, config.text_field, f"{config.path} row {number}")
            yield Document(f"{split}:{number}", text, held_out)


def _text_of(row: Any, field: str, where: str) -> bytes:
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
