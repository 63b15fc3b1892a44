"""Each part against a slow, literal statement of its rule."""

import math

import pytest
import torch
from helpers import built, tiny_arch

from builder import build_model, compile_arch
from builder.graph.blocks import FEED_FORWARDS
from builder.graph.row import PartName
from builder.lowering import class_of
from spiralformer.attention import Attention, Call
from spiralformer.block import Block, BlockConfig, Layer, ParallelLayer
from spiralformer.embedding import ScaledEmbedding
from spiralformer.feedforward import GeluFeedForward
from spiralformer.generate import Sampling, sample_next
from spiralformer.joins import MixtureJoin, WeightedJoin
from spiralformer.memory import OpenMemory, ReadMemory, WriteMemory
from spiralformer.pooling import LastPool, MeanPool, SelfAggregatePool
from spiralformer.residual import AddResidual
from spiralformer.rope import Rotary, rotate
from spiralformer.upscale import LearnedUpscale, UniformUpscale

D = 6
LEVELS = [(g, w) for g in (2, 3, 5) for w in range(g)]


def stream(length, seed=0):
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def members(length, chunk, offset):
    """Tokens of each closed chunk."""
    chunks = {}
    for i in range(length):
        chunks.setdefault((i + offset) // chunk, []).append(i)
    return [chunks[j] for j in sorted(chunks) if chunks[j][-1] == (j + 1) * chunk - offset - 1]


@pytest.mark.parametrize("length", [1, 2, 5, 11])
@pytest.mark.parametrize(("chunk", "offset"), LEVELS)
def test_pools(chunk, offset, length):
    x = stream(length)
    scored = SelfAggregatePool(chunk, offset, D)
    torch.nn.init.normal_(scored.scorer.weight)
    expected = {"mean": [], "last": [], "scored": []}
    for tokens in members(length, chunk, offset):
        part = x[:, tokens]
        expected["mean"].append(part.mean(dim=1))
        expected["last"].append(part[:, -1])
        expected["scored"].append((scored.scorer(part).softmax(dim=1) * part).sum(dim=1))
    for name, pool in (("mean", MeanPool(chunk, offset)), ("last", LastPool(chunk, offset)), ("scored", scored)):
        z = pool(x)
        assert z.shape == (2, (length + offset) // chunk, D)
        if expected[name]:
            torch.testing.assert_close(z, torch.stack(expected[name], dim=1))


@pytest.mark.parametrize("own_chunk", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 4, 11])
@pytest.mark.parametrize(("chunk", "offset"), LEVELS)
def test_upscales(chunk, offset, length, delay, own_chunk):
    latents = (length + offset) // chunk
    z = stream(latents, seed=1)
    settings = {"delay": delay, "own_chunk": own_chunk, "target": (1, 0)}
    learned = LearnedUpscale(chunk, offset, d_model=D, **settings)
    torch.nn.init.normal_(learned.allocation.weight)
    beta = learned.allocation(z).softmax(dim=-1)
    assert torch.allclose(beta.sum(dim=-1), torch.ones(()))
    uniform = UniformUpscale(chunk, offset, **settings)
    expected_learned, expected_uniform = torch.zeros(2, length, D), torch.zeros(2, length, D)
    for token in range(length):
        i = token - delay
        j, r = ((i + offset) // chunk, (i + offset) % chunk) if own_chunk else (
            (i + offset + 1) // chunk - 1, (i + offset + 1) % chunk
        )  # fmt: skip
        if 0 <= j < latents and i + offset >= 0:
            expected_learned[:, token] = math.sqrt(chunk) * beta[:, j, r, None] * z[:, j]
            expected_uniform[:, token] = z[:, j] / math.sqrt(chunk)
    tokens = torch.zeros(2, length, dtype=torch.long)
    torch.testing.assert_close(learned(z, tokens=tokens), expected_learned)
    torch.testing.assert_close(uniform(z, tokens=tokens), expected_uniform)


def test_uniform_updates_keep_the_latent_energy():
    z = stream(3)
    update = UniformUpscale(4, 0, delay=0, own_chunk=False, target=(1, 0))(
        z, tokens=torch.zeros(2, 40, dtype=torch.long)
    )
    torch.testing.assert_close(update.square().sum(), z.square().sum())


def test_memory_equals_slots_written_out():
    """The paper's buffer of S slots, built literally, against the sum that never builds it."""
    slots, steps = 4, 3
    first, updates = stream(7), [stream(7, seed=t + 1) for t in range(steps)]
    states = [stream(7, seed=10 + t) for t in range(steps)]
    memory = OpenMemory()(first)
    buffer = torch.zeros(2, 7, slots, D)
    buffer[:, :, 0] = first
    for update, state in zip(updates, states, strict=True):
        write, read = WriteMemory(D, slots), ReadMemory(D, slots)
        memory = write(memory, update, state)
        buffer = buffer + write.router(state).softmax(-1).unsqueeze(-1) * update.unsqueeze(2)
        expected = (read.router(state).softmax(-1).unsqueeze(-1) * buffer).sum(dim=2)
        torch.testing.assert_close(read(memory, state), expected)


def test_z_loss_is_the_mean_square_of_the_normaliser():
    model, tokens = built({"graph": {"z": {"loss": "z", "in": "logits", "weight": 0.25}}}), torch.tensor([[3, 1, 4, 1]])
    logits, losses, _ = model.with_losses(tokens)
    assert torch.equal(logits, model(tokens))
    assert torch.allclose(losses["z"], 0.25 * logits.exp().sum(dim=-1).log().square().mean())
    assert built().with_losses(tokens)[1] == {}


def test_rotary_scores_depend_on_distance_alone():
    rotary = Rotary(rotary_dim=4, base=100.0, max_len=4)
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)
    cos, sin = rotary(32, 1, 0, q.device)  # longer than tabulated
    scores = rotate(q.expand(1, 1, 32, D), cos, sin) @ rotate(k.expand(1, 1, 32, D), cos, sin).transpose(-1, -2)
    torch.testing.assert_close(scores[0, 0, 5, 2], scores[0, 0, 25, 22], atol=1e-4, rtol=1e-4)
    assert abs(scores[0, 0, 5, 2] - scores[0, 0, 5, 3]) > 1e-4
    torch.testing.assert_close(rotate(q, cos[:1], sin[:1]), q)


def test_grouped_heads_equal_repeated_ones():
    grouped = Attention(8, 4, 2, 2, causal=True, qk_norm=True, bias=False, eps=1e-5)
    full = Attention(8, 4, 4, 2, causal=True, qk_norm=True, bias=False, eps=1e-5)
    q, k, v = grouped.qkv.weight.split((8, 4, 4))
    spread = [w.view(2, 2, 8).repeat_interleave(2, dim=0).reshape(8, 8) for w in (k, v)]
    full.qkv.weight.data = torch.cat((q, *spread))
    full.out.weight.data = grouped.out.weight.data
    x = torch.randn(3, 9, 8)
    call = Call(*Rotary(2, 100.0, 9)(9, 1, 0, x.device))
    torch.testing.assert_close(grouped(x, call), full(x, call))


FFNS = {kind: class_of(PartName(row.part)) for kind, row in FEED_FORWARDS.items()}


LITERAL = {  # of x, for each feed-forward without biases
    "gelu": lambda ffn, x: torch.nn.functional.gelu(x @ ffn.up.weight.T) @ ffn.out.weight.T,
    "relu2": lambda ffn, x: (x @ ffn.up.weight.T).clamp(min=0) ** 2 @ ffn.out.weight.T,
    "swiglu": lambda ffn, x: (
        ((gate := x @ ffn.gate_up.weight[:12].T) * gate.sigmoid() * (x @ ffn.gate_up.weight[12:].T)) @ ffn.out.weight.T
    ),
}


@pytest.mark.parametrize("kind", FFNS)
def test_feed_forwards(kind):
    ffn, x = FFNS[kind](8, 12, False), torch.randn(2, 5, 8)
    assert kind in LITERAL, f"write what {kind} computes in LITERAL"
    torch.testing.assert_close(ffn(x), LITERAL[kind](ffn, x))


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize(("place", "parallel"), [("pre", False), ("post", False), ("pre", True)])
def test_blocks_of_every_kind(kind, place, parallel):
    config = BlockConfig(
        d_model=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn=FFNS[kind], ffn_dim=12, norm=torch.nn.LayerNorm,
        norm_places=(place == "pre", False, place == "post"), norm_eps=1e-5, layer=ParallelLayer if parallel else Layer, rotary_dim=2, rotary_base=100.0, qk_norm=True, bias=True,
        dropout=0.0, residual=AddResidual, recall=None, causal=True, branch_scale=0.5, max_len=4,
    )  # fmt: skip
    block = Block(config)
    assert block(torch.randn(2, 7, 8)).shape == (2, 7, 8)
    assert block(torch.randn(2, 0, 8)).shape == (2, 0, 8)


def test_post_norm_keeps_the_state_on_a_shell():
    config = BlockConfig(
        d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=GeluFeedForward, ffn_dim=64, norm=torch.nn.RMSNorm,
        norm_places=(False, False, True), norm_eps=1e-6, layer=Layer, rotary_dim=8, rotary_base=1e4, qk_norm=False, bias=False, dropout=0.0, residual=AddResidual, recall=None,
        causal=True, branch_scale=1.0, max_len=8,
    )  # fmt: skip
    block, x = Block(config), torch.randn(1, 8, 16)
    for _ in range(50):
        x = block(x)
    torch.testing.assert_close(x.square().mean(dim=-1).sqrt(), torch.ones(1, 8), atol=1e-3, rtol=1e-3)


def test_sampling():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert sample_next(logits, Sampling(temperature=0)).tolist() == [1]

    def draws(**settings):
        generators = (torch.Generator().manual_seed(seed) for seed in range(99))
        return {int(sample_next(logits, Sampling(**settings), generator)) for generator in generators}

    assert draws(temperature=9.0) == {0, 1, 2}
    assert draws(temperature=9.0, top_k=2) == {1, 2}
    assert draws(temperature=9.0, top_p=0.3) == {1}
    assert draws(temperature=9.0, top_p=0.6) == {1, 2}
    assert draws(temperature=0.1) == {1}


def test_generate_is_repeatable_and_checks_its_input():
    model = built()
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(prompt, 5, seed=1), model.generate(prompt, 5, seed=1))
    greedy = model.generate(prompt, 4, temperature=0)
    for i in range(3, 7):
        assert greedy[0, i] == model(greedy[:, :i])[0, -1].argmax()
    for bad in (
        {"tokens_BL": prompt[:, :0]},
        {"tokens_BL": prompt[0]},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
    ):
        with pytest.raises(ValueError, match=r"must be|need"):
            model.generate(**{"tokens_BL": prompt, "max_new_tokens": 1, **bad})


@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_zero_front_is_the_literal_right_shift(chunk):
    """Spread over the places of each own chunk, then shifted right by g - 1 with zeros coming in (SpiralFormer)."""
    for offset in range(chunk):
        z_BMD = torch.randn(2, (13 + offset) // chunk, D)
        kinds = {"read": False, "zero": True}
        up = {
            kind: UniformUpscale(chunk, offset, delay=0, own_chunk=False, target=(1, 0), zero_front=zero)
            for kind, zero in kinds.items()
        }
        own_BLD = up["zero"].spread(z_BMD).flatten(1, 2)[:, offset:]
        literal_BLD = torch.cat((torch.zeros(2, chunk - 1, D), own_BLD), dim=1)[:, :13]
        tokens = torch.zeros(2, 13, dtype=torch.long)
        placed = {kind: upscale(z_BMD, tokens=tokens) for kind, upscale in up.items()}
        assert torch.equal(placed["zero"], literal_BLD)
        assert torch.equal(placed["read"][:, chunk - 1 :], placed["zero"][:, chunk - 1 :])
        assert torch.equal(placed["read"], placed["zero"]) == (offset == 0)


def run_loop(topology, iterations, seed=0):
    """A tiny loop in double precision; also its input, the function of its core, and the model."""
    over = {
        "graph": {"h": {"topology": topology, "schedule": ["token"] * iterations}},
    }
    model = built(over, seed).double()
    seen = {}
    model.blocks.core.register_forward_hook(
        lambda module, args, out: seen.setdefault("calls", []).append((args[0], out))
    )
    model.head.register_forward_pre_hook(lambda module, args: seen.setdefault("out", args[0]))
    model(torch.randint(0, 17, (2, 9)))
    return model, seen


def test_a_dynamic_combination_weighs_the_update_too():
    """All three coefficients of each token come from one softmax over the state (MeSH, appendix E.2)."""
    model, seen = run_loop({"mix": {"of": ["residual", "anchor"], "weights": "dynamic"}}, 3)
    routers = [module.router for module in model.modules() if isinstance(module, MixtureJoin)]
    assert len(routers) == 3
    start = state = seen["calls"][0][0]
    for (entered, update), router in zip(seen["calls"], routers, strict=True):
        assert torch.allclose(entered, state, atol=1e-12)
        weights = (state @ router.weight.T + router.bias).softmax(-1)
        state = weights[..., 0:1] * update + weights[..., 1:2] * state + weights[..., 2:3] * start
    assert torch.allclose(seen["out"], state, atol=1e-12)


@pytest.mark.parametrize("settings", [{"stages": 3}, {"stages": 1}, {"stages": 4}, {"tableau": "rk4", "learned": True}])
def test_learned_runge_kutta_has_one_set_of_scalars(settings):
    """v_j = f(x + sum theta_jl v_l), x' = x + sum theta_j v_j; n (n + 1) / 2 scalars, none for x (R2N2)."""
    n = settings.get("stages", 4)
    model, seen = run_loop({"runge_kutta": settings}, 2 * n)
    joins = {name: module for name, module in model.named_modules() if isinstance(module, WeightedJoin)}
    assert sum(p.numel() for join in joins.values() for p in join.parameters()) == n * (n + 1) // 2
    with torch.no_grad():
        for join in joins.values():
            join.factors.uniform_(-1, 1)
    seen.clear()
    model(torch.randint(0, 17, (2, 9)))
    theta = [next((j.factors for name, j in joins.items() if name.endswith(f"stage{i}")), ()) for i in range(n)]
    last = next(join.factors for name, join in joins.items() if name.endswith("step"))
    state = seen["calls"][0][0]
    for first in (0, n):
        updates = []
        for j in range(n):
            entered, update = seen["calls"][first + j]
            point = state + sum(theta[j][i] * updates[i] for i in range(j))
            assert torch.allclose(entered, point, atol=1e-12)
            updates.append(update)
        state = state + sum(last[j] * updates[j] for j in range(n))
    assert torch.allclose(seen["out"], state, atol=1e-12)


def test_the_embedding_is_scaled_in_the_forward():
    """Equal at the start to weights drawn larger, but not once they are trained (MeSH, appendix B)."""
    archs = [tiny_arch({"graph": {"x": {"scale": scale}}}) for scale in ("none", "sqrt_d_model")]
    plain, scaled = (build_model(compile_arch(arch), seed=0) for arch in archs)
    tokens = torch.randint(0, 17, (2, 9))
    assert torch.allclose(plain(tokens), scaled(tokens), atol=1e-5)
    assert torch.allclose(scaled.embed.weight * math.sqrt(plain.embed.embedding_dim), plain.embed.weight, atol=1e-6)
    assert isinstance(scaled.embed, ScaledEmbedding)


def test_the_routers_before_the_loop_may_read_the_embedding():
    """Which of the two MeSH leaves open; the weights are the same."""
    logits = {}
    for entry in ("state", "embedding"):
        loop = {"in": "p", "topology": {"mesh": {"entry": entry}}}
        model = built({"graph": {"p": {"block": "core", "in": "x"}, "h": loop}})
        logits[entry] = model(torch.arange(9)[None])
    assert not torch.allclose(logits["state"], logits["embedding"])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_a_hidden_layer_of_the_head_is_the_papers(norm):
    """Norm, linear, GELU, linear (arXiv 2604.15259, code), written with PyTorch's own layers."""
    model = built({"graph": {"logits": {"hidden": True, "norm": norm}}, "norm_eps": 1e-5})
    given = {"rms": torch.nn.RMSNorm(16, eps=1e-5), "layer": torch.nn.LayerNorm(16), "none": torch.nn.Identity()}[norm]
    theirs = torch.nn.Sequential(given, torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 17, bias=False))
    head = model.get_submodule("head")
    values = [*head.norm.norm.parameters(), *head.norm.hidden.parameters(), head.logits.weight]
    for parameter, value in zip(theirs.parameters(), values, strict=True):
        parameter.copy_(value)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(head(x), theirs(x))
