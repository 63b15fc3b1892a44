"""What training keeps in memory, counted on tensors that hold nothing."""

from __future__ import annotations

from dataclasses import dataclass

from builder.graph.ir import Graph

_BYTES_PER_PARAMETER = 16  # fp32: weight, gradient, and AdamW's two moments


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """In bytes, at fp32; under bf16 autocast activations take about half."""

    states: int
    """Weights, gradients and AdamW's moments."""
    activations: int
    """What one sequence leaves for the backward pass, the logits and their loss among it."""


def training_memory(graph: Graph) -> TrainingMemory:
    """Count what autograd saves in a forward pass over one sequence of ``seq_len``; nothing is computed or allocated.

    A step needs ``states`` and, for each sequence in it (of a micro-batch), ``activations``; kernels' scratch comes
    on top. `tests/builder/test_memory.py` holds it against a real forward pass.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from builder.lowering import build_model

    model = build_model(graph, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    with FakeTensorMode():
        parts = {
            name: torch.empty(part.shape, dtype=part.dtype, requires_grad=part.requires_grad)
            for name, part in (*model.named_parameters(), *model.named_buffers())
        }
        own = {part.untyped_storage()._cdata for part in parts.values()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in own:
                kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # held, or its place would be given away
            return tensor

        tokens_BL = torch.zeros(1, graph.seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits_BLV = torch.func.functional_call(model, parts, (tokens_BL,))
            torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return TrainingMemory(_BYTES_PER_PARAMETER * count, activations)
