"""A bundle: one folder with everything that is needed to run a trained architecture again.

``architecture.yaml`` (no choice left), ``model.safetensors``, ``manifest.json``, ``README.md``.
Nothing is pickled; the manifest holds SHA-256 sums of the other files, checked on loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from builder.compiler import compile_arch
from builder.cost import Cost, estimate
from builder.lowering import build_model
from searchspace.arch import ArchSpec
from searchspace.errors import SpecError
from searchspace.loading import load_arch
from spiralformer.model import SpiralFormer

FORMAT = 1
_ARCH, _WEIGHTS, _MANIFEST, _CARD = "architecture.yaml", "model.safetensors", "manifest.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded bundle, model on the device asked for, in evaluation mode."""

    arch: ArchSpec
    model: SpiralFormer
    cost: Cost
    manifest: dict[str, Any]
    """As saved: choices, metrics, seeds, data, versions."""


def save_bundle(
    folder: str | Path,
    arch: ArchSpec,
    model: SpiralFormer,
    *,
    card: str = "",
    facts: dict[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> Path:
    """Write a bundle; an existing folder is replaced only when the new one is complete.

    Args:
        folder: where to.
        arch: the architecture of ``model``.
        model: its weights are saved in their own dtype.
        card: text of the model card.
        facts: JSON-able facts for the manifest: choices, metrics, seeds, data.
        files: copied into it, such as a tokenizer.json.

    Returns:
        The folder.

    Raises:
        SpecError: if the folder exists and is not a bundle.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _MANIFEST).is_file():
        raise SpecError("", "exists and is not a bundle", "choose another folder", file=str(folder))
    graph = compile_arch(arch)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (work / _ARCH).write_text(arch.to_yaml(), encoding="utf-8")
        save_file({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, work / _WEIGHTS)
        (work / _CARD).write_text(card or f"# {arch.name}\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, work / file.name)
        manifest = {
            "format": FORMAT,
            "arch_id": graph.arch_id,
            "cost": _cost_facts(estimate(graph)),
            "versions": _versions(),
            **(facts or {}),
            "sha256": {name: _sha256(work / name) for name in (_ARCH, _WEIGHTS, _CARD, *(f.name for f in files))},
        }
        (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def load_bundle(folder: str | Path, *, device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle, check its sums, build the model and load its weights.

    Raises:
        SpecError: if a file is missing, damaged, or does not fit the architecture.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise SpecError("", f"the bundle lacks {name}", "export it again", file=str(folder))
        if name != _CARD and _sha256(path) != expected:
            raise SpecError(
                "",
                "its SHA-256 differs from the manifest's: the file is damaged or was edited",
                "export it again",
                file=str(path),
            )
    arch = load_arch(folder / _ARCH)
    graph = compile_arch(arch)
    model = build_model(graph, device="meta")
    try:
        weights = load_file(folder / _WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise SpecError("", f"can't be read: {error}", "export it again", file=str(folder / _WEIGHTS)) from error
    expected_shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found_shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if expected_shapes != found_shapes:
        differing = sorted(
            name
            for name in expected_shapes.keys() | found_shapes.keys()
            if expected_shapes.get(name) != found_shapes.get(name)
        )
        raise SpecError(
            "", f"weights do not fit the architecture: {', '.join(differing[:5])}", "export it again", file=str(folder)
        )
    model = build_model(graph, seed=None, device=device)
    model.load_state_dict(weights)
    model.eval()
    return Bundle(arch=arch, model=model, cost=estimate(graph), manifest=manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what, remedy = "is not a bundle (no manifest.json)", "give a folder made by export"
        if (folder / "config.json").is_file():
            what, remedy = "is a Hugging Face folder, not a bundle", "export without --format"
        raise SpecError("", what, remedy, file=str(folder)) from error
    except ValueError as error:
        raise SpecError("", "is not valid JSON", "export the bundle again", file=str(path)) from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("sha256"), dict)
    ):
        raise SpecError(
            "format", "is not a bundle manifest of this version", f"this version reads format {FORMAT}", file=str(path)
        )
    return manifest


def _cost_facts(cost: Cost) -> dict[str, Any]:
    return {
        "seq_len": cost.seq_len,
        "params": cost.params,
        "params_non_embedding": cost.params_non_embedding,
        "flops": cost.flops,
        "flops_per_token": cost.flops_per_token,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
        "decode_flops_per_token": cost.decode_flops_per_token,
        "decode_flops_worst_token": cost.decode_flops_worst_token,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        found["spiralformer"] = version("spiralformer")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
