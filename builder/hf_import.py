"""Weights from elsewhere: a GPT-NeoX or Llama checkpoint in the Hugging Face folder form becomes a bundle.

Only ``config.json`` and safetensors are read; nothing is unpickled, no remote code runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from builder.bundle import save_bundle
from builder.compiler import compile_arch
from builder.lowering import build_model
from searchspace.arch import ArchSpec, BlockSpec
from searchspace.errors import SpecError, one_of, show
from searchspace.nodes import BlockNode, EmbedNode, HeadNode

Config: TypeAlias = Mapping[str, Any]


def import_hf(folder: str | Path, out: str | Path) -> Path:
    """Convert a checkpoint folder to a bundle whose logits equal `transformers`' own.

    Args:
        folder: holds ``config.json`` and ``*.safetensors``.
        out: folder of the bundle.

    Raises:
        SpecError: if the folder, a setting or a tensor is not what this converter knows.
    """
    folder = Path(folder)
    config = _read_config(folder)
    kind = str(config.get("model_type"))
    if kind not in _FAMILIES:
        raise SpecError(
            "model_type", f"can't import {show(kind)}", one_of(_FAMILIES, kind), str(folder / "config.json")
        )
    to_arch, to_weights = _FAMILIES[kind]
    try:
        arch = to_arch(config)
    except KeyError as error:
        raise SpecError(
            str(error.args[0]), "is missing", "give the whole config.json", str(folder / "config.json")
        ) from error
    except SpecError as error:
        error.file = str(folder / "config.json")
        raise
    model = build_model(compile_arch(arch), seed=None)
    weights = to_weights(config, _Tensors(folder))
    wrong = [
        name for name, value in model.state_dict().items() if name not in weights or weights[name].shape != value.shape
    ]
    if wrong:
        raise SpecError(
            "", f"tensors of another shape than config.json says: {', '.join(wrong[:5])}", "check it", str(folder)
        )
    model.load_state_dict(weights)
    return save_bundle(out, arch, model, facts={"imported": {"model_type": kind, "from": folder.name}})


class _Tensors:
    """Tensors of one or several safetensors files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise SpecError("", "holds no *.safetensors", "save the checkpoint with safe serialization", str(folder))
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    self._file_of.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise SpecError("", f"can't be read: {error}", "download it again", str(file)) from error

    def __call__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise SpecError("", f"the checkpoint has no tensor {name}", "is it whole?", str(self._folder))
        with safe_open(self._file_of[name], framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(name)
            return value

    def __contains__(self, name: str) -> bool:
        return name in self._file_of


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError("", "holds no config.json", "give a Hugging Face model folder", str(folder)) from error
    except ValueError as error:
        raise SpecError("", "is not valid JSON", "download it again", str(file)) from error
    if not isinstance(config, dict):
        raise SpecError("", "is not a mapping", "download it again", str(file))
    return config


def _require(config: Config, name: str, known: tuple[object, ...], default: object) -> None:
    value = config.get(name, default)
    if value not in known:
        raise SpecError(name, f"can't import {show(value)}", f"known: {', '.join(map(str, known))}")


def _rope(config: Config, base_key: str, default_base: float, share_key: str) -> tuple[float, float]:
    """(base, share of the head) in the old flat form or the new ``rope_parameters``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise SpecError("rope_parameters.rope_type", f"can't import {show(kind)}", "known: default")
    flat: dict[str, Any] = {base_key: default_base, share_key: 1.0, **config}
    return float(rope.get("rope_theta", flat[base_key])), float(rope.get("partial_rotary_factor", flat[share_key]))


def _plain(config: Config, name: str, block: BlockSpec, *, norm: str, eps: float) -> ArchSpec:
    """Embedding, one stack, head."""
    return ArchSpec(
        name=name,
        vocab_size=config["vocab_size"],
        seq_len=config["max_position_embeddings"],
        d_model=config["hidden_size"],
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_eps=eps,
        blocks={"stack": block},
        graph={
            "x": EmbedNode(embed="tokens"),
            "y": BlockNode(block="stack", input="x"),
            "logits": HeadNode(head="lm", input="y", norm="layer" if norm == "layer" else "rms"),
        },
    )


def _neox_arch(config: Config) -> ArchSpec:
    _require(config, "hidden_act", ("gelu",), "gelu")
    _require(config, "attention_bias", (True,), True)
    base, share = _rope(config, "rotary_emb_base", 10000.0, "rotary_pct")
    block = BlockSpec(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn="gelu",
        ffn_dim=config["intermediate_size"],
        norm="layer",
        bias=True,
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        rotary_fraction=share,
        rotary_base=base,
    )
    return _plain(config, "gpt-neox", block, norm="layer", eps=config.get("layer_norm_eps", 1e-5))


def _neox_weights(config: Config, take: _Tensors) -> dict[str, Tensor]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    weights = {"embed.weight": take("gpt_neox.embed_in.weight")}
    for i in range(config["num_hidden_layers"]):
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
    if not config.get("tie_word_embeddings", False):
        weights["head.logits.weight"] = take("embed_out.weight" if "embed_out.weight" in take else "lm_head.weight")
    return weights


def _llama_arch(config: Config) -> ArchSpec:
    _require(config, "hidden_act", ("silu",), "silu")
    bias = bool(config.get("attention_bias", False))
    _require(config, "mlp_bias", (bias,), False)
    base, share = _rope(config, "rope_theta", 10000.0, "partial_rotary_factor")
    block = BlockSpec(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        ffn="swiglu",
        ffn_dim=config["intermediate_size"],
        norm="rms",
        bias=bias,
        rotary_fraction=share,
        rotary_base=base,
    )
    return _plain(config, "llama", block, norm="rms", eps=config.get("rms_norm_eps", 1e-6))


def _llama_weights(config: Config, take: _Tensors) -> dict[str, Tensor]:
    weights = {"embed.weight": take("model.embed_tokens.weight"), "head.norm.weight": take("model.norm.weight")}
    ends = ("weight", "bias") if config.get("attention_bias", False) else ("weight",)
    for i in range(config["num_hidden_layers"]):
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
    if not config.get("tie_word_embeddings", False):
        weights["head.logits.weight"] = take("lm_head.weight")
    return weights


_FAMILIES: dict[str, tuple[Callable[[Config], ArchSpec], Callable[[Config, _Tensors], dict[str, Tensor]]]] = {
    "gpt_neox": (_neox_arch, _neox_weights),
    "llama": (_llama_arch, _llama_weights),
}
