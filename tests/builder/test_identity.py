"""Identities, prices and initial weights that refactors must not change.

Every shipped architecture and 500 draws from `families` as it once was: the shipped one gets new choices, which would
change every draw. After a deliberate change run ``pytest tests/builder/test_identity.py --update-golden`` and say in
the commit which ids moved, and why.
"""

import json
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from helpers import ARCHITECTURES, ROOT

from builder import build_model, compile_arch, estimate
from searchspace import load_arch, load_space
from searchspace.arch import ArchSpec

GOLDEN = ROOT / "tests/builder/golden/identity.json"
FAMILIES = ROOT / "tests/builder/golden/families.yaml"
DRAWS, WEIGHED = 500, 24


@lru_cache(maxsize=1)
def golden() -> dict[str, dict[str, list]]:
    return json.loads(GOLDEN.read_text())


def guarded() -> Iterator[tuple[str, ArchSpec]]:
    for file in ARCHITECTURES:
        yield file.stem, load_arch(file)
    space = load_space(FAMILIES)
    for seed in range(DRAWS):
        yield f"families {seed}", space.sample(seed).arch


def weighed() -> Iterator[tuple[str, ArchSpec]]:
    found = [(name, arch) for name, arch in guarded() if name.endswith("small") or name.startswith("families")]
    return iter(found[:WEIGHED])


def identity(arch: ArchSpec) -> list:
    graph = compile_arch(arch)
    cost = estimate(graph)
    return [
        graph.arch_id, cost.params, cost.params_non_embedding, cost.flops, cost.kv_cache_bytes, cost.decode_flops,
        cost.decode_flops_worst_token,
    ]  # fmt: skip


@torch.no_grad()
def weights(arch: ArchSpec) -> list[float]:
    """Sums that any change of an initial weight, of a name or of the computation moves."""
    model = build_model(compile_arch(arch), seed=3).eval()
    tokens = torch.arange(40)[None] * 7 % arch.vocab_size
    logits = model(tokens).double()
    moments = [float((p.double() * (i + 1)).sum()) for i, p in enumerate(model.parameters())]
    return [
        *(round(v, 6) for v in (sum(moments), logits.std().item())),
        *[round(v, 5) for v in logits[0, -1, :3].tolist()],
    ]


def test_ids_and_prices_stay(request):
    found = {name: identity(arch) for name, arch in guarded()}
    if request.config.getoption("--update-golden"):
        kept = {name: weights(arch) for name, arch in weighed()}
        rows = [
            f'"{part}": {{\n' + ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in table.items()) + "\n}"
            for part, table in (("identity", found), ("weights", kept))
        ]
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        golden.cache_clear()
    assert len(found) == len(ARCHITECTURES) + DRAWS
    assert [name for name, row in found.items() if golden()["identity"].get(name) != row] == []


def test_initial_weights_and_logits_stay():
    changed = []
    for name, arch in weighed():
        found = weights(arch)
        if found != pytest.approx(golden()["weights"][name], rel=1e-4, abs=1e-4):
            changed.append(name)
    assert changed == []


def test_the_guard_sees_a_changed_price_and_a_changed_weight():
    name, arch = next(weighed())
    assert identity(arch)[1:3] != identity(load_arch(ROOT / "searchspace/architectures/plain_4.yaml"))[1:3]
    model = build_model(compile_arch(arch), seed=4).requires_grad_(False)
    moments = sum(float((p.double() * (i + 1)).sum()) for i, p in enumerate(model.parameters()))
    assert moments != pytest.approx(golden()["weights"][name][0], rel=1e-4, abs=1e-4)
