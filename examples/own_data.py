"""Search on data of one's own: an object with three members, made where it is needed, never written to a file.

python examples/own_data.py runs/own_data
"""

import sys

import torch

from studies import search


class Additions:
    """Sums of two numbers of three digits, read from the right: ``312+4=...``; only the sum's digits count."""

    vocab_size = 12  # ten digits, + and =
    digest = "1"  # changes when the examples do

    def batch(self, seed, step, batch_size, seq_len):
        return self.make(torch.Generator().manual_seed(1_000_003 * seed + step), batch_size)

    def eval_batches(self, tokens, batch_size, seq_len):
        generator = torch.Generator().manual_seed(2**40)
        for _ in range(max(1, tokens // (batch_size * seq_len))):
            yield self.make(generator, batch_size)

    def make(self, generator, rows):
        a, b = torch.randint(0, 1000, (2, rows, 1), generator=generator)
        digits = [(n // 10**i) % 10 for n in (a, b) for i in range(3)]
        plus, equals = torch.full((rows, 1), 10), torch.full((rows, 1), 11)
        total = torch.cat([((a + b) // 10**i) % 10 for i in range(4)], dim=1)
        text = torch.cat([*digits[:3], plus, *digits[3:], equals, total], dim=1)
        targets = text[:, 1:].clone()
        targets[:, :7] = -100  # the question is given
        return text[:, :-1], targets

    def measure(self, logits, targets):
        """Beside the loss: how many digits are right."""
        asked = targets != -100
        return {"digits": ((logits.argmax(-1) == targets) & asked).sum() / asked.sum()}


if __name__ == "__main__":
    study = search(
        {
            "extends": "plain_4",
            "vocab_size": 12,
            "seq_len": 11,
            "d_model": 32,
            "blocks": {"stack": {"layers": {"int": [1, 3]}, "heads": {"choice": [1, 2, 4]}}},
        },
        dir=sys.argv[1],
        data=Additions(),
        training={"tokens": 2e4, "batch_tokens": 704, "lr": 1e-2},
        num_trials=5,
        settings={"search": {"stopper": "none"}},
    )
    print(study.to_dataframe()[["architecture", "loss", "digits", "params"]].sort_values("loss"))
    best = study.export(f"{sys.argv[1]}-best")
    print(f"exported trial {study.best.number} to {best}")
