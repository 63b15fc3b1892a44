"""Checkpoints that are whole or absent: data, fsync, rename, folder fsync, then the pointer.

The pointer holds the SHA-256 of the file it names; a damaged newest checkpoint falls back to the one before. A
checkpoint says what was being trained, and is taken for nothing else. Files are safetensors, so that reading one runs
nothing. A location is a folder here, or any URL that fsspec knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from searchspace.disk import is_temporary, parse_json, write_file
from searchspace.errors import SpecError

_KEPT = 2  # the newest may be damaged by what killed the worker
_POINTER, _MARK, _ATTEMPT = "pointer.json", "study", "attempt-"


class Store(Protocol):
    """The place of a study's or a trial's checkpoints: small and large files in folders two deep."""

    location: str
    """Absolute; `open_store` finds the same place by it, from any working folder."""

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, whole."""

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""

    def names(self) -> list[str]:
        """Files and folders in it, sorted."""

    def inside(self, name: str) -> Store:
        """A folder in it."""

    def make(self) -> bool:
        """Make the folder itself; False if it was there. On this machine no two callers are told True."""

    def remove(self, name: str) -> None:
        """Remove a file in it, if it is there."""

    def remove_empty(self) -> None:
        """Remove the folder itself, if nothing is left in it."""


def open_store(location: str | Path) -> Store:
    """A folder here, or one on any path that fsspec knows: what has a ``://`` in it.

    A local path goes through no parser of URLs, whatever its name holds.
    """
    text = str(location)
    protocol, mark, _ = text.partition("://")
    if mark and protocol != "file":
        return RemoteStore(text)
    return LocalStore(Path(text.removeprefix("file://")))


class LocalStore:
    """A folder on this machine; writes are durable, and links in it are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.abspath(folder))
        self.location = str(self._folder)

    def write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / name, data)

    def read(self, name: str) -> bytes | None:
        file = self._folder / name
        if file.is_symlink() or not file.is_file():
            return None
        try:
            return file.read_bytes()
        except OSError:
            return None

    def names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                return sorted(entry.name for entry in entries if not entry.is_symlink())
        except OSError:
            return []

    def inside(self, name: str) -> Store:
        return LocalStore(self._folder / name)

    def make(self) -> bool:
        try:
            self._folder.mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()


class RemoteStore:
    """A folder on an object store or another machine."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self._fs, self._root = url_to_fs(self.location)

    def write(self, name: str, data: bytes) -> None:
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{name}", data)

    def read(self, name: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        except OSError:
            return None
        return data

    def names(self) -> list[str]:
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=False)
        except OSError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def inside(self, name: str) -> Store:
        return RemoteStore(f"{self.location}/{name}")

    def make(self) -> bool:
        try:
            self._fs.makedirs(self._root, exist_ok=False)
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def remove_empty(self) -> None:
        """Object stores know no empty folders; others keep them."""


def attempts_in(trial: Store) -> list[Store]:
    """The attempts at a trial, oldest first."""
    found = [(int(number), name) for name in trial.names() if (number := name.removeprefix(_ATTEMPT)).isdecimal()]
    return [trial.inside(name) for _, name in sorted(found) if name.startswith(_ATTEMPT)]


def attempt_number(attempt: Store) -> int:
    """Which of a trial's attempts this is, from 1."""
    return int(attempt.location.rpartition("-")[2])


def claim_attempt(trial: Store, study_id: str) -> Store:
    """Make the next folder ``attempt-001``, ``attempt-002``, ... with the study's mark in it."""
    number = 1 + max(map(attempt_number, attempts_in(trial)), default=0)
    while not (claimed := trial.inside(f"{_ATTEMPT}{number:03d}")).make():
        number += 1
    claimed.write(_MARK, study_id.encode())
    return claimed


def remove_attempts(attempts: Sequence[Store], study_id: str) -> None:
    """Remove what `claim_attempt` and `save_checkpoint` wrote in attempts that bear this study's mark; nothing else.

    What others use at the moment may stay.
    """
    for attempt in attempts:
        if attempt.read(_MARK) != study_id.encode():
            continue
        with contextlib.suppress(OSError):
            for name in attempt.names():
                if name != _MARK and (name == _POINTER or _is_step(name) or is_temporary(name)):
                    attempt.remove(name)
            attempt.remove(_MARK)
            attempt.remove_empty()


def _is_step(name: str) -> bool:
    return re.fullmatch(r"step-[0-9]{9,12}\.safetensors", name) is not None


def save_checkpoint(attempt: Store, state: dict[str, Any], step: int, identity: str) -> None:
    """Write ``state`` (tensors, plain values, and dicts and lists of them), and point to it.

    Args:
        attempt: where to.
        state: of the training.
        step: that it has reached.
        identity: what is being trained (`TrialSpec.identity`); without it, the checkpoint is nobody's.
    """
    data = pack({"identity": identity, "step": step, "state": state})
    name = f"step-{step:09d}.safetensors"
    attempt.write(name, data)
    entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "step": step, "identity": identity}
    entries = [e for e in _entries(attempt, identity) if e["file"] != name][: _KEPT - 1]
    attempt.write(_POINTER, json.dumps([entry, *entries]).encode())
    kept = {e["file"] for e in (entry, *entries)}
    for old in attempt.names():
        if _is_step(old) and old not in kept:
            attempt.remove(old)


def load_checkpoint(attempts: Sequence[Store], identity: str, step: int | None = None) -> dict[str, Any] | None:
    """The state after the most steps among whole checkpoints of one training; None if there is none.

    Args:
        attempts: where to look.
        identity: of the training; checkpoints of others are left aside.
        step: exactly this one, not the newest.
    """
    found = [(entry, attempt) for attempt in attempts for entry in _entries(attempt, identity)]
    for entry, attempt in sorted(found, key=lambda pair: pair[0]["step"], reverse=True):
        if step is not None and entry["step"] != step:
            continue
        data = attempt.read(entry["file"])
        if data is None or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            continue
        try:
            held = unpack(data)
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue  # whole, but no checkpoint
        if held.get("identity") == identity and held.get("step") == entry["step"] and isinstance(held["state"], dict):
            return held["state"]
    return None


def pack(state: dict[str, Any]) -> bytes:
    """A tree of tensors and plain values as one safetensors file, the tree as JSON in its header."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"{len(tensors)}"
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, strip(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [strip(item) for item in value]}
        return value

    tree = json.dumps(strip(state))
    return save_tensors(tensors, {"tree": tree})


def unpack(data: bytes) -> dict[str, Any]:
    """The inverse of `pack`."""
    tensors = load_tensors(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {key: build(item) for key, item in inner}
        items = [build(item) for item in inner]
        return tuple(items) if kind == "tuple" else items

    tree: dict[str, Any] = build(json.loads(header["__metadata__"]["tree"]))
    return tree


def _entries(attempt: Store, identity: str) -> list[dict[str, Any]]:
    """What the pointer says of checkpoints of one training, the newest first."""
    try:
        entries = parse_json(attempt.read(_POINTER) or b"")
    except SpecError:
        return []
    return [entry for entry in entries if _is_entry(entry, identity)] if isinstance(entries, list) else []


def _is_entry(entry: object, identity: str) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("identity") == identity
        and type(entry.get("step")) is int
        and isinstance(entry.get("sha256"), str)
        and isinstance(file := entry.get("file"), str)
        and _is_step(file)
    )
