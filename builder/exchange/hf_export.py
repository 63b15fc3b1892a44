"""A model for Hugging Face: a folder that loads with torch and transformers alone.

``modeling_spiralformer.py`` is generated: the parts that this one model uses, as they stand in `spiralformer`, and the
compiled graph as straight-line code, once in parallel and once token by token.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from builder.code import Ending, between_embedding_and_head, model_code, steps_of, why_undecodable
from builder.exchange.bundle import save_weights
from builder.exchange.hf_template import ALWAYS, CACHE, HEAD, MODEL, NO_CACHE
from builder.exchange.source import library, names_in
from builder.graph.blocks import ffn_dim
from builder.graph.compiler import compile_arch
from builder.graph.ir import Graph, Level
from builder.graph.passes import without_losses
from builder.graph.row import PartCall, PartName
from builder.halting import Halt, ending_of
from builder.lowering import build_model, init_settings, names_of, source_of
from searchspace.arch import ArchSpec, head_dim
from searchspace.disk import new_folder, read_json, write_file
from searchspace.errors import SpecError
from searchspace.plain import encode
from searchspace.plugin_loading import PluginRecord, check_unchanged, plugin_of
from searchspace.plugins import used_by
from spiralformer.init import initial_values
from spiralformer.model import SpiralFormer

MODELING, _CONFIG = "modeling_spiralformer.py", "config.json"
_FILES = ("README.md", "architecture.svg", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TOLERANCE = 1e-5
"""In half precision, whose steps are larger, four of them."""
_CHECKED_TOKENS = 16  # enough to go round the clocks of common levels


def export_hf(
    folder: Path,
    arch: ArchSpec,
    model: SpiralFormer,
    *,
    files: dict[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    halt: Halt | None = None,
) -> Path:
    """Write config, weights and code, then load them again and compare with the model.

    Args:
        folder: where to; made if need be.
        arch: of the model.
        model: to be exported, on the CPU.
        files: further text files by name (README.md, tokenizer.json, ...).
        facts: JSON-able, kept in ``config.json`` under ``training``.
        halt: when the loop of most iterations stops, as it does in the model.

    Returns:
        The folder.

    Raises:
        SpecError: if transformers is missing, or what was written does not compute what the model does.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SpecError("--format hf", "needs transformers", "pip install 'spiralformer[hf]'")
    graph, ending = compile_arch(arch), None if halt is None else ending_of(arch, halt)
    if halt is not None and halt.by == "logits":
        what = "transformers makes the logits outside of the loop's model, so it can't end by them"
        raise SpecError("--halt", what, "stop it by its state: state=0.01")
    with new_folder(folder, hf_contents, "an export") as work:
        write_file(work / MODELING, modeling_code(graph, ending))
        write_file(work / _CONFIG, json.dumps(_config(graph, arch, model, facts or {}, ending), indent=2) + "\n")
        weights = {exported_name(name): value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
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


def _facts(graph: Graph, ending: Ending | None) -> dict[str, Any]:
    """What other tools look for in a configuration; where blocks differ, of the one whose layers run most often."""
    runs: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "block":
            runs[node.attr("block", str)] = runs.get(node.attr("block", str), 0) + graph.block_of(node).layers
    heads = {}
    if runs:
        block = graph.blocks[max(runs, key=lambda name: runs[name])]
        heads = {
            "num_attention_heads": block.heads,
            "num_key_value_heads": block.kv_heads or block.heads,
            "head_dim": head_dim(block, graph.d_model),
            "intermediate_size": ffn_dim(block, graph.d_model),
        }
    return {
        "arch_id": graph.arch_id,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.d_model,
        "num_hidden_layers": graph.num_layers,
        **heads,
        "max_position_embeddings": graph.seq_len,
        "tie_word_embeddings": graph.tie_embeddings,
        "is_causal": graph.causal,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "use_cache": not why_undecodable(graph, ending),
        **({"halt": f"{ending.by}={ending.threshold:g}"} if ending is not None else {}),
    }


def _config(
    graph: Graph, arch: ArchSpec, model: SpiralFormer, facts: Mapping[str, Any], ending: Ending | None
) -> dict[str, Any]:
    module = MODELING.removesuffix(".py")
    return {
        "model_type": "spiralformer",
        "architectures": ["SpiralFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SpiralFormerConfig",
            "AutoModel": f"{module}.SpiralFormerModel",
            "AutoModelForCausalLM": f"{module}.SpiralFormerForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.SpiralFormerForSequenceClassification",
        },
        **_facts(graph, ending),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "architecture": encode(arch),
        **({"training": dict(facts)} if facts else {}),
        **({"plugins": [record.to_plain() for record in used]} if (used := used_by(arch)) else {}),
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
    loaded.generation_config.eos_token_id = None  # ours goes on after the end of a text
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
    if not graph.causal:
        return
    prompt_BL = tokens_BL[:, : max(1, length // 2)]
    count = max(1, min(_CHECKED_TOKENS, graph.seq_len - prompt_BL.shape[1]))
    mine = model.generate(prompt_BL, count, temperature=0.0)
    yours = loaded.generate(prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=count, do_sample=False)
    if not torch.equal(mine, yours):
        raise SpecError("", "the exported model continues a text otherwise", "report this as a bug", str(folder))


def modeling_code(graph: Graph, ending: Ending | None = None) -> str:
    """The generated module: self-contained, for torch and transformers."""
    inner_graph = without_losses(graph)  # losses of its own are training's, and of the architecture's id
    steps, undecodable = steps_of(inner_graph), why_undecodable(graph, ending)
    inner = between_embedding_and_head(steps)
    made = {step.target: step.part for step in inner if step.target is not None and step.part is not None}
    made = {"embed": next(step.part for step in steps if step.node.op == "embed" and step.part), **made}
    if ending is not None:
        made["halting"] = ending.made_for(inner)
    functions = model_code(graph, inner, ending=ending).replace("def forward(", "def run(", 1)
    model = MODEL.format(
        undecodable=json.dumps(undecodable),
        sees_padding=not graph.causal or ending is not None,
        facts="FACTS = " + _literal(_facts(graph, ending)),
        initial="INITIAL = " + _literal(_initial(graph)),
        sites="\n".join(
            f"    Site(Clock{tuple(level)}, {layers}, {heads})," for level, layers, heads in _sites(inner_graph)
        ),
        makers=_makers(made),
        functions=textwrap.indent(functions, "    ").rstrip(),
        tied={"lm_head.weight": "model.embed.weight"} if graph.tie_embeddings else None,
    )
    cache = NO_CACHE if undecodable else CACHE
    classes = {name for part in made.values() for name in names_of(part)}
    plugins = tuple(importlib.import_module(module) for module in sorted({module for module, _ in classes} - {""}))
    for record in {record for module in plugins if isinstance(record := plugin_of(module.__name__), PluginRecord)}:
        check_unchanged(record)
    if nested := next((value for part in made.values() for value in _plugin_names(part) if "." in value), None):
        raise SpecError("", f"{nested} stands within another class or function", "define it at the top of its module")
    known = library(decodes=not undecodable, plugins=plugins)
    beside = {name for text in (cache, model) for name in _defined_in(text)}
    wanted = {*classes, *(("", name) for name in names_in(model) | names_in(cache))}
    parts, imports = known.travelling(wanted, beside)
    carried = "".join(f"\nCarries code of plugin {plugin_of(module.__name__)}." for module in plugins)
    head = HEAD.format(name=graph.name, arch_id=graph.arch_id, carried=carried)
    code = "\n\n".join([head, _imports(f"{parts}\n\n{cache}\n\n{model}", imports), parts, f"\n{cache}\n", model])
    return code + "\n"


def _sites(graph: Graph) -> list[tuple[Level, int, int]]:
    """The calls of blocks in the order of the code: level, layers, heads."""
    blocks = [(node.level, graph.block_of(node)) for node in graph.nodes if node.op == "block"]
    return [(level, block.layers, block.heads) for level, block in blocks]


def _makers(made: Mapping[str, PartCall]) -> str:
    holders = sorted({".".join(target.split(".")[:i]) for target in made for i in range(1, len(target.split(".")))})
    lines = [f"        self.{name} = nn.Module()" for name in holders]
    lines += [_wrap(f"        self.{target} = {source_of(_of_any_vocabulary(part))}") for target, part in made.items()]
    return "\n".join(lines)


def _literal(rows: Mapping[str, object]) -> str:
    return "{\n" + "".join(f'    "{name}": {value!r},\n'.replace("'", '"') for name, value in rows.items()) + "}"


def _of_any_vocabulary(part: PartCall) -> PartCall:
    """The part with the vocabulary's size as a name: it may be resized."""
    place = {"nn.Embedding": 0, "embedding.ScaledEmbedding": 0}.get(part.name.path)
    if place is None:
        return part
    return replace(part, args=(*part.args[:place], _Name("config.vocab_size"), *part.args[place + 1 :]))


class _Name(str):
    """Code, not text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _initial(graph: Graph) -> dict[str, tuple[str, float]]:
    """How parameters begin, by name, numbers of layers as ``*``."""
    model = build_model(graph, device="meta")
    rows: dict[str, tuple[str, float]] = {}
    for name, (draw, value) in initial_values(model, **init_settings(graph)).items():
        if draw == "normal" or (draw == "fill" and value):
            rows[re.sub(r"\.\d+(?=\.)", ".*", exported_name(name).removeprefix("model."))] = (draw, value)
    return rows


def exported_name(name: str) -> str:
    """What a weight is called in an export: head and norm stand where transformers looks for them."""
    if name == "head.logits.weight":
        return "lm_head.weight"
    return f"model.norm.{name.removeprefix('head.norm.')}" if name.startswith("head.norm.") else f"model.{name}"


def _wrap(line: str) -> str:
    """A block's settings one below the other."""
    head, opening, settings = line.partition("BlockConfig(")
    if not opening:
        return line
    rows = "".join(f"                {setting},\n" for setting in re.split(r", (?=\w+=)", settings.removesuffix("))")))
    return f"{head}\n            BlockConfig(\n{rows}            )\n        )"


def _plugin_names(value: object) -> Iterator[str]:
    """Qualified names of the classes of plugins in a part."""
    if isinstance(value, PartName) and value.module:
        yield value.path.partition(":")[2]
    if isinstance(value, PartCall):
        for part in (value.name, *value.args, *value.settings.values()):
            yield from _plugin_names(part)


def _defined_in(code: str) -> set[str]:
    return {node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _imports(code: str, found: Mapping[str, str]) -> str:
    used = names_in(code) - {"torch", "nn", "F"}
    lines = ALWAYS | {line for name, line in found.items() if name in used}
    standard = {line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    return "\n".join([*sorted(standard), "", *sorted(lines - standard)])
