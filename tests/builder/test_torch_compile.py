"""`torch.compile` and `torch.export` take the whole model: no graph break, no recompilation after warm-up."""

import pytest
import torch
from helpers import ARCHITECTURES, built, tiny_arch

from builder import build_model, compile_arch
from builder.laws import randomize
from searchspace import load_arch, load_space

pytestmark = pytest.mark.filterwarnings("default")  # dynamo looks at .grad of tensors that have none

MESH = {"graph": {"h": {"topology": "mesh", "recall": "linear", "norm": "rms"}}}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_whole_model_without_a_graph_break():
    space = load_space("families")
    for seed in range(6):
        arch = space.sample(seed).arch
        model = build_model(compile_arch(arch))
        tokens = torch.randint(0, arch.vocab_size, (1, 40))
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_layers_are_compiled_once_per_length_and_mode():
    """Four lengths, training and evaluation: every variant in the warm-up, none later, none falls back to eager."""
    levels = {f"l{g}": {"chunk": g} for g in (8, 4, 2)}
    schedule = ["l8", "l4", "l2", "token"]
    model = build_model(
        compile_arch(tiny_arch({"levels": levels, "graph": {"h": {"schedule": schedule, "topology": "mesh"}}}))
    )
    compiled = []

    def backend(module, inputs):
        compiled.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)][:1])
        return module.forward

    torch._dynamo.config.recompile_limit = 16
    for layer in model.blocks.core.layers:
        layer.compile(dynamic=False, fullgraph=True, backend=backend)
    tokens = torch.randint(0, 17, (2, 24))

    def run():
        model.train()
        model(tokens).sum().backward()
        model.eval()
        with torch.no_grad():
            model(tokens)

    run()
    warm = len(compiled)
    assert 4 <= warm <= 8
    for _ in range(3):
        run()
    assert len(compiled) == warm


def test_export_gives_equal_logits_for_any_batch():
    model = built(MESH)
    batch = torch.export.Dim("batch", min=1, max=64)
    tokens = torch.randint(0, 17, (2, 24))
    program = torch.export.export(model, (tokens,), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        tokens = torch.randint(0, 17, (size, 24))
        torch.testing.assert_close(program.module()(tokens), model(tokens))


SMALL = [p.stem for p in ARCHITECTURES if p.stem.endswith("small")]


@pytest.mark.parametrize("name", ["tiny", *[pytest.param(name, marks=pytest.mark.slow) for name in SMALL]])
def test_programs_of_any_length(name):
    """`torch.export` with a dynamic length, and one whole graph compiled for several."""
    arch = tiny_arch({"seq_len": 128}) if name == "tiny" else load_arch(name)
    model = randomize(build_model(compile_arch(arch)))
    lengths = [torch.randint(0, arch.vocab_size, (3, length)) for length in (57, 33, 128)]
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=32, max=128)},)
    program = torch.export.export(model, (lengths[0][:2],), dynamic_shapes=shapes).module()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for tokens in lengths:
        torch.testing.assert_close(program(tokens), model(tokens))
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_mask_breaks_no_graph():
    model, tokens, mask = built(MESH), torch.randint(0, 17, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, mask)[mask.bool()], model(tokens, mask)[mask.bool()])


@pytest.mark.slow
def test_inductor_on_this_machine():
    model = built(MESH)
    tokens = torch.randint(0, 17, (2, 24))
    expected = model(tokens)
    for layer in model.blocks.core.layers:
        layer.compile(dynamic=False)
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
