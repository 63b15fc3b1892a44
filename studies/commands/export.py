"""From a study's journal and checkpoints to a bundle."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from builder.exchange.bundle import Bundle, load_bundle, read_manifest, save_bundle
from builder.exchange.hf_export import export_hf
from builder.exchange.torch_export import export_torch
from builder.graph.compiler import compile_arch
from builder.halting import Halt
from builder.lowering import build_model
from searchspace.disk import parse_json, probe_folder
from searchspace.errors import SpecError, one_of, show
from searchspace.plugin_loading import owner
from searchspace.plugins import names, needing, provided
from searchspace.tables import complete, table
from spiralformer.model import SpiralFormer
from studies.config import StudyConfig
from studies.data.codec import ENDS, TOKENIZER, Bytes, byte_tokenizer, codec_of_bundle, read_tokenizer
from studies.data.dataset import Dataset
from studies.records.folder import EXPORTS, check_links
from studies.records.reading import read_study
from studies.records.trial import TrialRecord, identity_of
from studies.report.ranking import best_of, rest_of_front
from studies.sections import check_training
from studies.show.summary import cost_lines, draw_strip, summarize
from studies.show.svg import draw_svg
from studies.show.terminal import say
from studies.strategy.driver import rungs_of, trial_store, trials_store
from studies.tasks.table import tell
from studies.training.checkpoint import attempts_in, load_checkpoint


def export_trial(
    records: Sequence[TrialRecord],
    study_folder: Path,
    corpus: Dataset,
    settings: StudyConfig,
    *,
    number: int | None = None,
    out: Path | None = None,
) -> Path:
    """Write the bundle of one trial.

    Args:
        records: of the study.
        study_folder: of the study.
        corpus: of the study.
        settings: of the study.
        number: the trial; None takes the best that spent the full budget.
        out: the bundle's folder; None is ``export/trial-N`` in the study folder.

    Returns:
        The bundle's folder.

    Raises:
        SpecError: if there is no such trial, or the weights that it ended with are gone.
    """
    record = _choose(records, number)
    if settings.train is not None:
        what = f"was trained by {settings.train}, which alone has its weights"
        remedy = "studies.open_study(FOLDER).trials[N].arch_spec() is its architecture"
        raise SpecError(f"trial {record.number}", what, remedy)
    if out is None:
        check_links(study_folder)
        out = study_folder / EXPORTS / f"trial-{record.number}"
    arch, model = record.arch_spec(), trained_model(record, study_folder, corpus, settings)
    facts = {
        "trial": record.number,
        "choices": record.choices,
        "training": record.training,
        "seed": record.seed,
        "metrics": {
            **record.rungs[-1].metrics,
            "training_flops": record.flops,
            "tokens": record.tokens,
            "steps": record.steps,
        },
        "data": asdict(corpus.facts),
        "data_settings": settings.data.settings(),
    }
    files = [corpus.folder / TOKENIZER] if (corpus.folder / TOKENIZER).is_file() else []
    return save_bundle(
        out,
        arch,
        model,
        card=_card(record, corpus),
        facts=facts,
        files=files,
    )


def trained_model(record: TrialRecord, study_folder: Path, corpus: Dataset, settings: StudyConfig) -> SpiralFormer:
    """A complete trial's model, with the weights that it ended with. Raises `SpecError` if they are gone."""
    attempts = attempts_in(trial_store(trials_store(settings, study_folder.absolute()), record.number))
    training, rungs = check_training(record.training), rungs_of(record, settings)
    identity = identity_of(
        record.arch_id, record.seed, training, rungs, corpus.facts.content, decayed=record.purpose == "ladder"
    )
    state = load_checkpoint(attempts, identity, record.steps)
    if state is None:
        raise SpecError(
            f"trial {record.number}",
            f"its checkpoint at step {record.steps}, the last, is missing or damaged",
            "export another trial",
            file=str(study_folder),
        )
    with needing(record.plugins, file=str(study_folder)):  # another version would be another model
        model = build_model(compile_arch(record.arch_spec()), seed=None)
        model.load_state_dict(state["model"])
    return model


@complete
@dataclass(frozen=True, slots=True)
class Format:
    """What a trained model can be written as."""

    name: str
    words: str
    suffix: str
    """Of the file or folder, where nobody names it."""
    write: Callable[[Path, Path], Path] | None
    """(the bundle's folder, where to) -> where to, once it is written; None: it is the bundle. The place's folder is
    there."""
    is_compared: bool = False
    """Whether ``write`` loads what it wrote again and holds it to the model."""


def _to_torch(bundle: Path, out: Path) -> Path:
    loaded = load_bundle(bundle)
    if loaded.halt is not None:
        what = f"a program runs all iterations, and this model's loop ends at rest ({loaded.halt})"
        raise SpecError("--format torch", what, "give --format hf, or leave out --halt")
    return export_torch(out, loaded.arch, loaded.model)


def _to_hf(bundle: Path, out: Path) -> Path:
    loaded = load_bundle(bundle)
    facts = loaded.manifest
    files = {"README.md": _hf_card(loaded, out.name), "architecture.svg": draw_svg(loaded.arch)}
    text = facts.get("data", {}).get("text", "none")
    if text != "none" or (bundle / TOKENIZER).is_file():
        codec = codec_of_bundle(bundle, loaded)  # what is passed on can be read
        given = byte_tokenizer() if isinstance(codec, Bytes) else read_tokenizer(bundle).decode("utf-8")
        files[TOKENIZER] = given
        end = _end_token(given)
        files["tokenizer_config.json"] = json.dumps(_tokenizer_config(end, loaded.arch.seq_len), indent=2)
        if end is not None:
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end["id"])
            files["generation_config.json"] = json.dumps(ids, indent=2)
    kept: dict[str, Any] = {n: facts[n] for n in ("trial", "metrics", "data", "seed", "training") if n in facts}
    return export_hf(out, loaded.arch, loaded.model, files=files, facts=kept, halt=loaded.halt)


FORMATS = table(
    "an export format",
    (
        Format("bundle", "a bundle", "", None),
        Format("hf", "a folder for Hugging Face", "-hf", _to_hf, is_compared=True),
        Format("torch", "one torch.export program, .pt2", ".pt2", _to_torch, is_compared=True),
    ),
    places="format",
)


def convert_bundle(folder: Path, form: str, out: Path) -> Path:
    """A bundle in another format.

    Args:
        folder: of the bundle.
        form: a row of `FORMATS`.
        out: folder or file to write.

    Raises:
        SpecError: if the bundle is damaged, or what was written does not compute the same.
    """
    row = FORMATS[form]
    if row.write is None:
        return folder
    try:
        written = row.write(folder, out)
    except Exception as error:
        if row.is_compared or isinstance(error, SpecError):
            raise
        what = f"of plugin {owner('format', form)} fails: {type(error).__name__}: {error}"
        raise SpecError(f"format {form}", what, "mend it") from error
    if not out.exists():
        raise SpecError(f"format {form}", "wrote nothing to the place that it was given", "mend it", str(out))
    return written


_MADE_ANEW = ("format", "arch_id", "cost", "versions", "sha256", "plugins", "metrics", "trained_arch_id", "halt")
"""Of a manifest: what a new bundle says itself."""


def _end_token(tokenizer: str) -> dict[str, Any] | None:
    """The special token that ends a document, of a tokenizer.json."""
    found = parse_json(tokenizer)
    added = found.get("added_tokens") if isinstance(found, dict) else None
    special = [token for token in added or [] if isinstance(token, dict) and token.get("special")]
    return next((token for token in special if token.get("content") in ENDS and isinstance(token.get("id"), int)), None)


def _tokenizer_config(end: dict[str, Any] | None, length: int) -> dict[str, Any]:
    ends = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), end["content"])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **ends,
    }


def _hf_card(bundle: Bundle, name: str) -> str:
    """The model card: front matter for the hub, use, picture, cost and metrics."""
    arch, facts = bundle.arch, bundle.manifest
    metrics = facts.get("metrics", {})
    rows = "\n".join(f"| {what.strip()} | {value} |" for what, value in cost_lines(bundle.cost))
    measured = ""
    data, flops = facts.get("data", {}), metrics.get("training_flops")
    if (told := tell(data.get("task", "text_lm"), metrics)) and isinstance(flops, int | float):
        source = data.get("source", "data that it does not name")
        measured = f"{told.capitalize()}, after\n{flops:.3g} training FLOPs on {source}.\n\n"
    is_text = data.get("text", "none") != "none"
    use = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("def ", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))"""
    if not is_text:
        use = f"""import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
logits_BLV = model(torch.zeros(1, {arch.seq_len}, dtype=torch.long)).logits"""
    decodes = "once in parallel and once token by token" if arch.causal else "all positions at once"
    if bundle.halt is not None:
        decodes = (
            f"all positions at once.\nThe loop ends where a row has come to rest ({bundle.halt}): the cost below is of "
            "all its iterations, `model.model.halting.used` says how many the last batch took, and there is no cache"
        )
    return f"""---
library_name: transformers
{"pipeline_tag: text-generation" + chr(10) if is_text else ""}tags: [spiralformer, looped-transformer]
---

# {arch.name}

`{summarize(arch)}`, found by SpiralFormer search.

{measured}```python
{use}
```

`modeling_spiralformer.py` is generated: the forward pass is straight-line code, {decodes}.
Batches may be padded on the left or on the right: with an `attention_mask` every row is computed as it would be alone.

![the architecture as a ladder: time across, resolution down](architecture.svg)

| cost at {bundle.cost.seq_len} tokens | |
|---|---|
{rows}

```yaml
{arch.to_yaml()}```
"""


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


def _card(record: TrialRecord, corpus: Dataset) -> str:
    """The model card."""
    arch = record.arch_spec()
    graph = compile_arch(arch)
    strip = draw_strip(graph)
    costs = "\n".join(f"| {what.strip()} | {value} |" for what, value in cost_lines(record.cost))
    choices = "\n".join(f"- `{name}`: {value}" for name, value in record.choices.items()) or "- none (a baseline)"
    levels = f"Chunks of each level on the first tokens (`>` closes a chunk):\n\n```\n{strip}\n```\n\n" if strip else ""
    return f"""# {arch.name}, trial {record.number}

`{summarize(arch)}`: {tell(corpus.facts.task, record.rungs[-1].metrics)},
after {record.flops:.3g} training FLOPs ({record.tokens:,} tokens of {corpus.facts.source}).

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


def reschedule(bundle: Path, schedules: Sequence[str], out: Path, halt: Halt | None = None) -> Path:
    """A bundle of the same weights that runs otherwise; what was measured before is told apart.

    Args:
        bundle: folder.
        schedules: as ``h=30``.
        out: folder of the new one.
        halt: when its loop of most iterations stops; default: as the bundle says.

    Raises:
        SpecError: if the weights don't fit, or there is no loop to stop.
    """
    loaded = load_bundle(bundle, schedules=schedules, halt=halt)
    own = {name: value for name, value in loaded.manifest.items() if name not in _MADE_ANEW}
    trained = {name: loaded.manifest[name] for name in ("trained_arch_id", "metrics") if name in loaded.manifest}
    files = [bundle / TOKENIZER] if (bundle / TOKENIZER).is_file() else []
    until = "" if loaded.halt is None else f", until a row rests ({loaded.halt})"
    card = f"# {loaded.arch.name}\n\n`{summarize(loaded.arch)}`{until}: trained to run otherwise.\n"
    facts = {**own, "trained": trained, **({} if loaded.halt is None else {"halt": str(loaded.halt)})}
    return save_bundle(out, loaded.arch, loaded.model, card=card, facts=facts, files=files)


def run_export(
    folder: Path,
    console: Console,
    *,
    number: int | None,
    form: str,
    out: Path | None,
    schedules: Sequence[str] = (),
    halt: Halt | None = None,
) -> None:
    """Export a trial of a study, or convert a bundle, and say where to.

    Args:
        folder: of a study, or a bundle.
        console: to say it on.
        number: of the trial; None: the best.
        form: a name in `FORMATS`.
        out: where to; None: a place of its own.
        schedules: to run the loops under, as ``h=30``; what is written knows no other.
        halt: when the loop of most iterations stops, for good.

    Raises:
        SpecError: if there is no such format, trial or place, or what was written computes something else.
    """
    if form not in FORMATS and not provided("format", form):
        raise SpecError(
            "--format", f"unknown format {show(form)}", one_of(dict.fromkeys((*FORMATS, *names("format"))), form)
        )
    suffix = FORMATS[form].suffix
    if out is not None:
        probe_folder(out.parent, "-o")
        if form == "torch" and out.suffix != suffix:
            raise SpecError("-o", f"{show(str(out))} is no name for a program", f"end it in {suffix}")
    others, as_it_is = "", not schedules and halt is None
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / "manifest.json").is_file():
            records, corpus, settings = read_study(folder)
            place = out if form == "bundle" and as_it_is else Path(scratch) / "bundle"
            bundle = export_trial(records, folder, corpus, settings, number=number, out=place)
            facts = read_manifest(bundle)
            what = f"trial {facts['trial']}, {tell(facts['data'].get('task', 'text_lm'), facts['metrics'])}"
            target = out or folder / EXPORTS / f"trial-{facts['trial']}{suffix}"
            if number is None:
                others = rest_of_front(records, settings.objectives, facts["trial"], corpus)
        elif (form == "bundle" and as_it_is) or number is not None:
            raise SpecError("", "is a bundle already", "give --format hf or torch, and no --trial", file=str(folder))
        else:
            bundle, what = folder, "the bundle"
            target = out or folder.with_name(folder.name + (suffix or "-changed"))
        if target.exists() and target.resolve() == folder.resolve():
            raise SpecError("-o", f"{target} is what is read", "give another place")
        if not as_it_is:
            changes = [f"under {', '.join(schedules)}"] * bool(schedules) + [f"halt: {halt}"] * (halt is not None)
            what = f"{what}; to run otherwise: {', '.join(changes)}"
            bundle = reschedule(bundle, schedules, target if form == "bundle" else Path(scratch) / "rescheduled", halt)
        if form == "bundle":
            say(console, f"exported {what}, to {bundle}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with console.status("writing, loading again and comparing"):
                convert_bundle(bundle, form, target)
            compared = "; loaded again, it computes the same" if FORMATS[form].is_compared else ""
            say(console, f"exported {what}, to {target}{compared}")
    if others:
        say(console, f"it is {others}")
