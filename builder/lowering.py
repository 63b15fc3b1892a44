"""From a verified graph to a runnable module: its parts made and named, its code bound (`builder.code`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from builder.code import Ending, model_code, steps_of, why_undecodable
from builder.graph.ir import Graph
from builder.graph.row import PartCall, PartName
from builder.parametrization import factors_of
from searchspace.errors import SpecError
from spiralformer.init import init_weights
from spiralformer.model import SpiralFormer


def build_model(graph: Graph, *, seed: int | None = 0, device: str | torch.device = "cpu") -> SpiralFormer:
    """Build the module with initial weights.

    Args:
        graph: verified, from `compile_arch`.
        seed: of the initial weights; each parameter depends on (seed, its name) alone. None leaves memory as it
            is, for weights that are loaded next.
        device: where it is to live; ``meta`` gives shapes without memory. Weights may be assigned to such a model
            (``load_state_dict(assign=True)``); its rotary tables are computed where the tokens lie.

    Returns:
        A module from tokens (B, L) to logits (B, L, V).
    """
    with torch.device("meta"):
        model = _lower(graph)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for name, module in model.named_modules():
        if callable(reset := getattr(module, "reset", None)):
            reset()
        elif next(module.buffers(recurse=False), None) is not None:
            what = f"{name} ({type(module).__name__}) has a buffer, and no method reset that fills it"
            raise SpecError("", what, "give it one: a model is built without memory first")
    if seed is None:
        return model
    stretched = {name: factors.init for name, factors in factors_of(model, graph).items() if factors.init != 1.0}
    init_weights(model, seed=seed, stretched=stretched, **init_settings(graph))
    return model


def build_view(
    graph: Graph,
    of: SpiralFormer,
    trained: Graph,
    held: Mapping[str, int] | None = None,
    ending: Ending | None = None,
) -> SpiralFormer:
    """The module of another graph that runs the parts of one that is there: they are the same objects.

    Args:
        graph: what to run.
        of: the module whose parts it takes.
        trained: its graph.
        held: by loop, how many of its first iterations pass no gradient.
        ending: of a loop that ends where it has come to rest.

    Raises:
        MissingPartError: if the graph has parameters that the module lacks, or has in another form.
    """
    known = {step.target: step.part for step in steps_of(trained) if step.part is not None}
    device = next(of.parameters()).device

    def taken(target: str, part: PartCall) -> nn.Module:
        if known.get(target) == part:
            return of.get_submodule(target)
        module: nn.Module = made(part).to(device)
        if next(module.parameters(), None) is not None:
            raise MissingPartError(target, is_known=target in known)
        return module

    return _lower(graph, taken, held or {}, ending).train(of.training)


class MissingPartError(ValueError):
    """A module lacks a part that a graph needs, or has it in another form."""

    def __init__(self, target: str, *, is_known: bool) -> None:
        super().__init__(target)
        self.target, self.is_known = target, is_known


def init_settings(graph: Graph) -> dict[str, Any]:
    """What initial weights depend on beside the parts (`spiralformer.init`)."""
    scaled = graph.residual_scale != "none"
    layers = graph.num_layers if graph.base is None or graph.base.layers is None else graph.base.layers
    return {"d_model": graph.d_model, "num_layers": layers, "scaled_branches": scaled}


# -- parts -----------------------------------------------------------------------------------------


def class_of(name: PartName) -> Any:
    """The class that a table names."""
    if name.module:
        return attrgetter(name.path.partition(":")[2])(import_module(name.module))
    return _own_class(name.path)


@lru_cache(maxsize=256)
def _own_class(path: str) -> Any:
    home, _, attribute = path.rpartition(".")
    return getattr(import_module("torch.nn" if home == "nn" else f"spiralformer.{home}"), attribute)


def made(value: object) -> Any:
    """What the tables say, with every class looked up and every part built."""
    if isinstance(value, PartName):
        return class_of(value)
    if isinstance(value, PartCall):
        settings = {name: made(setting) for name, setting in value.settings.items()}
        return class_of(value.name)(*[made(argument) for argument in value.args], **settings)
    return value


def source_of(value: object) -> str:
    """The same as Python; settings at their default are left out."""
    if not isinstance(value, PartCall):
        return str(value) if isinstance(value, PartName) else repr(value)
    known = inspect.signature(class_of(value.name)).parameters
    settings = [
        f"{name}={source_of(setting)}"
        for name, setting in value.settings.items()
        if name not in known or type(setting) is not type(known[name].default) or setting != known[name].default
    ]
    return f"{value.name}({', '.join([*map(source_of, value.args), *settings])})"


def names_of(value: object) -> set[tuple[str, str]]:
    """All classes of `spiralformer` and of plugins in it: the plugin's module, or nothing, and the name."""
    if isinstance(value, PartName):
        return set() if value.path.startswith("nn.") else {(value.module, str(value))}
    if isinstance(value, PartCall):
        return names_of(value.name).union(*map(names_of, (*value.args, *value.settings.values())))
    return set()


def _lower(
    graph: Graph,
    module_of: Callable[[str, PartCall], nn.Module] = lambda target, part: made(part),
    held: Mapping[str, int] | None = None,
    ending: Ending | None = None,
) -> SpiralFormer:
    steps, root = steps_of(graph), nn.Module()
    for step in steps:
        if step.target is not None and step.part is not None:
            _register(root, step.target, module_of(step.target, step.part))
    if ending is not None:
        root.add_module("halting", made(ending.made_for(steps)))
    code = model_code(graph, steps, held, ending)
    return SpiralFormer(root, code, undecodable=why_undecodable(graph, ending), causal=graph.causal)


def _register(root: nn.Module, target: str, module: nn.Module) -> None:
    *parents, last = target.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
