"""Checkpoints that are whole or absent: data, fsync, rename, folder fsync, then the pointer.

The pointer holds the SHA-256 of the file it names; a damaged newest checkpoint falls back to the one before.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

_KEPT = 2


def save_checkpoint(folder: Path, state: dict[str, Any], step: int) -> None:
    """Write ``state`` (tensors and plain values) durably, and point to it."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"step-{step:09d}.pt"
    write_durably(folder / name, data)
    entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "step": step}
    entries = [e for e in _entries(folder) if e["file"] != name][: _KEPT - 1]
    write_durably(folder / "pointer.json", json.dumps([entry, *entries]).encode())
    kept = {e["file"] for e in (entry, *entries)}
    for old in folder.glob("step-*.pt"):
        if old.name not in kept:
            old.unlink()


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that is whole; None if there is none."""
    for entry in _entries(folder):
        try:
            data = (folder / entry["file"]).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == entry["sha256"]:
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            return state
    return None


def newest_checkpoint(folders: list[Path], device: str | torch.device = "cpu") -> dict[str, Any] | None:
    """The checkpoint with the most steps among several folders."""
    found = [(entries[0]["step"], folder) for folder in folders if (entries := _entries(folder))]
    for _, folder in sorted(found, key=lambda pair: pair[0], reverse=True):
        if (state := load_checkpoint(folder, device)) is not None:
            return state
    return None


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads((folder / "pointer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
