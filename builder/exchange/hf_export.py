"""A model for Hugging Face: a folder that loads with torch and transformers alone.

``modeling_spiralformer.py`` is generated: the parts that this one model uses, as they stand in `spiralformer`, and the
compiled graph as straight-line code, once in parallel and once token by token.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builder.exchange.bundle import save_weights
from builder.exchange.hf_template import ALWAYS, HEAD, STATE, TAIL
from builder.exchange.source import library, names_in, sources_of
from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph
from builder.lowering import Part, Step, build_model, init_settings, steps_of, why_undecodable
from searchspace.arch import ArchSpec
from searchspace.disk import new_folder, read_json, write_file
from searchspace.errors import SpecError
from searchspace.plain import encode
from spiralformer.decoding import Clock
from spiralformer.embedding import Head, ScaledEmbedding
from spiralformer.init import initial_values
from spiralformer.model import SpiralFormer

MODELING, _CONFIG = "modeling_spiralformer.py", "config.json"
_FILES = ("README.md", "architecture.svg", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TOLERANCE = 1e-5
"""In half precision, whose steps are larger, four of them."""
_CHECKED_TOKENS = 16


def export_hf(
    folder: Path,
    arch: ArchSpec,
    model: SpiralFormer,
    *,
    files: dict[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write config, weights and code, then load them again and compare with the model.

    Args:
        folder: where to; made if need be.
        arch: of the model.
        model: to be exported, on the CPU.
        files: further text files by name (README.md, tokenizer.json, ...).
        facts: JSON-able, kept in ``config.json`` under ``training``.

    Returns:
        The folder.

    Raises:
        SpecError: if transformers is missing, or what was written does not compute what the model does.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SpecError("--format hf", "needs transformers", "pip install 'spiralformer[hf]'")
    graph = compile_arch(arch)
    with new_folder(folder, hf_contents, "an export") as work:
        write_file(work / MODELING, modeling_code(graph))
        write_file(work / _CONFIG, json.dumps(_config(graph, arch, model, facts or {}), indent=2) + "\n")
        weights = {f"model.{name}": value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
        save_weights(weights, work / "model.safetensors", {"format": "pt"})
        for name, text in (files or {}).items():
            write_file(work / name, text)
        _prove(work, model, graph)
    return folder


def hf_contents(folder: Path) -> set[str] | None:
    """Names of what `export_hf` and the files given to it may be; None if the folder is no export."""
    try:
        config = read_json(folder / _CONFIG)
    except SpecError:
        return None
    ours = isinstance(config, dict) and config.get("model_type") == "spiralformer" and (folder / MODELING).is_file()
    return {MODELING, _CONFIG, "model.safetensors", *_FILES} if ours else None


def _config(graph: Graph, arch: ArchSpec, model: SpiralFormer, facts: Mapping[str, Any]) -> dict[str, Any]:
    module = MODELING.removesuffix(".py")
    return {
        "model_type": "spiralformer",
        "architectures": ["SpiralFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SpiralFormerConfig",
            "AutoModelForCausalLM": f"{module}.SpiralFormerForCausalLM",
        },
        "arch_id": graph.arch_id,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.d_model,
        "num_hidden_layers": graph.num_layers,
        "max_position_embeddings": graph.seq_len,
        "tie_word_embeddings": graph.tie_embeddings,
        "is_causal": graph.causal,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "architecture": encode(arch),
        **({"training": dict(facts)} if facts else {}),
    }


def _prove(folder: Path, model: SpiralFormer, graph: Graph) -> None:
    """Load what was written as anybody would, and compare logits and greedy continuations."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    was_training = model.training
    model.eval()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded.eval()
    length = min(graph.seq_len, 192)
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, graph.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        ours, theirs = model(tokens_BL), loaded(tokens_BL).logits
    model.train(was_training)
    gap = float((ours - theirs).abs().max())
    tolerance = max(_TOLERANCE, 4 * torch.finfo(ours.dtype).eps)
    if not gap <= tolerance * max(1.0, float(ours.abs().max())):
        raise SpecError("", f"the exported model's logits differ by {gap:.2g}", "report this as a bug", str(folder))
    if why_undecodable(graph):
        return
    prompt_BL = tokens_BL[:, : max(1, length // 2)]
    mine = model.generate(prompt_BL, _CHECKED_TOKENS, temperature=0.0)
    yours = loaded.generate(
        prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=_CHECKED_TOKENS, do_sample=False
    )
    if not torch.equal(mine, yours):
        raise SpecError("", "the exported model continues a text otherwise", "report this as a bug", str(folder))


def modeling_code(graph: Graph) -> str:
    """The generated module: self-contained, for torch and transformers."""
    steps = steps_of(graph)
    modules = {step.target: step.part for step in steps if step.target is not None and step.part is not None}
    undecodable = why_undecodable(graph)
    body = "\n\n".join(_model_class(graph, steps, undecodable))
    roots = [name for part in modules.values() for name in names_in(str(part))]
    parts = sources_of([*roots, "_PoolState", "_UpscaleState"] if not undecodable else roots)
    head = HEAD.format(name=graph.name, arch_id=graph.arch_id)
    tail = TAIL.format(
        arch_id=graph.arch_id,
        undecodable=undecodable,
        vocab_size=graph.vocab_size,
        initial=_initial(graph),
        logits="None" if graph.tie_embeddings else "self.model.head.logits",
    )
    return "\n\n".join([head, _imports(f"{parts}\n\n{body}"), *([parts] if parts else []), STATE, body, tail]) + "\n"


def _model_class(graph: Graph, steps: Sequence[Step], undecodable: str) -> Iterator[str]:
    made = {step.target: step.part for step in steps if step.target is not None and step.part is not None}
    holders = sorted({".".join(target.split(".")[:i]) for target in made for i in range(1, len(target.split(".")))})
    makers = [f"        self.{name} = nn.Module()" for name in holders]
    makers += [_wrap(f"        self.{target} = {_of_any_vocabulary(part)}") for target, part in made.items()]
    logits = next(step.label for step in steps if step.node.name == graph.output)
    yield (
        "class SpiralFormerModel(nn.Module):\n"
        f'    """The compiled graph of {graph.name}: tokens (B, L) to logits (B, L, V)."""\n\n'
        "    def __init__(self, vocab_size):\n        super().__init__()\n" + "\n".join(makers)
    )
    yield (
        "    def forward(self, tokens):\n"
        '        """All positions at once."""\n' + "\n".join(_lines(steps)) + f"\n        return {logits}"
    )
    if undecodable:
        return
    blocks = {step.label: graph.block_of(step.node).layers for step in steps if step.node.op == "block"}
    yield from _new_state(steps, blocks)
    yield (
        "    def prefill(self, tokens, state, keep=0):\n"
        '        """A prompt at once into an empty state; logits of the last ``keep`` tokens, or of all for 0."""\n'
        + "\n".join(_lines(steps, prefill=True))
        + f"\n        state.position = tokens.shape[1]\n        return {logits}"
    )
    yield (
        "    def decode(self, tokens, state):\n"
        '        """One more token (B, 1); its logits (B, V). A level\'s lines run when a chunk of it closes."""\n'
        "        token = state.position\n"
        + "\n".join(_decode_lines(steps))
        + f"\n        state.position += 1\n        return {logits}[:, -1]"
    )


def _of_any_vocabulary(part: Part) -> Part:
    """The part with the vocabulary's size as a name: it may be resized."""
    place = {nn.Embedding: 0, ScaledEmbedding: 0, Head: 1}.get(part.make)  # type: ignore[call-overload]
    if place is None:
        return part
    return replace(part, args=(*part.args[:place], _Name("vocab_size"), *part.args[place + 1 :]))


class _Name(str):
    """Code, not text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _initial(graph: Graph) -> str:
    """How parameters begin, by name, numbers of layers as ``*``."""
    model = build_model(graph, device="meta")
    rows: dict[str, tuple[str, float]] = {}
    for name, (draw, value) in initial_values(model, **init_settings(graph)).items():
        if draw == "normal" or value:
            rows[re.sub(r"\.\d+(?=\.)", ".*", name)] = (draw, value)
    return "INITIAL = {\n" + "".join(f'    "{name}": {row!r},\n'.replace("'", '"') for name, row in rows.items()) + "}"


def _wrap(line: str) -> str:
    """A block's settings one below the other."""
    head, opening, settings = line.partition("BlockConfig(")
    if not opening:
        return line
    rows = "".join(f"                {setting},\n" for setting in settings.removesuffix("))").split(", "))
    return f"{head}\n            BlockConfig(\n{rows}            )\n        )"


def _new_state(steps: Sequence[Step], layers: Mapping[str, int]) -> Iterator[str]:
    def rows(kind: str, value: Callable[[Step], str]) -> str:
        lines = "".join(f'                "{s.label}": {value(s)},\n' for s in steps if s.site.kind == kind)
        return "{\n" + lines + "            }" if lines else "{}"

    yield (
        "    def new_state(self):\n"
        '        """Nothing decoded yet."""\n'
        "        return DecodeState(\n"
        f"            caches={rows('block', lambda s: f'[KeyValueCache() for _ in range({layers[s.label]})]')},\n"
        f"            pools={rows('pool', lambda s: f'_PoolState(self.{s.target})')},\n"
        f"            upscales={rows('upscale', lambda s: f'_UpscaleState(self.{s.target})')},\n"
        "        )"
    )


def _lines(steps: Sequence[Step], *, prefill: bool = False) -> Iterator[str]:
    heading = ""
    for step in steps:
        place = _place(step)
        if place != heading:
            yield f"        # {place}"
            heading = place
        yield f"        {step.label} = {_call(step, 'prefill' if prefill else 'forward')}"


def _place(step: Step) -> str:
    chunk, offset = step.site.clock
    where = "tokens" if chunk == 1 else f"chunks of {chunk}" + (f", offset {offset}" if offset else "")
    loop, _, rest = step.node.name.partition(".t")
    number = rest.partition(".")[0]
    return f"{loop}, iteration {int(number) + 1}: {where}" if number.isdigit() else where


def _call(step: Step, mode: str) -> str:
    """The right-hand side of one line."""
    inputs = [f"self.{name}" if name == "embed.weight" else name for name in step.inputs]
    if step.target is None:
        return " + ".join(inputs)
    settings = [f"{name}={value}" for name, value in step.settings.items()]
    if mode != "forward" and step.site.kind == "block":
        settings.append(f'caches=state.caches["{step.label}"]')
    if mode == "prefill" and step.site.kind in ("pool", "upscale"):
        return f'state.{step.site.kind}s["{step.label}"].prefill({", ".join(inputs)})'
    if mode == "prefill" and step.site.kind == "head":
        inputs[0] = f"{inputs[0]}[:, -keep:]"
    return f"self.{step.target}({', '.join([*inputs, *settings])})"


def _decode_lines(steps: Sequence[Step]) -> Iterator[str]:
    """Lines under the clock of their level; neighbours share one ``if``."""
    guard = ""
    for step in steps:
        for clock, line in _decode_step(step):
            condition = _ticks(clock)
            if condition != guard and condition:
                yield f"        if {condition}:"
            guard = condition
            yield ("            " if condition else "        ") + line


def _decode_step(step: Step) -> Iterator[tuple[Clock, str]]:
    clock, source, label = step.site.clock, step.site.source, step.label
    if step.site.kind == "pool":
        yield source, f'state.pools["{label}"].push({step.inputs[0]})'
        yield clock, f'{label} = state.pools["{label}"].close()'
    elif step.site.kind == "upscale":
        yield source, f'state.upscales["{label}"].receive({step.inputs[0]})'
        position = f"(token + {clock.offset + 1}) // {clock.chunk} - 1" if clock != (1, 0) else "token"
        like = "self.embed.weight.new_zeros(tokens.shape[0], self.embed.embedding_dim)"
        yield clock, f'{label} = state.upscales["{label}"].read({position}, {like})'
    else:
        yield clock, f"{label} = {_call(step, 'decode')}"


def _ticks(clock: Clock) -> str:
    return "" if clock.chunk == 1 else f"(token + {clock.offset + 1}) % {clock.chunk} == 0"


def _imports(code: str) -> str:
    _, imports = library()
    used = names_in(code) - {"torch", "nn", "F"}
    lines = ALWAYS | {imports[name] for name in used if name in imports}
    standard = {line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    return "\n".join([*sorted(standard), "", *sorted(lines - standard)])
