"""Search with a training loop of one's own: any framework, any data; the search asks for one number a rung.

python examples/own_training.py runs/own_training            # in this process
python examples/own_training.py runs/own_training --ray      # on Ray workers
"""

import sys

import torch

from builder import build_model, compile_arch
from studies import TrialSpec, search

SPACE = {
    "vocab_size": 16,
    "seq_len": 32,
    "d_model": {"choice": [16, 32]},
    "levels": {"token": {"chunk": 1}, "word": {"chunk": 4}},
    "blocks": {"core": {"layers": 1, "heads": 2}},
    "graph": {
        "x": {"embed": "tokens"},
        "h": {
            "loop": "core",
            "in": "x",
            "schedule": {"sequence": {"of": ["word", "token"], "length": [1, 3]}},
            "topology": {"choice": ["residual", "anchor"]},
        },
        "logits": {"head": "lm", "in": "h"},
    },
}


def train(spec: TrialSpec):
    """Learn to say again what stood eight tokens ago."""
    torch.manual_seed(spec.seed)
    model = build_model(compile_arch(spec.arch), seed=spec.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps_done, steps = 0, int(spec.training.tokens) // (8 * 32)
    for share in spec.rungs:  # of the budget; one number is due at each
        while steps_done < round(share * steps):
            tokens = torch.randint(16, (8, 40))
            logits = model(tokens[:, 8:])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-8].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps_done += 1
        yield loss.item()


if __name__ == "__main__":
    study = search(
        SPACE,
        dir=sys.argv[1],
        train=train,
        training={"tokens": 4e3},
        budget={"params": {"max": "60K"}},
        num_trials=6,
        enqueue=[{"d_model": 32}],
        ray="--ray" in sys.argv,
    )
    print(study.to_dataframe()[["architecture", "state", "loss", "params"]].sort_values("loss"))
    print(f"best: trial {study.best.number}, {study.headline.text(study.best.score)}")
