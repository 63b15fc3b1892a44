"""The built module: sharing, names, initial weights, and the table it is built from."""

import copy

import pytest
import torch
from helpers import BY_SIZE, built, tiny_arch

from builder import build_model, compile_arch, estimate
from builder.code import steps_of
from builder.graph.ops import OPS
from searchspace import load_arch, load_space


def test_what_a_row_says_of_initial_weights_holds():
    """nothing: no parameters; small: no ``starts``; own: the class says, or `spiralformer.init` knows it."""
    seen = {}
    space = load_space("families")
    for graph in [compile_arch(space.sample(seed).arch) for seed in range(60)]:
        model = build_model(graph, device="meta")
        for step in steps_of(graph):
            if step.target is None:
                continue
            module = model.get_submodule(step.target)
            says = hasattr(module, "starts") or isinstance(
                module, torch.nn.RMSNorm | torch.nn.LayerNorm | torch.nn.Embedding
            )
            said = any(hasattr(part, "starts") for part in module.modules())
            init = OPS[step.node.op].init
            if init == "nothing":
                assert list(module.parameters()) == [], step.node.op
            else:
                assert (says or said or step.node.op == "head") == (init == "own"), step.node.op
            seen[step.node.op] = init
    assert len(seen) > 20


@pytest.mark.parametrize("file", BY_SIZE)
def test_shipped_architectures_train(file):
    arch = load_arch(file)
    graph = compile_arch(arch)
    if estimate(graph).params > 30e6:  # shapes only
        logits = build_model(graph, device="meta")(torch.zeros(1, 75, dtype=torch.long, device="meta"))
        assert logits.shape == (1, 75, arch.vocab_size)
        return
    model = build_model(graph)
    tokens = torch.randint(0, arch.vocab_size, (1, min(arch.seq_len, 75)))
    logits = model(tokens)
    assert logits.shape == (1, tokens.shape[1], arch.vocab_size)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_shared_core_is_one_object_counted_once():
    graph = compile_arch(tiny_arch())
    model = build_model(graph)
    assert model.code.partition("def open")[0].count("self.blocks.core(") == 3
    cores = [module for name, module in model.named_modules(remove_duplicate=False) if name == "blocks.core"]
    assert len(cores) == 1
    unique = sum(p.numel() for p in model.parameters())
    assert unique == sum(value.numel() for value in model.state_dict().values()) == estimate(graph).params


def test_gradients_of_every_iteration_reach_the_core():
    """Cut off the other iterations' outputs one at a time: what is left must still move the core."""
    model = build_model(compile_arch(tiny_arch({"graph": {"h": {"topology": "residual"}}})))
    core = model.blocks.core

    def gradient_through(iteration):
        count = 0

        def keep_one(module, inputs, output):
            nonlocal count
            count += 1
            return output if count - 1 == iteration else output.detach()

        handle = core.register_forward_hook(keep_one)
        model.zero_grad()
        model(torch.randint(0, 17, (2, 24))).square().mean().backward()
        handle.remove()
        return sum(p.grad.abs().sum().item() for p in core.parameters())

    seen = [gradient_through(iteration) for iteration in range(3)]
    assert all(value > 0 for value in seen), seen


def test_tied_head_uses_the_embedding_itself():
    model = build_model(compile_arch(tiny_arch({"tie_embeddings": True})))
    assert not any(name.startswith("head.logits") for name, _ in model.named_parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    assert (model.embed.weight.grad[5] != 0).any()  # a row that only the head reads


def test_node_names_that_collide_with_code_or_torch():
    graph = {
        "x": {"embed": "tokens"},
        "tokens": {"block": "train", "in": "x"},
        "h_t0_join": {"norm": "rms", "in": "tokens"},
        "forward": {"recall": "linear", "in": ["h_t0_join", "x"]},
        "h": {"loop": "train", "in": "forward", "schedule": ["word", "token"], "topology": "mesh"},
        "lambda": {"norm": "layer", "in": "h"},
        "logits": {"head": "lm", "in": "lambda"},
    }
    over = {"blocks": {"core": None, "train": {"layers": 1, "heads": 2}}, "graph": {**graph}}
    compiled = compile_arch(tiny_arch(over))
    model = build_model(compiled)
    assert model(torch.randint(0, 17, (1, 9))).shape == (1, 9, 17)
    assert sum(p.numel() for p in model.parameters()) == estimate(compiled).params


def test_initial_weights_depend_on_seed_and_name_alone():
    small = build_model(compile_arch(tiny_arch({"graph": {"h": {"schedule": ["token"]}}})), seed=1)
    large = build_model(compile_arch(tiny_arch()), seed=1)
    other = build_model(compile_arch(tiny_arch()), seed=2)
    name = "blocks.core.layers.0.attn.branch.qkv.weight"
    assert torch.equal(small.get_parameter(name), large.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), large.get_parameter(name))


def test_initial_weights_go_by_kind_not_by_name():
    graph = {"n1": {"norm": "rms", "in": "x"}, "h": {"in": "n1"}}
    over = {
        "blocks": {"core": None, "scorer": {"layers": 1, "heads": 2}},
        "graph": {**graph, "h": {"loop": "scorer", "in": "n1", "schedule": ["word"], "step": "scale"}},
    }
    model = build_model(compile_arch(tiny_arch(over)))
    assert (model.sites.n1.weight == 1).all()
    assert model.blocks.scorer.layers[0].attn.branch.qkv.weight.std() > 0
    assert (model.sites.h.t0.pool.scorer.weight == 0).all()
    assert (model.sites.h.t0.step.gain == 1).all()
    factors = build_model(
        compile_arch(
            tiny_arch({"graph": {"h": {"topology": {"mix": {"of": ["residual", "anchor"], "weights": "static"}}}}})
        )
    )
    assert factors.sites.h.t0.join.factors.tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("name", ["training", "self", "type", "T", "parameters"])
def test_awkward_names(name):
    over = {"blocks": {"core": None, name: {"layers": 1, "heads": 2}},
            "graph": {"h": None, name: {"block": name, "in": "x"}, "n": {"norm": "rms", "in": name, "weights": name}, "logits": {"head": "lm", "in": "n"}}}  # fmt: skip
    assert build_model(compile_arch(tiny_arch(over)))(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 17)


def test_scorers_and_allocations_start_as_mean_and_uniform():
    model = build_model(compile_arch(tiny_arch()))
    plain = {name: {"pool": "mean", "upscale": "uniform"} for name in ("word", "phrase")}
    mean = build_model(compile_arch(tiny_arch({"levels": plain})))
    tokens = torch.randint(0, 17, (2, 21))
    torch.testing.assert_close(model(tokens), mean(tokens))


def test_code_is_readable_and_the_model_can_be_copied():
    model = built()
    assert "self.blocks.core(h_t0_pool)" in model.code
    tokens = torch.randint(0, 17, (2, 11))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
    assert model.generate(tokens, 2, seed=0).shape == (2, 13)


def test_meta_build_takes_no_memory():
    graph = compile_arch(tiny_arch({"d_model": 4096, "vocab_size": 50000}))
    assert all(p.is_meta for p in build_model(graph, device="meta").parameters())


def test_residual_scale_multiplies_the_branches():
    half = tiny_arch({"residual_scale": "inverse_sqrt_depth", "graph": {"h": {"schedule": ["token"] * 4}}})
    assert compile_arch(half).branch_scale == 0.5
    assert build_model(compile_arch(half)).blocks.core.layers[0].attn.residual.scale == 0.5
