"""A model as a `torch.export` program: one file that runs without this package."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from builder.graph.compiler import compile_arch
from searchspace.arch import ArchSpec
from searchspace.disk import write_file
from searchspace.errors import SpecError, show
from searchspace.plain import encode
from spiralformer.model import SpiralFormer

_TOLERANCE = 1e-5  # fp32, relative to the largest logit; what was seen is below 1e-6


def export_torch(file: Path, arch: ArchSpec, model: SpiralFormer) -> Path:
    """Write ``file`` (.pt2), then load it and compare: tokens (B, L) to logits (B, L, V).

    B is any; L up to the architecture's ``seq_len``, and at least two chunks of its coarsest level.

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
    shortest = max(2 * level.chunk - level.offset for level in {node.level for node in graph.nodes})
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    if shortest < graph.seq_len:
        shapes[1] = torch.export.Dim("length", min=shortest, max=graph.seq_len)
    program = torch.export.export(model, (tokens_BL[:2],), dynamic_shapes=(shapes,))
    held = io.BytesIO()
    facts = {"arch_id": graph.arch_id, "architecture": encode(arch)}
    torch.export.save(program, held, extra_files={"architecture.json": json.dumps(facts)})
    held.seek(0)
    loaded = torch.export.load(held).module()
    for length in {graph.seq_len, min(shortest + 1, graph.seq_len)}:
        with torch.no_grad():
            ours, theirs = model(tokens_BL[:, :length]), loaded(tokens_BL[:, :length])
        gap = float((ours - theirs).abs().max())
        if not gap <= _TOLERANCE * max(1.0, float(ours.abs().max())):
            raise SpecError("", f"the exported program's logits differ by {gap:.2g}", "report this as a bug", str(file))
    model.train(was_training)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, held.getvalue())
    return file
