"""How fast a candidate is priced, against building it on the meta device and counting.

    python benchmarks/pricing.py [SPACE]

Both figures come from one run on one thread; the ratio is what to quote.
"""

from __future__ import annotations

import json
import sys
import time

from rich.console import Console
from rich.table import Table

from builder import compile_arch, estimate
from searchspace import load_space

PRICED, COUNTED, SPARE = 1000, 20, 3


def main() -> None:
    space = load_space(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
    for seed in range(SPARE):
        estimate(compile_arch(space.sample(seed).arch))
    start = time.perf_counter()
    for seed in range(PRICED):
        graph = compile_arch(space.sample(seed).arch)
        estimate(graph)
        assert graph.arch_id
    priced = (time.perf_counter() - start) / PRICED
    assert "torch" not in sys.modules, "pricing must not import torch"

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from builder import build_model

    torch.set_num_threads(1)
    graphs = [compile_arch(space.sample(seed).arch) for seed in range(COUNTED + SPARE)]
    counted = 0.0
    for i, graph in enumerate(graphs):
        start = time.perf_counter()
        model = build_model(graph, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, graph.seq_len, dtype=torch.long, device="meta"))
        if i >= SPARE:
            counted += (time.perf_counter() - start) / COUNTED
        assert counter.get_total_flops() == estimate(graph).flops

    figures = {
        "space": space.name,
        "candidates_per_second": 1 / priced,
        "ms_per_candidate": priced * 1e3,
        "ms_build_on_meta_and_count": counted * 1e3,
        "ratio": counted / priced,
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,.2f}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
