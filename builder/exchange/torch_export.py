"""A model as a `torch.export` program: one file that runs without this package."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from builder.graph.compiler import compile_arch
from searchspace.arch import ArchSpec
from searchspace.disk import write_file
from searchspace.errors import SpecError, show
from searchspace.plain import encode
from spiralformer.model import SpiralFormer

_TOLERANCE = 1e-5


def export_torch(file: Path, arch: ArchSpec, model: SpiralFormer) -> Path:
    """Write ``file`` (.pt2): tokens (B, seq_len) to logits (B, seq_len, V) for any B, then load it and compare.

    Raises:
        SpecError: if the loaded program computes something else.
    """
    if file.suffix != ".pt2" or file.is_dir():
        raise SpecError("-o", f"{show(str(file))} is no name for a program", "end it in .pt2")
    graph = compile_arch(arch)
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, graph.vocab_size, (3, graph.seq_len), generator=generator)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    program = torch.export.export(model, (tokens_BL[:2],), dynamic_shapes=({0: batch},))
    held = io.BytesIO()
    facts = {"arch_id": graph.arch_id, "architecture": encode(arch)}
    torch.export.save(program, held, extra_files={"architecture.json": json.dumps(facts)})
    held.seek(0)
    with torch.no_grad():
        ours, theirs = model(tokens_BL), torch.export.load(held).module()(tokens_BL)
    model.train(was_training)
    gap = float((ours - theirs).abs().max())
    if not gap <= _TOLERANCE * max(1.0, float(ours.abs().max())):
        raise SpecError("", f"the exported program's logits differ by {gap:.2g}", "report this as a bug", str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, held.getvalue())
    return file
