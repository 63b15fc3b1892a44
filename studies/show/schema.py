"""JSON Schemas of the three YAML languages, generated from the specs, so that editors complete and check.

A schema sees one file alone: names that lead nowhere, divisibility and budgets stay for ``spiralformer check``. Keys
are required at the root only, and there only of files that extend no other.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, Union, cast

from builder.pricing.budget import BudgetSpec
from builder.pricing.cost import COSTS
from searchspace.arch import ArchSpec
from searchspace.nodes import NODE_TYPES, LevelUse
from searchspace.plain import encode
from searchspace.plugin_loading import PluginRecord, loaded_names, owner
from searchspace.tables import kind_of, options
from searchspace.topologies import TOPOLOGIES, TopologySpec
from studies.config import StudyKeys
from studies.data.settings import TEXT_KEYS, DataConfig, TextKind
from studies.probes.table import probed_metrics
from studies.sections import (
    COST_OBJECTIVES,
    Enqueued,
    PromoteConfig,
    SizeConfig,
    StopperConfig,
    StopperName,
    TrainingConfig,
)
from studies.tasks.table import TASKS, sources

Language: TypeAlias = Literal["architecture", "space", "study"]
LANGUAGES: tuple[Language, ...] = typing.get_args(Language)
Schema: TypeAlias = dict[str, Any]

_NAME = r"^[A-Za-z](?:[A-Za-z0-9_]{0,62}[A-Za-z0-9])?$"
_AMOUNT = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\s*[0-9.]"}]}
_REFERENCE = {"type": "string", "pattern": r"\$\{[^}]+\}"}
_SCALAR = {"type": ["string", "number", "boolean", "null"]}


def json_schema(language: Language) -> Schema:
    """The schema of a file in one of the languages, draft 2020-12."""
    writer = _Writer(is_open=language != "architecture")
    root = writer.study() if language == "study" else writer.architecture()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"SpiralFormer {language}",
        **root,
        "$defs": writer.definitions,
    }


class _Writer:
    """Turns specs into schemas; dataclasses become definitions.

    Args:
        is_open: whether any value may be an open choice.
    """

    def __init__(self, *, is_open: bool) -> None:
        self.definitions: dict[str, Schema] = {"open": _open_value()} if is_open else {}
        self._is_open = is_open

    def architecture(self) -> Schema:
        root = self._mapping_of(ArchSpec)
        extra = {
            "extends": {"type": "string", "description": "A file this one is laid over."},
            "vars": {"type": "object", "description": "Values and decisions that serve several places."},
            "constraints": {"type": "array", "items": {"type": "string"}, "description": "Expressions that must hold."},
        }
        node = {"anyOf": [self._definition(cls) for cls in NODE_TYPES.values()]}
        names = {"pattern": _NAME}
        root["properties"]["graph"] = {
            "type": "object",
            "description": "Named nodes; the key that names the operation tells a node's kind.",
            "propertyNames": names,
            "additionalProperties": self._maybe_null(self._maybe_open(node)),
        }
        root["properties"]["name"]["pattern"] = r"^[A-Za-z0-9$]"
        root["properties"].update(extra)
        required = [n for n, f in _keys(ArchSpec).items() if _is_required(f)]
        return {**root, "if": {"required": ["extends"]}, "else": {"required": required}}

    def study(self) -> Schema:
        space = self.architecture()
        root = self._mapping_of(StudyKeys, is_open=False)
        training = self._mapping_of(TrainingConfig)
        self.definitions["space"] = space
        named = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/space"}]}
        root["properties"].update(
            {
                "space": {**named, "description": "A space file, a shipped name, or the space itself."},
                "baseline": {
                    "anyOf": [*named["anyOf"], {"type": "array", "items": named}],
                    "description": "Architectures trained in full, for comparison.",
                },
                "objectives": {
                    "type": "array",
                    "prefixItems": [
                        {"enum": ["loss", *(task.headline.name for task in TASKS.values() if task.name != "custom")]}
                    ],
                    "items": {"enum": [*COST_OBJECTIVES, *_further_metrics()]},
                    "minItems": 1,
                    "uniqueItems": True,
                    **_described(_keys(StudyKeys)["objectives"]),
                },
                "training": {**training, "description": "How one architecture is trained; baselines take the middle."},
                "extends": {"type": "string", "description": "A file this one is laid over."},
            }
        )
        return {**root, "if": {"required": ["extends"]}, "else": {"anyOf": [{"required": ["space"]}, _LADDER_ALONE]}}

    # -- types -----------------------------------------------------------------------------------

    def _of(self, annotation: Any, field: dataclasses.Field[Any] | None = None) -> Schema:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if annotation in _SPECIAL:
            return self._special(annotation)
        if dataclasses.is_dataclass(annotation):
            return self._definition(cast(type, annotation))
        if (kind := kind_of(annotation)) is not None:
            added = [{"const": name, "description": f"Of plugin {owner(kind, name)}."} for name in loaded_names(kind)]
            listed: Schema = {"enum": list(options(annotation))}
            return {"anyOf": [listed, *added]} if added else listed
        if origin is Literal:
            return {"enum": list(args)}
        if origin in (Union, types.UnionType):
            return {"anyOf": [self._of(arg, field) for arg in args]}
        if origin is tuple:
            return {"type": "array", "items": self._maybe_open(self._of(args[0]))}
        if origin is not None:
            item = self._maybe_null(self._maybe_open(self._of(args[1])))
            return {"type": "object", "propertyNames": {"pattern": _NAME}, "additionalProperties": item}
        plain = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
        schema: Schema = {"type": plain[annotation]}
        if field is not None and annotation in (int, float):
            low, high = field.metadata["low"], field.metadata["high"]
            schema.update({k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None})
        return schema

    def _special(self, cls: type[Any]) -> Schema:
        """What people write where it is not the mapping that the spec's fields suggest."""
        if cls is LevelUse:
            return {"anyOf": [{"type": "string"}, self._definition(cls)]}
        if cls is TopologySpec:
            bare = [row.name for row in TOPOLOGIES.values() if row.bare]
            settings = {row.name: row.settings for row in TOPOLOGIES.values() if row.settings}
            return {"anyOf": [{"enum": bare}, *(_only(name, self._of(kind)) for name, kind in settings.items())]}
        if cls is StopperConfig:
            settings_ = self._mapping_of(StopperConfig, is_open=False)
            del settings_["properties"]["kind"]
            kinds = typing.get_args(StopperName)
            return {"anyOf": [{"enum": list(kinds)}, *(_only(kind, settings_) for kind in kinds)]}
        if cls is Enqueued:
            decisions = {"type": "object", "additionalProperties": {"type": ["boolean", "number", "string", "null"]}}
            return {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/space"}, decisions]}
        if cls is PluginRecord:
            texts = {name: {"type": "string"} for name in ("name", "version", "sha256")}
            return {"type": "object", "properties": texts, "required": list(texts), "additionalProperties": False}
        if cls is DataConfig:
            return {"anyOf": [self._source(kind) for kind in sources()]}
        if cls in (PromoteConfig, SizeConfig):
            return {"anyOf": [{"type": "integer", "minimum": 0}, self._definition(cls)]}
        band = {"type": "object", "properties": {"min": _AMOUNT, "max": _AMOUNT}, "additionalProperties": False}
        limits = {
            row.name: {"description": row.words, "anyOf": [*_AMOUNT["anyOf"], band, {"type": "null"}]}
            for row in COSTS.values()
        }
        return {"type": "object", "properties": limits, "additionalProperties": False}

    def _source(self, kind: str) -> Schema:
        """A source of data with the keys that it has a use for; without a kind it is the first."""
        schema = self._mapping_of(sources()[kind].config, is_open=False)
        keys = TEXT_KEYS.get(cast(TextKind, kind), tuple(schema["properties"]))
        shown = {name: given for name, given in schema["properties"].items() if name in keys and name != "kind"}
        schema["properties"] = {"kind": {"const": kind}, **shown}
        return schema if kind == next(iter(sources())) else {**schema, "required": ["kind"]}

    def _definition(self, cls: type[Any]) -> Schema:
        name = cls.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may hold itself
            self.definitions[name] = self._mapping_of(cls)
        return {"$ref": f"#/$defs/{name}"}

    def _mapping_of(self, cls: type[Any], *, is_open: bool | None = None) -> Schema:
        hints = typing.get_type_hints(cls, include_extras=True)
        is_open = self._is_open if is_open is None else is_open
        properties: Schema = {}
        for name, field in _keys(cls).items():
            if cls is ArchSpec and name == "graph":
                properties[name] = {}
                continue
            schema = self._of(hints[field.name], field)
            if is_open and cls is ArchSpec and name in ("levels", "blocks"):
                schema = {"anyOf": [schema, {"$ref": "#/$defs/open"}]}
            elif cls is not ArchSpec or name not in ("levels", "blocks", "name"):
                schema = self._maybe_open(schema) if is_open else _or_reference(schema)
            properties[name] = {**schema, **_described(field)}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _maybe_open(self, schema: Schema) -> Schema:
        if not self._is_open:
            return _or_reference(schema)
        return {"anyOf": [schema, {"$ref": "#/$defs/open"}, _REFERENCE]}

    def _maybe_null(self, schema: Schema) -> Schema:
        """Null removes what the extended file has."""
        return {"anyOf": [schema, {"type": "null"}]}


def _further_metrics() -> list[str]:
    """Of tasks, but for their headlines and what ``loss`` stands for; and of probes."""
    each = (name for task in TASKS.values() for name in list(task.metrics)[1:])
    return [name for name in dict.fromkeys([*each, *probed_metrics()]) if name != "loss"]


_LADDER_ALONE = {"required": ["scale", "baseline"]}
_SPECIAL = (
    LevelUse,
    TopologySpec,
    StopperConfig,
    PromoteConfig,
    SizeConfig,
    BudgetSpec,
    DataConfig,
    Enqueued,
    PluginRecord,
)


def _or_reference(schema: Schema) -> Schema:
    return {"anyOf": [schema, _REFERENCE]}


def _only(name: str, schema: Schema) -> Schema:
    return {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}


def _keys(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {field.metadata["key"] or field.name: field for field in dataclasses.fields(cls)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _described(field: dataclasses.Field[Any]) -> Schema:
    described: Schema = {"description": field.metadata["doc"]}
    if field.default is not dataclasses.MISSING:
        default = encode(field.default)
        described["default"] = list(default) if isinstance(default, tuple) else default
    return described


def _open_value() -> Schema:
    """The four kinds of open values."""
    prior = {"prior": {}, "confidence": {"enum": ["low", "medium", "high"]}}
    pair = {"type": "array", "minItems": 2, "maxItems": 2}
    whole = {**pair, "items": {"type": "integer"}}
    length = {"anyOf": [{"type": "integer", "minimum": 1}, whole]}
    sequence = {
        "type": "object",
        "properties": {
            "of": {"type": "array", "minItems": 1},
            "length": length,
            "order": {"enum": ["any", "coarse_to_fine", "fine_to_coarse"]},
        },
        "required": ["of", "length"],
        "additionalProperties": False,
    }
    log = {"log": {"type": "boolean"}}
    kinds: Mapping[str, Schema] = {
        "choice": {"choice": {"type": "array", "minItems": 1, "uniqueItems": True}, **prior},
        "int": {"int": whole, "step": {"type": "integer", "minimum": 1}, **log, **prior},
        "float": {
            "float": {**pair, "items": {"type": "number"}},
            "step": {"type": "number", "exclusiveMinimum": 0},
            **log,
            **prior,
        },
        "sequence": {"sequence": sequence},
    }
    return {
        "description": "An open value: choice, int, float or sequence.",
        "anyOf": [
            {"type": "object", "properties": properties, "required": [kind], "additionalProperties": False}
            for kind, properties in kinds.items()
        ],
    }
