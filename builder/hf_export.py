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
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from builder.bundle import save_weights
from builder.compiler import compile_arch
from builder.ir import Graph
from builder.lowering import Part, Step, build_model, init_settings, steps_of, why_undecodable
from builder.part_sources import library, names_in, sources_of
from searchspace.arch import ArchSpec
from searchspace.decode import encode
from searchspace.disk import new_folder, read_json, write_file
from searchspace.errors import SpecError
from spiralformer.decoding import Clock
from spiralformer.embedding import Head, ScaledEmbedding
from spiralformer.init import initial_values
from spiralformer.model import SpiralFormer

MODELING, _CONFIG = "modeling_spiralformer.py", "config.json"
_FILES = ("README.md", "architecture.svg", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TOLERANCE = 1e-5
"""In single precision; in half precision four of its steps."""
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
    tolerance = max(_TOLERANCE, 4 * torch.finfo(ours.dtype).eps) if ours.dtype.itemsize < 4 else _TOLERANCE
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
    head = _HEAD.format(name=graph.name, arch_id=graph.arch_id)
    tail = _TAIL.format(
        arch_id=graph.arch_id,
        undecodable=undecodable,
        vocab_size=graph.vocab_size,
        initial=_initial(graph),
        logits="None" if graph.tie_embeddings else "self.model.head.logits",
    )
    return "\n\n".join([head, _imports(f"{parts}\n\n{body}"), *([parts] if parts else []), _STATE, body, tail]) + "\n"


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
    lines = _ALWAYS | {imports[name] for name in used if name in imports}
    standard = {line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    return "\n".join([*sorted(standard), "", *sorted(lines - standard)])


_ALWAYS = {
    "import re",
    "import torch",
    "import torch.nn.functional as F",
    "from torch import Tensor, nn",
    "from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel",
    "from transformers.modeling_outputs import CausalLMOutputWithPast",
    "from transformers.utils import logging",
}

_HEAD = '''"""{name} ({arch_id}), generated by SpiralFormer search: the parts it uses, and its compiled graph.

Shape legend: B batch, L tokens, M latents, G chunk, D model, V vocabulary.
"""

from __future__ import annotations'''

_STATE = textwrap.dedent(
    '''
    class KeyValueCache:
        """Keys and values (B, K, L, H) of one layer at one call site; grows."""

        def __init__(self):
            self.keys = self.values = None

        @property
        def length(self):
            return 0 if self.keys is None else self.keys.shape[2]

        def append(self, k_BKLH, v_BKLH):
            if self.keys is not None:
                k_BKLH = torch.cat((self.keys, k_BKLH), dim=2)
                v_BKLH = torch.cat((self.values, v_BKLH), dim=2)
            self.keys, self.values = k_BKLH, v_BKLH
            return k_BKLH, v_BKLH


    class DecodeState:
        """What decoding remembers: caches by call site, open chunks by pool, updates to be read by up-scaling."""

        def __init__(self, caches, pools, upscales):
            self.position = 0
            self.caches, self.pools, self.upscales = caches, pools, upscales

        def get_seq_length(self, layer_idx=0):
            return self.position

        def reorder_cache(self, beams_B):
            """Follow beam search."""
            for cache in (cache for caches in self.caches.values() for cache in caches if cache.keys is not None):
                cache.keys, cache.values = cache.keys[beams_B], cache.values[beams_B]
            for pool in self.pools.values():
                pool.parts = [[part[beams_B] for part in parts] for parts in pool.parts]
            for upscale in self.upscales.values():
                upscale.updates_BGD = {chunk: update[beams_B] for chunk, update in upscale.updates_BGD.items()}
    '''
).strip()

_TAIL = '''
{initial}
"""How weights begin that no checkpoint holds: normal with this deviation, or filled; others are zero."""

LOSS_SETTINGS = ("num_items_in_batch", "shift_labels", "ignore_index")
NOT_OFFERED = ("output_attentions", "output_hidden_states")
logger = logging.get_logger(__name__)


class SpiralFormerConfig(PretrainedConfig):
    """Facts of the model in this file; but for the vocabulary's size, changing them does not change it."""

    model_type = "spiralformer"

    def __init__(self, arch_id="{arch_id}", is_causal=True, vocab_size={vocab_size}, **settings):
        super().__init__(**settings)
        self.arch_id, self.is_causal, self.vocab_size = arch_id, is_causal, vocab_size


class SpiralFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: logits, loss, and `generate` with a cache for each level."""

    config_class = SpiralFormerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _supports_sdpa = True
    undecodable = {undecodable!r}

    def __init__(self, config):
        super().__init__(config)
        if config.arch_id != "{arch_id}":
            raise ValueError(f"config.json describes {{config.arch_id}}, this file {arch_id}")
        self.model = SpiralFormerModel(config.vocab_size)
        for name, module in self.model.named_modules():
            path = re.sub(r"\\.\\d+(?=\\.|$)", ".*", name) + "."
            own = dict(module.named_parameters(recurse=False))
            module.initial_values = {{key: INITIAL.get(path.lstrip(".") + key, ("fill", 0.0)) for key in own}}
        self.post_init()

    def _init_weights(self, module):
        missing = [
            (name, parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        if hasattr(module, "reset") and (missing or type(module).__name__ == "Rotary"):
            module.reset()  # begins as it says; rotary tables are computed, not loaded
            return
        for name, parameter in missing:
            draw, value = getattr(module, "initial_values", {{}}).get(name, ("normal", 0.02))
            with torch.no_grad():
                parameter.fill_(value) if draw == "fill" else parameter.normal_(0.0, value)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.model.embed

    def set_input_embeddings(self, value):
        self.model.embed = value

    def get_output_embeddings(self):
        return {logits}

    def set_output_embeddings(self, value):
        if self.get_output_embeddings() is not None:  # else the head reads the embedding itself
            self.model.head.logits = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache_position=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **settings,
    ):
        """Logits (B, L, V), and the mean loss of predicting ``labels`` (B, L) from what is before; -100 is left out.

        ``logits_to_keep``: how many at the end, or which positions; 0 for all. Settings of the loss are those of
        transformers' losses: ``num_items_in_batch``, ``shift_labels``, ``ignore_index``.
        """
        loss_settings = {{name: settings.pop(name) for name in LOSS_SETTINGS if name in settings}}
        kinds = settings.pop("token_type_ids", None)  # what some tokenizers add, all of one kind
        if kinds is not None and kinds.any():
            settings["token_type_ids"] = kinds
        unknown = [name for name, value in settings.items() if value is not None and value is not False]
        for name in set(unknown) & set(NOT_OFFERED):
            unknown.remove(name)
            logger.warning_once(f"{{name}}: this model gives none")
        if unknown:
            raise TypeError(f"forward() does not know {{', '.join(unknown)}}: it would have no effect")
        if input_ids is None:
            raise ValueError("give input_ids: embeddings can't be given instead")
        state = past_key_values
        first = 0 if state is None else state.position
        for positions in (position_ids, cache_position):
            self._check_inputs(input_ids, attention_mask, positions, use_cache, first)
        if use_cache and state is None and not self.undecodable and not self.training:
            state = self.new_state()
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if state is None:
            logits = self.model(input_ids)
        elif state.position == 0:
            logits = self.model.prefill(input_ids, state, 0 if labels is not None else last)
        else:
            each = [self.model.decode(input_ids[:, i : i + 1], state) for i in range(input_ids.shape[1])]
            logits = torch.stack(each, dim=1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **loss_settings)
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        elif last:
            logits = logits[:, -last:]
        if not (getattr(self.config, "return_dict", True) if return_dict is None else return_dict):
            return tuple(value for value in (loss, logits, state) if value is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state)

    def _check_inputs(self, input_ids, attention_mask, position_ids, use_cache, first):
        """What would have no effect, or the wrong one, is refused."""
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError("attention_mask: give one of shape (B, L); who sees whom is the architecture's")
            if not attention_mask.bool().all():
                tokens = attention_mask.bool().int()
                if (tokens[:, 1:] > tokens[:, :-1]).any():
                    raise ValueError("padding on the left moves the chunk grid: pad on the right, or use batch size 1")
                if use_cache:
                    raise ValueError("prompts of different lengths can't share one cache: use batch size 1")
            if attention_mask.dtype != torch.bool and ((attention_mask != 0) & (attention_mask != 1)).any():
                raise ValueError("attention_mask: holds other numbers than 0 and 1; packed texts can't be told apart")
        if position_ids is not None:
            length = input_ids.shape[1]
            wrong = position_ids != torch.arange(first, first + length, device=position_ids.device)
            if attention_mask is not None:
                wrong = wrong & attention_mask[:, -length:].bool()  # of padding it does not matter
            if wrong.any():
                raise ValueError("position_ids: are counted from the first token; packed texts can't be told apart")

    def new_state(self):
        """An empty `DecodeState`."""
        return self.model.new_state()

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **unused
    ):
        cached = use_cache and not self.undecodable
        if cached and past_key_values is not None and past_key_values.position:
            input_ids = input_ids[:, past_key_values.position :]
        return {{
            "input_ids": input_ids,
            "past_key_values": past_key_values if cached else None,
            "attention_mask": attention_mask,
            "use_cache": cached,
            "logits_to_keep": 1,
        }}'''.strip()
