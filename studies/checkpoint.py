"""Checkpoints that are whole or absent: data, fsync, rename, folder fsync, then the pointer.

The pointer holds the SHA-256 of the file it names; a damaged newest checkpoint falls back to the one before. Files
are safetensors, so that reading one runs nothing. A location is a folder here, or any path that fsspec knows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

_KEPT = 2
_POINTER = "pointer.json"


class Store:
    """A folder of small and large files: on this machine, where writes are durable, or on any fsspec path."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self._fs, self._root = url_to_fs(self.location)
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, whole."""
        self._fs.makedirs(self._root, exist_ok=True)
        if self._is_local:
            write_durably(Path(self._root) / name, data)
        else:
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""
        try:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        except OSError:
            return None
        return data

    def names(self) -> list[str]:
        """Files and folders in it, sorted."""
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._root, detail=False)
        except OSError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def inside(self, name: str) -> Store:
        """A folder in it."""
        return Store(f"{self.location.rstrip('/')}/{name}")

    def claim(self, prefix: str) -> Store:
        """Make the next folder ``PREFIX-001``, ``PREFIX-002``, ...; on this machine no two callers get the same."""
        number = 1 + max((int(n.rpartition("-")[2]) for n in self.names() if n.startswith(f"{prefix}-")), default=0)
        while True:
            try:
                self._fs.makedirs(f"{self._root}/{prefix}-{number:03d}", exist_ok=False)
            except FileExistsError:
                number += 1
                continue
            claimed = self.inside(f"{prefix}-{number:03d}")
            if not self._is_local:  # object stores know no empty folders
                claimed.write("claimed", b"")
            return claimed

    def remove(self, name: str) -> None:
        """Remove a file in it, if it is there."""
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm(f"{self._root}/{name}")

    def remove_all(self) -> None:
        """Remove it with all it holds; what is in use by others may stay."""
        try:
            self._fs.rm(self._root, recursive=True)
        except OSError:
            return


def save_checkpoint(store: Store, state: dict[str, Any], step: int) -> None:
    """Write ``state`` (tensors, plain values, and dicts and lists of them), and point to it."""
    data = pack(state)
    name = f"step-{step:09d}.safetensors"
    store.write(name, data)
    entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "step": step}
    entries = [e for e in _entries(store) if e["file"] != name][: _KEPT - 1]
    store.write(_POINTER, json.dumps([entry, *entries]).encode())
    kept = {e["file"] for e in (entry, *entries)}
    for old in store.names():
        if old.startswith("step-") and old not in kept:
            store.remove(old)


def load_checkpoint(store: Store) -> dict[str, Any] | None:
    """The newest checkpoint that is whole; None if there is none."""
    for entry in _entries(store):
        data = store.read(entry["file"])
        if data is not None and hashlib.sha256(data).hexdigest() == entry["sha256"]:
            return unpack(data)
    return None


def newest_checkpoint(stores: Sequence[Store]) -> dict[str, Any] | None:
    """The checkpoint with the most steps among several stores."""
    found = [(entries[0]["step"], store) for store in stores if (entries := _entries(store))]
    for _, store in sorted(found, key=lambda pair: pair[0], reverse=True):
        if (state := load_checkpoint(store)) is not None:
            return state
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


def _entries(store: Store) -> list[dict[str, Any]]:
    try:
        entries = json.loads(store.read(_POINTER) or b"")
    except ValueError:
        return []
    return (
        [e for e in entries if isinstance(e, dict) and {"file", "sha256", "step"} <= set(e)]
        if isinstance(entries, list)
        else []
    )


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that it is whole after a crash: old or new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
