"""The prefix law, and rows of a batch as strangers: over every operation, the shipped small files and random draws.

``pytest -s tests/spiralformer/test_laws.py`` prints how many cases there were and the largest difference.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import ARCHITECTURES, SPACES, TOPOLOGIES, built, tiny_arch

from builder import build_model, compile_arch
from builder.graph.ops import OPS
from builder.laws import randomize
from searchspace import load_arch, load_space
from searchspace.nodes import FfnKind, NormPlace, PoolKind, RecallKind, ResidualKind, UpscaleKind
from searchspace.tables import options

LENGTHS = (1, 2, 3, 6, 7, 12, 17)
VOCAB = 17
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PREFIXES = {torch.float64: range(1, 19), torch.float32: (5, 18)}


def loop(schedule, topology="anchor", **more):
    return {"graph": {"h": {"schedule": schedule, "topology": topology, **more}}}


def tiny_cases():
    """What is laid over the tiny architecture, by name."""
    for pool, upscale in itertools.product(options(PoolKind), options(UpscaleKind)):
        level = {"chunk": 4, "offset": 3, "pool": pool, "upscale": upscale}
        yield (
            f"{pool} {upscale}",
            {"levels": {"word": level}, **loop([{"level": "word", "delay": 2}, "phrase", "token"])},
        )
    for topology in TOPOLOGIES:
        yield (
            str(topology),
            loop(["phrase", "word", "token", "word"], topology, recall="linear", norm="rms", step="add"),
        )
    for recall in options(RecallKind):
        yield f"recall {recall}", loop(["word", "token"], "residual", recall=recall, step="scale")
    for place, residual in itertools.product(options(NormPlace), options(ResidualKind)):
        core = {"norm_place": place, "residual": residual, "recall": "linear", "kv_heads": 1, "qk_norm": True}
        yield f"{place} {residual}", {"blocks": {"core": core}}
    for ffn in options(FfnKind):
        yield ffn, {"blocks": {"core": {"ffn": ffn, "norm": "layer", "bias": True, "parallel_residual": True}}}
    for window in (1, 3, 4):
        core = {"window": window, "kv_heads": 1, "layers": 2}
        yield f"window {window}", {"blocks": {"core": core}, **loop(["word", "token"], "residual")}
    yield "segments", loop(["word", "token"], "anchor", iterations={"segments": 2})
    yield "noise", loop(["word", "token"], "residual", noise=0.1)
    yield "loss of its own", {"graph": {"z": {"loss": "z", "in": "logits"}}}
    for tie in (False, True):
        yield f"hidden layer {tie}", {"graph": {"logits": {"hidden": True}}, "tie_embeddings": tie}
    yield "last token", {"levels": {"word": {"positions": "last_token"}}, "tie_embeddings": True}
    yield "zero front", {"levels": {"phrase": {"front": "zero", "offset": 5}}}
    yield "scaled embedding", {"graph": {"x": {"scale": "sqrt_d_model"}, "h": {"topology": "mesh"}}}
    nested = {
        "a": {"pool": "word", "in": "x"}, "b": {"block": "core", "in": "a"}, "c": {"pool": "phrase", "in": "b"},
        "e": {"upscale": "word", "in": "c", "delay": 1}, "f": {"join": "mixture", "in": ["e", "b", "a"]},
        "g": {"upscale": "token", "in": "f"}, "n": {"norm": "layer", "in": "g"}, "y": {"join": "sum", "in": ["n", "x"]},
    }  # fmt: skip
    yield "a pool of a pool", {"graph": {"h": None, **nested, "logits": {"head": "lm", "in": "y"}}}


def cases():
    for name, over in tiny_cases():
        yield name, tiny_arch(over)
    for file in ARCHITECTURES:
        if file.stem.endswith("small"):
            yield file.stem, load_arch(file)
    for file in SPACES:
        space = load_space(file)
        for seed in range(3):
            if (arch := space.sample(seed).arch).causal:
                yield f"{file.stem} {seed}", arch


CASES = dict(cases())
FAST = [name for name in CASES if not name.endswith("small")]


def model_of(name, dtype=torch.float64):
    return randomize(build_model(compile_arch(CASES[name]))).to(dtype)


def rows_of(lengths, vocab=VOCAB):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def padded(rows, side):
    """Tokens and mask, padded with other tokens on the left, on the right, or on both sides."""
    width = max(map(len, rows)) + (side == "both")
    tokens = torch.randint(0, VOCAB, (len(rows), width), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        room = width - len(row)
        first = {"left": room, "right": 0, "both": room // 2}[side]
        tokens[i, first : first + len(row)], mask[i, first : first + len(row)] = row, 1
    return tokens, mask


def test_every_operation_is_in_the_grid():
    used = {node.op for arch in CASES.values() for node in compile_arch(arch).nodes}
    assert set(OPS) - used == {"join.base", "arrange", "mean"}  # stands for its input; look at all positions


@torch.no_grad()
def test_the_logits_of_a_prefix_are_the_prefix_of_the_logits():
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for name in CASES:
        for dtype, tolerance in TOLERANCE.items():
            model, tokens = model_of(name, dtype), torch.stack(rows_of([19, 19]))
            whole = model(tokens)
            scale = max(1.0, float(whole.abs().max()))
            for length in PREFIXES[dtype]:
                gap = float((model(tokens[:, :length]) - whole[:, :length]).abs().max()) / scale
                assert gap <= tolerance, (name, dtype, length, gap)
                worst[dtype] = max(worst[dtype], gap)
    print(f"\nprefix law: {len(CASES)} models, largest difference {worst}")


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_rows_of_a_batch_are_strangers(side):
    """Forward, prefill and decoding of rows of different lengths, against each row alone."""
    worst, count = 0.0, 0
    for name in CASES:
        model = model_of(name)
        rows = rows_of([length + 3 for length in LENGTHS])
        prompts = [row[:-3] for row in rows]
        alone = [model(row[None])[0] for row in rows]
        scale = max(1.0, *(float(logits.abs().max()) for logits in alone))
        tokens, mask = padded(rows, side)
        logits = model(tokens, mask)
        gaps = [(logits[i][mask[i].bool()] - alone[i]).abs().max() for i in range(len(rows))]
        tokens, mask = padded(prompts, side)
        state = model.decode_state(len(rows))
        steps = [model.prefill(tokens, state, mask)]
        steps += [model.decode(torch.stack([row[i - 3] for row in rows]), state) for i in range(3)]
        for step, logits in enumerate(steps):
            gaps += [(logits[i] - alone[i][len(rows[i]) - 4 + step]).abs().max() for i in range(len(rows))]
        gap = float(max(gaps)) / scale
        assert gap <= 1e-9, (name, gap)
        worst, count = max(worst, gap), count + len(gaps)
    print(f"\nragged batches, padded {side}: {count} rows of {len(CASES)} models, largest difference {worst:.2g}")


@torch.no_grad()
def test_long_ragged_decoding_in_single_precision():
    """Rows begin at different places of every chunk, and go round each clock more than twice; at initial weights."""
    for name in FAST:
        model, rows = build_model(compile_arch(CASES[name])).eval(), rows_of([length + 20 for length in LENGTHS])
        tokens, mask = padded([row[:-20] for row in rows], "left")
        alone = [model(row[None])[0] for row in rows]
        state = model.decode_state(len(rows), max_len=max(map(len, rows)))
        logits = [model.prefill(tokens, state, mask)]
        logits += [model.decode(torch.stack([row[i - 20] for row in rows]), state) for i in range(20)]
        for i, row in enumerate(rows):
            gap = (torch.stack([step[i] for step in logits]) - alone[i][len(row) - 21 :]).abs().max()
            assert gap <= 1e-4 * max(1.0, float(alone[i].abs().max())), name


@pytest.mark.parametrize("cached", [True, False])
def test_generation_continues_each_row_as_alone(cached):
    for name in FAST[::3]:
        model, rows = model_of(name), rows_of(LENGTHS)
        for side in ("left", "right"):
            tokens, mask = padded(rows, side)
            together = model.generate(tokens, 6, attention_mask=mask, temperature=0.0, use_cache=cached)
            assert torch.equal(together[:, : tokens.shape[1]], tokens)
            for i, row in enumerate(rows):
                single = model.generate(row[None], 6, temperature=0.0, use_cache=cached)
                assert torch.equal(together[i, -6:], single[0, -6:]), (name, side, i)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_rows_of_models_that_see_their_whole_input_are_strangers(side):
    for name, over in tiny_cases():
        model = built({**over, "causal": False}).double()
        rows = rows_of(LENGTHS)
        tokens, mask = padded(rows, side)
        logits = model(tokens, mask)
        assert logits.isfinite().all()
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][mask[i].bool()], model(row[None])[0], atol=1e-9, rtol=1e-9, msg=name)


def test_padding_does_not_train():
    """Gradients are those of the rows alone, and numbers, for a model that sees its whole input."""
    model = built({"causal": False}).double()
    rows = rows_of(LENGTHS)
    tokens, mask = padded(rows, "left")
    model.zero_grad()
    model(tokens, mask)[mask.bool()].square().sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in rows:
        model(row[None]).square().sum().backward()
    for ours, alone in zip(together, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize(
    ("mask", "what"),
    [([[1, 0, 1]], "one run"), ([[0, 0, 0]], "one run"), ([[1, 2, 2]], "other numbers"), ([[1, 1]], "expected")],
)
def test_masks_that_mean_something_else_are_refused(mask, what):
    with pytest.raises(ValueError, match=what):
        built()(torch.zeros(1, 3, dtype=torch.long), torch.tensor(mask))


@pytest.mark.parametrize("name", [name for name, _ in tiny_cases()])
def test_every_parameter_can_move(name):
    """No operation has a parameter whose gradient is always zero.

    Of the hand-written cases alone: a random wiring may cut a part off (learned up-scaling that is pooled by the mean again
    gives the same whatever its shares are).
    """
    model, tokens = model_of(name), torch.stack(rows_of([23, 23, 23, 23]))
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(1)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-14]
    assert still == [], "its output does not depend on them: leave them out, as softmax does not see a common bias"


@torch.no_grad()
def test_copies_keep_methods_and_class():
    model, tokens = built(), torch.stack(rows_of([9, 9]))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(other(tokens), model(tokens))
        assert torch.equal(other.generate(tokens, 3, temperature=0.0), model.generate(tokens, 3, temperature=0.0))
    stacked, _ = torch.func.stack_module_state([model, copy.deepcopy(model)])
    assert next(iter(stacked.values())).shape[0] == 2


@torch.no_grad()
def test_a_copied_state_goes_its_own_way():
    """A prompt is run once and continued twice; the weights are not copied."""
    model, tokens = built({"graph": {"h": {"topology": "mesh"}}}).double(), torch.stack(rows_of([11, 11]))
    state = model.decode_state(2)
    model.prefill(tokens[:, :6], state)
    other = copy.deepcopy(state)
    assert all(getattr(other[site], "block", None) is getattr(state[site], "block", None) for site in state.memories)
    for i in range(6, 11):
        model.decode(tokens[:, i].flip(0), other)
    for i in range(6, 11):
        logits = model.decode(tokens[:, i], state)
    torch.testing.assert_close(logits, model(tokens)[:, -1], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_model_on_meta_takes_weights():
    graph, tokens = compile_arch(tiny_arch()), torch.stack(rows_of([9, 9]))
    model, empty = build_model(graph).eval(), build_model(graph, device="meta").eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tokens), model(tokens))
    assert torch.equal(empty.generate(tokens, 3, temperature=0.0), model.generate(tokens, 3, temperature=0.0))
