"""From a model and a recipe to a plan: which module is quantized how, before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from microscale.algorithms.pipeline import Pipeline
from microscale.checkpoint.compressed_tensors import layout_inputs
from microscale.checkpoint.registry import layout_named
from microscale.errors import LayoutError, ModelError, RecipeError, counted
from microscale.families.embeddings import is_lookup, unfit_embeddings
from microscale.families.forward_source import names_read_by_parents, router_names
from microscale.families.modules import adapter_places, is_linear, is_transposed
from microscale.families.parts import check_part, is_of_part, part_roots
from microscale.formats import RangeKind, WrittenInputs, WrittenWeights, parse_inputs
from microscale.layer_spec import LayerSpec
from microscale.nn.experts import stacked_experts
from microscale.nn.packed import PackedModule
from microscale.recipes.fields import RTN
from microscale.recipes.obstacles import ATTENTION_OBSTACLE, layers_without_place, layout_obstacle
from microscale.recipes.recipe import Recipe
from microscale.recipes.roles import is_meant, layer_roles, named_roles
from microscale.recipes.tying import is_left_alone, separation_note, tied_groups, unfit_notes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer(LayerSpec):
    """A module with what was asked for it and what it will execute.

    What was requested stands as the recipe has it; ``activations`` is what runs, which differs where the file layout
    has rules of its own. ``idle_steps`` says which steps of the method change nothing for these formats, and why.
    """

    requested_weights: WrittenWeights
    requested_activations: WrittenInputs | None
    pipeline: Pipeline
    idle_steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All layers to quantize, the modules left alone, the file layout, and remarks that a user should read."""

    layers: tuple[PlannedLayer, ...]
    unquantized: tuple[str, ...]
    layout: str | None
    notes: tuple[str, ...]


def quantizable_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return name -> (kind, module) of every linear layer and embedding with a float weight.

    A subclass that computes something else than its class cannot be replaced and is left out; an embedding may
    multiply its rows by a constant.
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    beside = adapter_places(model)
    for name, module in model.named_modules():
        if name.startswith(beside):
            continue
        if is_transposed(module):
            found[name] = ("conv1d", module)
        elif is_linear(module):
            found[name] = ("linear", module)
        elif is_lookup(module):
            found[name] = ("embedding", module)
    return found


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return [out_features, in_features] of a linear layer, or the shape of an embedding."""
    weight = module.get_parameter("weight")
    rows, cols = weight.shape
    return (cols, rows) if is_transposed(module) else (rows, cols)


def default_exclusions(model: Any) -> set[str]:
    """Return the modules that are left alone unless included: the output head, every embedding, routers and gates.

    A gate is a linear layer with one output, such as Qwen2-MoE has before its shared expert: it is part of the routing.
    """
    names: set[str] = {"lm_head", *router_names(model)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        is_gate = isinstance(module, nn.Linear) and module.out_features == 1
        if isinstance(module, nn.Embedding) or is_gate or (head is not None and module is head):
            names.add(name)
    return names


JOINED_BY_SERVERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linear layers that servers stack into one matrix, by the names that models give them."""


def outside_of_part(model: nn.Module, part: str, names: Sequence[str]) -> set[str]:
    """Return the modules that do not belong to the part of a model that was asked for.

    Raises:
        ModelError: a part that the model does not have.
    """
    check_part(model, part)
    roots = part_roots(model)
    return {name for name in names if not is_of_part(name, part, roots)}


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Decide everything that can be decided without touching a weight.

    Raises:
        ModelError: nothing to quantize, or the model is quantized already.
        RecipeError: a pattern that matches no layer.
        LayoutError: the layout asked for cannot hold a layer.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ModelError("the model is quantized already; load the original weights to quantize them differently")
    modules = quantizable_modules(model)
    if not any(kind != "embedding" for kind, _ in modules.values()):
        raise ModelError(f"{type(model).__name__} has no linear layers to quantize")
    roles = layer_roles(model, modules, recipe.part)
    for pattern in (*recipe.include, *recipe.exclude, *(rule.match for rule in recipe.layer_rules)):
        _check_pattern(pattern, roles, model)
    outside = outside_of_part(model, recipe.part, list(modules))
    unheld = layers_without_place(model, recipe.layout, modules) - outside
    exclusions = default_exclusions(model) | outside | unheld
    found: dict[str, PlannedLayer] = {}
    for name, (kind, module) in modules.items():
        layer = _plan_layer(name, kind, roles[name], module, recipe, is_default_off=name in exclusions)
        if layer is not None:
            found[name] = layer
    tying_notes = _join_tied(model, modules, roles, recipe, found)
    layers = [found[name] for name in modules if name in found]
    if not layers:
        raise RecipeError("this leaves every layer unquantized; check exclude and rules")
    chosen = {layer.name for layer in layers}
    linear_left = tuple(name for name, (kind, _) in modules.items() if kind != "embedding" and name not in chosen)
    obstacle = layout_obstacle(model, recipe.layout, found)
    attention = recipe.attention_formats
    if attention is not None and recipe.layout != "microscale":
        obstacle = obstacle or ATTENTION_OBSTACLE
    layers, layout, notes = _settle_layout(layers, recipe.layout, obstacle)
    if unheld:
        notes.append(
            f"layout {recipe.layout} holds experts alone: {counted(len(unheld), 'other layer')} stay as they are"
        )
    notes.extend(tying_notes)
    notes.extend(unfit_notes(model, recipe))
    notes.extend(_expert_notes(model))
    notes.extend(dict.fromkeys(note for layer in layers for note in layer.idle_steps))
    notes.extend(_reading_notes(model, layers))
    notes.extend(_joining_notes(model, layers))
    if attention is not None:
        notes.append(f"{attention}: simulated, that is rounded, then stored and computed with as floats")
    if outside:
        notes.append(f"only the {recipe.part} part is quantized; other layers need part all or their own")
    return Plan(layers=tuple(layers), unquantized=linear_left, layout=layout, notes=tuple(notes))


def _check_pattern(pattern: str, roles: Mapping[str, str], model: nn.Module) -> None:
    if any(is_meant(pattern, name, role) for name, role in roles.items()):
        return
    for name, problem in unfit_embeddings(model).items():
        if is_meant(pattern, name, "embedding"):
            raise RecipeError(f"pattern {pattern!r} means {name}, which cannot be quantized: {problem}")
    endings = sorted({name.rsplit(".", 1)[-1] for name in roles})
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1].strip("*"), endings, n=3) or endings[:12]
    raise RecipeError(
        f"pattern {pattern!r} matches no layer; layers of this model end in: {', '.join(close)}; its roles:"
        f" {named_roles(roles.values())}"
    )


def _join_tied(
    model: nn.Module,
    modules: Mapping[str, tuple[str, nn.Module]],
    roles: Mapping[str, str],
    recipe: Recipe,
    found: dict[str, PlannedLayer],
) -> list[str]:
    """Add the layers that share the weight of a planned one: who names either means the weight.

    Returns what a user should know of weights that are stored more than once after all.
    """
    notes: list[str] = []
    for group in tied_groups(model):
        planned = next((found[name] for name in group if name in found), None)
        if planned is None:
            continue
        why = ""
        for name in group:
            if name not in modules:
                why = f"{name} stays, {unfit_embeddings(model).get(name, 'it is no linear layer')}"
            elif name not in found and is_left_alone(name, roles[name], recipe):
                why = f"{name} is to stay as it is"
            elif name not in found:
                kind, module = modules[name]
                layer = _plan_layer(
                    name, kind, roles[name], module, recipe, is_default_off=False, weights=planned.requested_weights
                )
                refusal = layer and recipe.layout not in (None, "auto") and layout_named(recipe.layout).refusal(layer)
                if refusal:
                    why = f"{name} stays, for {refusal}"
                elif layer is not None:
                    found[name] = layer
        if len({found[name].format for name in group if name in found}) > 1:
            why = "their formats differ"
        if why:
            notes.append(separation_note(model, group, found, why))
    return notes


def _plan_layer(
    name: str,
    kind: str,
    role: str,
    module: nn.Module,
    recipe: Recipe,
    *,
    is_default_off: bool,
    weights: WrittenWeights | None = None,
) -> PlannedLayer | None:
    """Return what a recipe says of a layer, None where it stays as it is; ``weights`` goes before the recipe's word."""
    forced, activations, method = weights, recipe.activations, recipe.method
    weights = recipe.format
    is_off = is_default_off and not any(is_meant(pattern, name, role) for pattern in recipe.include)
    is_off = is_off or any(is_meant(pattern, name, role) for pattern in recipe.exclude)
    for rule in recipe.layer_rules:
        if is_meant(rule.match, name, role):
            is_off = is_off and rule.weights is None
            weights = rule.weights or weights
            activations = rule.activations or activations
            method = rule.method or method
    weights = forced or weights
    fmt = None if is_off else weights.record
    if fmt is None:
        return None
    if kind == "embedding":
        activations, method = None, RTN
    spec = None if activations is None else activations.record
    pipeline = method.pipeline(effort=recipe.effort, fmt=fmt, at_run_time=recipe.at_run_time)
    if pipeline.is_end_to_end:  # layers that learn together have one chain, that of the recipe's own format
        own = recipe.format.record or fmt
        pipeline = method.pipeline(effort=recipe.effort, fmt=own, at_run_time=recipe.at_run_time)
    problem = pipeline.refusal(fmt, spec)
    if problem is not None:
        raise RecipeError(f"layer {name}: {problem}")
    idle = pipeline.idleness(fmt, spec)
    fmt, adapted = pipeline.adapt(fmt, spec)
    if adapted != spec:
        activations = None if adapted is None else parse_inputs(adapted)
    return PlannedLayer(
        name=name,
        kind=kind,
        shape=weight_shape(module),
        dtype=module.get_parameter("weight").dtype,
        format=fmt,
        activations=adapted,
        requested_weights=weights,
        requested_activations=None if adapted is None else activations,
        method=pipeline.text,
        pipeline=pipeline,
        idle_steps=tuple(idle),
    )


def _expert_notes(model: nn.Module) -> list[str]:
    reasons = [reason for reason in stacked_experts(model).values() if reason is not None]
    return [f"the experts of {counted(len(reasons), 'layer')} stay as they are: {reasons[0]}"] if reasons else []


def _reading_notes(model: nn.Module, layers: Sequence[PlannedLayer]) -> list[str]:
    """Say whose inputs may stay as they are although they were to be rounded."""
    read = names_read_by_parents(model)
    names = [layer.name for layer in layers if layer.activations is not None and layer.name in read]
    if not names:
        return []
    kind = type(model).__name__
    reads = f"{kind} multiplies by the weights of {counted(len(names), 'layer')} itself, e.g. {names[0]}"
    return [f"{reads}: where it does, their inputs are not rounded"]


def _joining_notes(model: nn.Module, layers: Sequence[PlannedLayer]) -> list[str]:
    """Name the layers that servers run as one although their formats differ; a layer left in floats differs too."""
    planned = {layer.name: (layer.format, layer.activations) for layer in layers}
    differing: list[str] = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for joined in JOINED_BY_SERVERS:
            if set(joined) <= children.keys() and len({planned.get(f"{name}.{child}") for child in joined}) > 1:
                differing.append(f"{', '.join(joined)} of {name}")
    if not differing:
        return []
    where = (
        f"layers that vLLM and SGLang run as one differ in format in"
        f" {counted(len(differing), 'module')}, e.g. {differing[0]}"
    )
    return [f"{where}: these servers refuse the file, or run all of them as the first; transformers and we run it"]


def _settle_layout(
    layers: list[PlannedLayer], word: str | None, obstacle: str | None
) -> tuple[list[PlannedLayer], str | None, list[str]]:
    """Pick the layout and let activations follow its rules where the recipe named a format without a rule."""
    if word is None:
        return layers, None, []
    if word in ("auto", "compressed-tensors"):
        adapted = [_with_equivalent(layer, word) for layer in layers]
        refusals = [obstacle] if obstacle is not None else _refusals("compressed-tensors", adapted)
        if not refusals:
            return adapted, "compressed-tensors", _rule_notes(layers, adapted)
        if word == "auto":
            why = f"layout microscale, because compressed-tensors does not serve: {refusals[0]}"
            return layers, "microscale", [why]
        raise LayoutError(_refusal_text(word, refusals))
    refusals = [obstacle] if obstacle is not None else _refusals(word, layers)
    if refusals:
        raise LayoutError(_refusal_text(word, refusals))
    return layers, word, []


def _refusals(word: str, layers: Sequence[PlannedLayer]) -> list[str]:
    """Return why layers cannot be in a layout, one reason for each that cannot."""
    layout = layout_named(word)
    online = "method {} leaves work for run time, which this layout has no place for"
    reasons = {
        layer.name: layout.refusal(layer)
        or (online.format(layer.method) if layer.pipeline.is_online and word != "microscale" else None)
        for layer in layers
    }
    return [f"{reason} (layer {name})" for name, reason in reasons.items() if reason is not None]


def _refusal_text(word: str, refusals: list[str]) -> str:
    more = f"\n… and {counted(len(refusals) - 3, 'more layer')}" if len(refusals) > 3 else ""
    shown = "\n".join(refusals[:3])
    return f"layout {word} cannot hold this model:\n{shown}{more}\nexclude these layers or choose --layout microscale"


def _with_equivalent(layer: PlannedLayer, layout: str) -> PlannedLayer:
    """Return the layer with inputs as the layout rounds them; ``auto`` asks for no range to be measured."""
    equivalent = layout_inputs(str(layer.requested_activations))
    if equivalent is None or (layout == "auto" and equivalent.range is RangeKind.STATIC):
        return layer
    return replace(layer, activations=equivalent)


def _rule_notes(before: Sequence[PlannedLayer], after: Sequence[PlannedLayer]) -> list[str]:
    changed = {
        (str(old.requested_activations), str(new.activations))
        for old, new in zip(before, after, strict=True)
        if old.activations != new.activations
    }
    return [
        f"activations {asked} are executed as {runs}: the layout compressed-tensors fixes their scale rule"
        " (--layout microscale keeps the rule of the name)"
        for asked, runs in sorted(changed)
    ]
