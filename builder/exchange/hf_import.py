"""Weights from elsewhere: a GPT-NeoX or Llama checkpoint in the Hugging Face folder form becomes a bundle.

Only ``config.json``, safetensors and ``tokenizer.json`` are read; nothing is unpickled, no remote code runs. What a
checkpoint holds is decoded as our own files are: a setting or a tensor that would be ignored is refused, or named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from builder.exchange.bundle import FLOATS, bundle_contents, save_bundle
from builder.graph.compiler import compile_arch
from builder.lowering import build_model
from searchspace.arch import ArchSpec, BlockSpec
from searchspace.disk import check_regular, check_replaceable, read_json
from searchspace.errors import SpecError, one_of, show
from searchspace.nodes import BlockNode, EmbedNode, HeadNode
from searchspace.plain import decode, key

TOKENIZER = "tokenizer.json"
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_CONFIG_BYTES = 2**20  # config.json takes kilobytes

_NO_MATHS = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_cache",
))  # fmt: skip
"""Keys of config.json that say nothing of what a forward computes."""

T = TypeVar("T", bound="_Family")
Note: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rope:
    rope_type: Literal["default"] = key("Kind.", default="default")
    rope_theta: float | None = key("Base.", default=None, low=1.0, high=1e12)
    partial_rotary_factor: float | None = key("Share of a head that is rotated.", default=None, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """What the families share. A key that is absent has the family's own default."""

    max_position_embeddings: int = key("Longest input.", default=2048, low=2, high=1 << 24)
    tie_word_embeddings: bool = key("The head is the embedding.", default=False)
    attention_bias: bool = key("Biases in attention.", default=False)
    rope_parameters: _Rope | None = key("Rotation.", default=None)
    rope_scaling: _Rope | None = key("Rotation, as it was written once.", default=None)
    partial_rotary_factor: float | None = key("Share of a head that is rotated.", default=None, low=0.0, high=1.0)
    rope_theta: float | None = key("Base of the rotation.", default=None, low=1.0, high=1e12)

    def rope(self, base: float, share: float) -> tuple[float, float]:
        """(base, share of the head): the new form before the flat one, that before the family's default."""
        found = self.rope_parameters or self.rope_scaling or _Rope()
        bases = (found.rope_theta, self.rope_theta, base)
        shares = (found.partial_rotary_factor, self.partial_rotary_factor, share)
        return next(b for b in bases if b is not None), next(s for s in shares if s is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _NeoX(_Family):
    vocab_size: int = key("Tokens.", default=50432, low=2, high=1 << 24)
    hidden_size: int = key("Width.", default=6144, low=2, high=1 << 17)
    num_hidden_layers: int = key("Layers.", default=44, low=1, high=512)
    num_attention_heads: int = key("Heads.", default=64, low=1, high=1024)
    intermediate_size: int = key("Width of the feed-forward.", default=24576, low=1, high=1 << 20)
    hidden_act: Literal["gelu"] = key("Activation.", default="gelu")
    attention_bias: bool = key("Biases in attention.", default=True)
    use_parallel_residual: bool = key("Both branches read the same.", default=True)
    layer_norm_eps: float = key("Of the norms.", default=1e-5, low=1e-12, high=1.0)
    rotary_pct: float | None = key("Share of a head that is rotated.", default=None, low=0.0, high=1.0)
    rotary_emb_base: float | None = key("Base of the rotation.", default=None, low=1.0, high=1e12)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Llama(_Family):
    vocab_size: int = key("Tokens.", default=32000, low=2, high=1 << 24)
    hidden_size: int = key("Width.", default=4096, low=2, high=1 << 17)
    num_hidden_layers: int = key("Layers.", default=32, low=1, high=512)
    num_attention_heads: int = key("Heads.", default=32, low=1, high=1024)
    num_key_value_heads: int | None = key("Key-value heads.", default=None, low=1, high=1024)
    head_dim: int | None = key("Width of a head.", default=None, low=1, high=4096)
    intermediate_size: int = key("Width of the feed-forward.", default=11008, low=1, high=1 << 20)
    hidden_act: Literal["silu"] = key("Activation.", default="silu")
    mlp_bias: bool = key("Biases in the feed-forward.", default=False)
    rms_norm_eps: float = key("Of the norms.", default=1e-6, low=1e-12, high=1.0)


def import_hf(folder: str | Path, out: str | Path, *, note: Note = lambda text: None) -> Path:
    """Convert a checkpoint folder to a bundle whose logits equal `transformers`' own.

    Args:
        folder: holds ``config.json``, ``model.safetensors`` (or what its index names), and mostly ``tokenizer.json``.
        out: folder of the bundle.
        note: told of what the checkpoint holds and a bundle does not use.

    Raises:
        SpecError: if the folder, a setting or a tensor is not what this converter knows.
    """
    folder, out = Path(folder), Path(out)
    check_replaceable(out, bundle_contents, "a bundle")
    file = folder / _CONFIG
    if not file.is_file():
        raise SpecError("", f"holds no {_CONFIG}", "give a Hugging Face model folder", str(folder))
    try:
        plain = read_json(file, _CONFIG_BYTES)
        if not isinstance(plain, dict):
            raise SpecError("", f"is {show(plain)}, not a mapping", "download it again")
        kind = plain.get("model_type")
        if not isinstance(kind, str) or kind not in _FAMILIES:
            raise SpecError("model_type", f"can't import {show(kind)}", one_of(_FAMILIES, kind))
        family, to_arch, to_weights = _FAMILIES[kind]
        config = _decode(family, plain, note)
    except SpecError as error:
        error.file = error.file or str(file)
        raise
    tensors = _Tensors(folder)
    tied = config.tie_word_embeddings and _head_is_embedding(tensors, kind, note)
    try:
        arch = to_arch(config, tied)
        graph = compile_arch(arch)
    except SpecError as error:
        error.file = str(file)
        raise
    expected = build_model(graph, device="meta").state_dict()
    try:
        weights = to_weights(config, tied, tensors)
    except RuntimeError as error:  # a shape that can't be taken apart
        raise SpecError(
            "", f"tensors of another shape than {_CONFIG} says: {error}", "check it", str(folder)
        ) from error
    wrong = [n for n, value in expected.items() if n not in weights or weights[n].shape != value.shape]
    if wrong:
        what = f"tensors of another shape than {_CONFIG} says: {', '.join(wrong[:5])}"
        raise SpecError("", what, "check it", str(folder))
    tensors.check_all_used()
    model = build_model(graph, seed=None)
    model.load_state_dict(weights)
    text = (folder / TOKENIZER).is_file()
    if not text:
        note(f"there is no {TOKENIZER}: text can't be encoded for this model; save its tokenizer in the fast form")
    source = f"{folder.resolve().name}, imported"
    facts = {
        "imported": {"model_type": kind, "from": folder.resolve().name},
        "data": {"kind": "imported", "text": "tokenizer" if text else "none", "says_bytes": False, "source": source},
    }
    return save_bundle(out, arch, model, facts=facts, files=[folder / TOKENIZER] if text else [])


def _decode(family: type[T], plain: Mapping[str, Any], note: Note) -> T:
    known = {f.name for f in fields(family)}
    if plain.get("quantization_config") is not None:
        what = "the weights are quantized, which a bundle does not hold"
        raise SpecError("quantization_config", what, "give the checkpoint before quantization, or dequantize it")
    unused = [n for n, value in plain.items() if n not in known | _NO_MATHS and value not in (None, False)]
    if unused:
        note(f"{_CONFIG}: not used: {', '.join(show(name).strip(chr(39)) for name in unused)}")
    return decode(family, {name: value for name, value in plain.items() if name in known})


class _Tensors:
    """Tensors of a checkpoint, read when asked for: of ``model.safetensors``, or of what the index names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        self._used: set[str] = set()
        named = self._indexed()
        for file, names in named.items():
            check_regular(file)
            try:
                with safe_open(file, framework="pt") as tensors:
                    held = set(tensors.keys())
            except (SafetensorError, OSError) as error:
                raise SpecError("", f"can't be read: {error}", "download it again", str(file)) from error
            if names is not None and names != held:
                odd = sorted(names ^ held)[0]
                what = f"{_INDEX} and the file differ: {show(odd)} is in one alone"
                raise SpecError("", what, "download both again", str(file))
            self._file_of.update(dict.fromkeys(held, file))

    def _indexed(self) -> dict[Path, set[str] | None]:
        """Files, with the names of the tensors they are to hold."""
        single, index = self._folder / _SINGLE, self._folder / _INDEX
        if not index.is_file():
            if single.is_file():
                return {single: None}
            held = sorted(file.name for file in self._folder.glob("*.safetensors"))
            what = f"holds neither {_SINGLE} nor {_INDEX}" + (f", but {held[0]}" if held else "")
            raise SpecError("", what, "save the checkpoint with save_pretrained, safe serialization", str(self._folder))
        entries = read_json(index)
        weight_map = entries.get("weight_map") if isinstance(entries, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise SpecError("weight_map", f"is {show(weight_map)}", "download the index again", str(index))
        found: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file):
                raise SpecError(f"weight_map.{name}", f"{show(file)} is no file here", "download it again", str(index))
            names = found.setdefault(self._folder / file, set())
            assert names is not None
            names.add(name)
        if single.is_file() and single not in found:
            what = f"holds {_SINGLE} and an index of other files"
            raise SpecError("", what, "remove the one that is not the model", str(self._folder))
        return found

    def __call__(self, name: str) -> Tensor:
        """One tensor. Raises `SpecError` if it is missing, quantized, or not finite."""
        if name not in self._file_of:
            raise SpecError("", f"the checkpoint has no tensor {name}", "is it whole?", str(self._folder))
        file = self._file_of[name]
        with safe_open(file, framework="pt") as tensors:
            if (dtype := tensors.get_slice(name).get_dtype()) not in FLOATS:
                what = f"{name} is stored as {dtype}, which needs scales to mean anything"
                raise SpecError("", what, "give weights as F32, F16 or BF16", str(file))
            value: Tensor = tensors.get_tensor(name)
        if not torch.isfinite(value).all():
            raise SpecError("", f"{name} holds values that are not finite", "download it again", str(file))
        self._used.add(name)
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def check_all_used(self) -> None:
        """Raise `SpecError` for tensors that nobody asked for and that are no known buffers."""
        left = sorted(n for n in self._file_of.keys() - self._used if not _BUFFER.search(n))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            what = f"holds what {_CONFIG} does not tell of: {', '.join(map(show, left[:3]))}{more}"
            raise SpecError("", what, "check that both are of one model", str(self._file_of[left[0]]))


_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$")
_HEADS = {"gpt_neox": ("embed_out.weight", "lm_head.weight"), "llama": ("lm_head.weight",)}
_EMBEDDINGS = {"gpt_neox": "gpt_neox.embed_in.weight", "llama": "model.embed_tokens.weight"}


def _head_is_embedding(tensors: _Tensors, kind: str, note: Note) -> bool:
    """Whether a model that says so has no head of its own."""
    for name in _HEADS[kind]:
        if name in tensors and not torch.equal(tensors(name), tensors(_EMBEDDINGS[kind])):
            note(f"{_CONFIG} says tie_word_embeddings, but {name} is another than the embedding: it is kept")
            return False
    return True


def _plain(
    config: _NeoX | _Llama, name: str, block: BlockSpec, tied: bool, *, norm: Literal["layer", "rms"], eps: float
) -> ArchSpec:
    """Embedding, one stack, head."""
    return ArchSpec(
        name=name,
        vocab_size=config.vocab_size,
        seq_len=config.max_position_embeddings,
        d_model=config.hidden_size,
        tie_embeddings=tied,
        norm_eps=eps,
        blocks={"stack": block},
        graph={
            "x": EmbedNode(embed="tokens"),
            "y": BlockNode(block="stack", input="x"),
            "logits": HeadNode(head="lm", input="y", norm=norm),
        },
    )


def _head(kind: str, tied: bool, take: _Tensors) -> Iterator[tuple[str, Tensor]]:
    if not tied:
        names = _HEADS[kind]
        yield "head.logits.weight", take(next((n for n in names if n in take), names[0]))


def _neox_arch(config: _NeoX, tied: bool) -> ArchSpec:
    if not config.attention_bias:
        raise SpecError("attention_bias", "can't import false", "known: true")
    base, share = config.rope(
        config.rotary_emb_base or 10000.0, 0.25 if config.rotary_pct is None else config.rotary_pct
    )
    block = BlockSpec(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        ffn="gelu",
        ffn_dim=config.intermediate_size,
        norm="layer",
        bias=True,
        parallel_residual=config.use_parallel_residual,
        rotary_fraction=share,
        rotary_base=base,
    )
    return _plain(config, "gpt-neox", block, tied, norm="layer", eps=config.layer_norm_eps)


def _neox_weights(config: _NeoX, tied: bool, take: _Tensors) -> dict[str, Tensor]:
    heads, width = config.num_attention_heads, config.hidden_size
    weights = {"embed.weight": take("gpt_neox.embed_in.weight")}
    for i in range(config.num_hidden_layers):
        theirs, ours = f"gpt_neox.layers.{i}", f"blocks.stack.layers.{i}"
        for end in ("weight", "bias"):
            # Theirs lies head by head (q, k, v of head 0, then of head 1); ours all q, all k, all v.
            qkv = take(f"{theirs}.attention.query_key_value.{end}")
            by_head = qkv.view(heads, 3, width // heads, *qkv.shape[1:])
            weights[f"{ours}.attn.branch.qkv.{end}"] = by_head.transpose(0, 1).reshape(qkv.shape)
            for their_part, our_part in (
                ("attention.dense", "attn.branch.out"),
                ("mlp.dense_h_to_4h", "ffn.branch.up"),
                ("mlp.dense_4h_to_h", "ffn.branch.out"),
                ("input_layernorm", "attn.pre_norm"),
                ("post_attention_layernorm", "ffn.pre_norm"),
            ):
                weights[f"{ours}.{our_part}.{end}"] = take(f"{theirs}.{their_part}.{end}")
    for end in ("weight", "bias"):
        weights[f"head.norm.{end}"] = take(f"gpt_neox.final_layer_norm.{end}")
    return weights | dict(_head("gpt_neox", tied, take))


def _llama_arch(config: _Llama, tied: bool) -> ArchSpec:
    if config.mlp_bias != config.attention_bias:
        raise SpecError(
            "mlp_bias", f"can't import {config.mlp_bias}", f"known: {config.attention_bias}, as in attention"
        )
    base, share = config.rope(10000.0, 1.0)
    block = BlockSpec(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn="swiglu",
        ffn_dim=config.intermediate_size,
        norm="rms",
        bias=config.attention_bias,
        rotary_fraction=share,
        rotary_base=base,
    )
    return _plain(config, "llama", block, tied, norm="rms", eps=config.rms_norm_eps)


def _llama_weights(config: _Llama, tied: bool, take: _Tensors) -> dict[str, Tensor]:
    weights = {"embed.weight": take("model.embed_tokens.weight"), "head.norm.weight": take("model.norm.weight")}
    ends = ("weight", "bias") if config.attention_bias else ("weight",)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.stack.layers.{i}"
        for end in ends:
            weights[f"{ours}.attn.branch.qkv.{end}"] = torch.cat(
                [take(f"{theirs}.self_attn.{p}_proj.{end}") for p in "qkv"]
            )
            weights[f"{ours}.attn.branch.out.{end}"] = take(f"{theirs}.self_attn.o_proj.{end}")
            gate_up = [take(f"{theirs}.mlp.{part}_proj.{end}") for part in ("gate", "up")]
            weights[f"{ours}.ffn.branch.gate_up.{end}"] = torch.cat(gate_up)
            weights[f"{ours}.ffn.branch.out.{end}"] = take(f"{theirs}.mlp.down_proj.{end}")
        weights[f"{ours}.attn.pre_norm.weight"] = take(f"{theirs}.input_layernorm.weight")
        weights[f"{ours}.ffn.pre_norm.weight"] = take(f"{theirs}.post_attention_layernorm.weight")
    return weights | dict(_head("llama", tied, take))


_FAMILIES: dict[
    str, tuple[Any, Callable[[Any, bool], ArchSpec], Callable[[Any, bool, _Tensors], dict[str, Tensor]]]
] = {
    "gpt_neox": (_NeoX, _neox_arch, _neox_weights),
    "llama": (_Llama, _llama_arch, _llama_weights),
}
