"""What training keeps is what a real forward pass leaves for the backward pass."""

import pytest
import torch
from helpers import TOPOLOGIES, tiny_arch

from builder import build_model, compile_arch
from builder.pricing.memory import training_memory


def saved_by(model, tokens):
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive, kept = [], {}

    def keep(tensor):
        alive.append(tensor)  # or its memory would be given to the next
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("over", [{}, *({"graph": {"h": {"topology": t}}} for t in TOPOLOGIES[:4]), {"seq_len": 48}])
def test_it_is_what_a_real_pass_saves(over):
    graph = compile_arch(tiny_arch(over))
    model = build_model(graph, seed=0)
    found = training_memory(graph)
    real = saved_by(model, torch.zeros(1, graph.seq_len, dtype=torch.int64))
    assert found.activations == pytest.approx(real, rel=0.02)
    assert found.states == 16 * sum(p.numel() for p in model.parameters())
