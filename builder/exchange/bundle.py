"""A bundle: one folder with everything that is needed to run a trained architecture again.

``architecture.yaml`` (no choice left), ``model.safetensors``, ``manifest.json``, ``README.md``.
Nothing is pickled; the manifest holds SHA-256 sums of the other files, checked on loading.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from builder.graph.compiler import compile_arch
from builder.halting import Halt, halting
from builder.lowering import build_model
from builder.pricing.cost import Cost, estimate
from builder.schedules import Schedule, model_under, read_schedules
from searchspace.arch import ArchSpec
from searchspace.disk import check_regular, new_folder, read_json, sha256_of, write_file
from searchspace.errors import SpecError, show
from searchspace.files import load_arch
from searchspace.plugin_loading import PluginRecord
from searchspace.plugins import decode_records, needing, used_by
from spiralformer.model import SpiralFormer

FORMAT = 1  # raised when an older reader would misread a bundle
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, by safetensors' names."""
_ARCH, _WEIGHTS, _MANIFEST, _CARD = "architecture.yaml", "model.safetensors", "manifest.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded bundle, model on the device asked for, in evaluation mode."""

    arch: ArchSpec
    model: SpiralFormer
    cost: Cost
    manifest: dict[str, Any]
    """As saved: choices, metrics, seeds, data, versions."""
    halt: Halt | None = None
    """When the model's loop of most iterations stops; None: at its schedule's end."""

    def under(self, schedules: Mapping[str, Schedule]) -> Bundle:
        """The same weights under other schedules of its loops: longer, shorter, at other levels.

        Args:
            schedules: by the loop's name: how many iterations, going round its own schedule, or the level of each.

        Raises:
            SpecError: if there is no such loop or level, or an iteration has weights of its own.
        """
        arch, model = model_under(self.model, self.arch, schedules)
        facts = {**self.manifest, "arch_id": compile_arch(arch).arch_id, "trained_arch_id": self.manifest["arch_id"]}
        found = Bundle(arch=arch, model=model, cost=estimate(compile_arch(arch)), manifest=facts)
        return found if self.halt is None else found.until(self.halt)

    def until(self, halt: Halt) -> Bundle:
        """The same weights, the loop of most iterations ended where a row has come to rest.

        Args:
            halt: when it ends; its schedule says how often it runs at most.

        Raises:
            SpecError: if there is no loop.
        """
        return replace(self, model=halting(self.model, self.arch, halt), halt=halt)


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
        SpecError: if the folder exists and is not a bundle, or holds more than one.
    """
    graph = compile_arch(arch)
    with new_folder(Path(folder), bundle_contents, "a bundle") as work:
        write_file(work / _ARCH, arch.to_yaml())
        save_weights({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, work / _WEIGHTS)
        write_file(work / _CARD, card or f"# {arch.name}\n")
        for file in files:
            shutil.copyfile(file, work / file.name)
        used = used_by(arch, f"task:{(facts or {}).get('data_settings', {}).get('kind')}")
        manifest = {
            "format": FORMAT,
            "arch_id": graph.arch_id,
            **({"plugins": [record.to_plain() for record in used]} if used else {}),
            "cost": _cost_facts(estimate(graph)),
            "versions": _versions(),
            **(facts or {}),
            "sha256": {name: sha256_of(work / name) for name in (_ARCH, _WEIGHTS, _CARD, *(f.name for f in files))},
        }
        write_file(work / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return Path(folder)


def save_weights(weights: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that may be read by whom the folder's other files may."""
    try:
        save_file(weights, file, metadata=metadata)
    except SafetensorError as error:  # what the system said stands in its text alone
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def bundle_contents(folder: Path) -> set[str] | None:
    """Names of a bundle's files; None if the folder holds none."""
    try:
        return {_MANIFEST, *read_manifest(folder)["sha256"]}
    except SpecError:
        return None


def load_bundle(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    schedules: str | Sequence[str] = (),
    halt: str | Halt | None = None,
) -> Bundle:
    """Read a bundle, check its sums, build the model and load its weights.

    Args:
        folder: of the bundle.
        device: where the model is to live.
        schedules: to run its loops under, as ``h=30`` (`builder.schedules.read_schedules`).
        halt: when its loop of most iterations stops: a `Halt`, or its text, as ``state=0.01``; ``none`` lets it run.
            Default: as the bundle says.

    Raises:
        SpecError: if a file is missing, damaged, or does not fit the architecture, the weights don't fit a schedule, or
            there is no loop to stop.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise SpecError("", f"the bundle lacks {show(name)}", "export it again", file=str(folder))
        if name != _CARD and sha256_of(path) != expected:
            raise SpecError(
                "",
                "its SHA-256 differs from the manifest's: the file is damaged or was edited",
                "export it again",
                file=str(path),
            )
    with needing(_plugins_of(manifest, folder), file=str(folder)):
        arch = load_arch(folder / _ARCH)
        graph = compile_arch(arch)
    if graph.arch_id != manifest["arch_id"]:
        what = f"describes {graph.arch_id}, the manifest {show(manifest['arch_id'])}"
        raise SpecError("", what, "export it again", file=str(folder / _ARCH))
    expected_weights = build_model(graph, device="meta").state_dict()
    check_regular(folder / _WEIGHTS)
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as header:
            slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        check_weights(expected_weights, found, folder)
        weights = load_file(folder / _WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise SpecError("", f"can't be read: {error}", "export it again", file=str(folder / _WEIGHTS)) from error
    model = build_model(graph, seed=None, device=device)
    for name, parameter in model.named_parameters():  # in the dtype they were saved in
        parameter.data = parameter.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    model.eval()
    bundle = Bundle(arch=arch, model=model, cost=estimate(graph), manifest=manifest)
    if schedules:
        asked = [schedules] if isinstance(schedules, str) else schedules
        bundle = bundle.under(read_schedules(asked, arch))
    halt = Halt.read(halt, "halt") if isinstance(halt, str) else halt or _halt_of(manifest, folder)
    return bundle if halt is None or halt.by == "none" else bundle.until(halt)


def _halt_of(manifest: Mapping[str, Any], folder: Path) -> Halt | None:
    try:
        return Halt.read(manifest["halt"], "halt") if "halt" in manifest else None
    except SpecError as error:
        error.file = str(folder / _MANIFEST)
        raise


def _plugins_of(manifest: Mapping[str, Any], folder: Path) -> tuple[PluginRecord, ...]:
    try:
        return decode_records(manifest.get("plugins", []), "plugins")
    except SpecError as error:
        error.file = error.file or str(folder / _MANIFEST)
        raise


def check_weights(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[tuple[int, ...], str]], where: Path
) -> None:
    """Raise `SpecError` unless all tensors are there, no others, in their shapes and as floating-point numbers.

    Args:
        expected: state of the model, which may lie on the meta device.
        found: shape and safetensors' name of the dtype of each tensor in a file.
        where: it was found.
    """
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    wrong = sorted(n for n in shapes.keys() | found.keys() if n not in found or shapes.get(n) != found[n][0])
    if wrong:
        what = f"weights do not fit the architecture: {', '.join(map(show, wrong[:5]))}"
        raise SpecError("", what, "export it again", file=str(where))
    if odd := sorted(name for name, (_, dtype) in found.items() if dtype not in FLOATS):
        what = f"{show(odd[0])} is stored as {found[odd[0]][1]}, not as numbers of 16 bits or more with a point"
        raise SpecError("", what, "store the weights as F32, F16 or BF16", file=str(where))


def read_manifest(folder: Path) -> dict[str, Any]:
    """A bundle's manifest, its fields checked. Raises `SpecError` if the folder is no bundle, or damaged."""
    path = folder / _MANIFEST
    if not path.is_file():
        what, remedy = "is not a bundle (no manifest.json)", "give a folder made by export"
        if not folder.exists():
            what = "is not there"
        elif (inner := next(iter(sorted(folder.glob(f"*/{_MANIFEST}"))), None)) is not None:
            remedy = f"give the one in it: {inner.parent}"
        if (folder / "config.json").is_file():
            what, remedy = "is a Hugging Face folder, not a bundle", "export without --format"
        raise SpecError("", what, remedy, file=str(folder))
    manifest = read_json(path)
    what = "is not a bundle manifest of this version"
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("arch_id"), str)
    ):
        raise SpecError("format", what, f"this version reads format {FORMAT}", file=str(path))
    sums = manifest.get("sha256")
    if not isinstance(sums, dict) or not {_ARCH, _WEIGHTS, _CARD} <= sums.keys():
        lacks = f"does not list {_ARCH}, {_WEIGHTS} and {_CARD}"
        raise SpecError("sha256", lacks, "export the bundle again", file=str(path))
    for name, digest in sums.items():
        if not isinstance(digest, str) or name in ("", ".", "..", _MANIFEST) or set("/\\\0") & set(name):
            raise SpecError("sha256", f"{show(name)} is no file of the bundle", "export it again", file=str(path))
    for name in ("data", "metrics", "training", "choices", "cost", "imported"):
        if not isinstance(manifest.get(name, {}), dict):
            raise SpecError(name, f"is {show(manifest[name])}", "export the bundle again", file=str(path))
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
