"""From a study's journal and checkpoints to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from builder.bundle import save_bundle
from builder.compiler import compile_arch
from builder.lowering import build_model
from searchspace.errors import SpecError
from studies.checkpoint import Store, newest_checkpoint
from studies.data import Corpus
from studies.describe import cost_lines, draw_strip, summarize
from studies.report import best_of
from studies.trial import TrialRecord


def export_trial(
    records: Sequence[TrialRecord],
    study_folder: Path,
    corpus: Corpus,
    *,
    trials: Store | None = None,
    number: int | None = None,
    out: Path | None = None,
) -> Path:
    """Write the bundle of one trial.

    Args:
        records: of the study.
        study_folder: of the study.
        corpus: of the study.
        trials: where its trials' checkpoints lie; None: in its folder.
        number: the trial; None takes the best that spent the full budget.
        out: the bundle's folder; None is ``export/trial-N`` in the study folder.

    Returns:
        The bundle's folder.

    Raises:
        SpecError: if there is no such trial, or its weights are gone.
    """
    record = _choose(records, number)
    store = (trials or Store(study_folder / "trials")).inside(f"{record.number:05d}")
    state = newest_checkpoint([store.inside(name) for name in store.names() if name.startswith("attempt-")])
    if state is None:
        raise SpecError(
            f"trial {record.number}",
            "its checkpoint is missing or damaged",
            "export another trial",
            file=str(study_folder),
        )
    arch = record.arch_spec()
    model = build_model(compile_arch(arch), seed=None)
    model.load_state_dict(state["model"])
    loss = record.rungs[-1].loss
    facts = {
        "trial": record.number,
        "choices": record.choices,
        "training": record.training,
        "seed": record.seed,
        "metrics": {
            "loss": loss,
            "bits_per_byte": corpus.bits_per_byte(loss),
            "training_flops": record.flops,
            "tokens": record.tokens,
            "steps": record.steps,
        },
        "data": asdict(corpus.facts),
    }
    return save_bundle(
        out or study_folder / "export" / f"trial-{record.number}", arch, model, card=_card(record, corpus), facts=facts
    )


def _choose(records: Sequence[TrialRecord], number: int | None) -> TrialRecord:
    if number is None:
        best = best_of(records)
        if best is None and (baseline := best_of(records, purpose="baseline")) is not None:
            raise SpecError(
                "",
                "only the baseline has spent its full budget yet",
                f"go on searching, or give --trial {baseline.number}",
            )
        if best is None:
            raise SpecError("", "no trial has spent its full budget yet", "run search again to go on")
        return best
    found = next((record for record in records if record.number == number), None)
    if found is None:
        raise SpecError(f"trial {number}", "is not in this study", f"give 0 .. {len(records) - 1}")
    if found.state != "complete":
        complete = ", ".join(str(record.number) for record in records if record.state == "complete")
        raise SpecError(
            f"trial {number}", f"was {found.state}; only complete trials keep their weights", f"give one of: {complete}"
        )
    return found


def _card(record: TrialRecord, corpus: Corpus) -> str:
    """The model card."""
    arch = record.arch_spec()
    graph = compile_arch(arch)
    strip = draw_strip(graph)
    costs = "\n".join(f"| {what.strip()} | {value} |" for what, value in cost_lines(record.cost))
    choices = "\n".join(f"- `{name}`: {value}" for name, value in record.choices.items()) or "- none (a baseline)"
    levels = f"Chunks of each level on the first tokens (`>` closes a chunk):\n\n```\n{strip}\n```\n\n" if strip else ""
    return f"""# {arch.name}, trial {record.number}

`{summarize(arch)}`: held-out loss {record.rungs[-1].loss:.4f} nats per token,
{corpus.bits_per_byte(record.rungs[-1].loss):.4f} bits per byte, after {record.flops:.3g} training FLOPs
({record.tokens:,} tokens of {corpus.facts.source}).

```python
from builder import load_bundle

model = load_bundle("path/to/this/folder").model
logits_BLV = model(tokens_BL)
```

{levels}| cost at {record.cost.seq_len} tokens | |
|---|---|
{costs}

Decisions:

{choices}

Compiled graph:

```
{graph.to_text()}```
"""
