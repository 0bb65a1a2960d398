"""A plan applied to a model: what is replaced, noted, checked before, and poisoned where the recipe says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from family_models import family_model
from microscale.errors import CalibrationError, ModelError, NonFiniteError
from microscale.families.look_up import describe
from microscale.formats import BlockFormat, NaNPolicy, PairFormat, SegmentedFormat, parse_activation, parse_format
from microscale.kernels import fake_quantize, quantize
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from microscale.recipes.apply import (
    Walk,
    check_job,
    check_weight,
    executed_layer,
    pipelines_of,
    poisoned,
    poisoning,
    quantize_model,
    quantize_module,
    rotation_notes,
    set_activations,
    structure_for,
)
from microscale.recipes.calibration import Calibration, CalibrationText
from microscale.recipes.plan import PlannedLayer, make_plan, quantizable_modules
from microscale.recipes.recipe import make_recipe, parse_rule
from small_models import same_bits

WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))


def test_the_method_quantizes_the_weight_as_the_kernel_does(load: Callable[..., Any]) -> None:
    model = load("opt")
    originals = {name: module for name, (_, module) in quantizable_modules(model).items()}
    quantize_model(model, make_recipe(format="mxfp4_plus", include=("embed_tokens",)))
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            weight: Any = originals[name].weight
            expected = quantize(weight.detach(), "mxfp4_plus")
            assert all(same_bits(part, expected.parts[key]) for key, part in module.tensor.parts.items())
            if isinstance(module, QuantizedLinear):
                bias: Any = originals[name].bias
                assert (module.bias is None) == (bias is None)
                assert module.bias is None or same_bits(module.bias.data, bias.data)
            else:
                assert isinstance(module, QuantizedEmbedding)


def test_progress_is_told_layer_by_layer(load: Callable[..., Any]) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize_model(load(), make_recipe(format="mxfp4"), lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(15))
    assert {total for _, total, _ in seen} == {14}
    assert seen[0][2] == "model.layers.0.self_attn.q_proj" and seen[-1][2] == ""


def test_non_finite_weights_are_found_before_anything_is_replaced(load: Callable[..., Any]) -> None:
    model = load()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 "):
        quantize_model(model, make_recipe(format="mxfp4"))
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    quantize_model(model, make_recipe(format="mxfp4", exclude=("layers.1.mlp.*",)))  # the head is not asked for


def test_tied_weights_are_untied_where_one_side_is_packed(load: Callable[..., Any]) -> None:
    cases: list[tuple[tuple[str, ...], tuple[str, ...], bool]] = [
        ((), (), True),
        (("lm_head",), ("embed_tokens",), False),
        (("embed_tokens",), ("lm_head",), False),
    ]
    for include, exclude, is_tied in cases:
        model = load(tie_word_embeddings=True)
        shared = model.lm_head.weight.detach().clone()
        quantize_model(model, make_recipe(format="mxfp8", include=include, exclude=exclude))
        assert model.config.tie_word_embeddings is is_tied
        if "lm_head" not in include:
            assert same_bits(model.lm_head.weight.detach(), shared)
        if "embed_tokens" not in include:
            assert same_bits(model.model.embed_tokens.weight.detach(), shared)


def planned(model: nn.Module, **recipe: Any) -> dict[str, PlannedLayer]:
    return {layer.name: layer for layer in make_plan(model, make_recipe(**{"format": "mxfp4", **recipe})).layers}


def test_layers_of_one_method_share_its_chain() -> None:
    layers = planned(family_model("llama"), method="gptq", rules=(parse_rule("o_proj=mxfp8"),))
    found = pipelines_of(layers)
    assert set(found) == set(layers) and len({id(chain) for chain in found.values()}) == 1


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "adaptive_2_4", "segments(mxfp4*32,nvfp4*32)"])
def test_a_poisoned_block_is_nan_and_no_other(spec: str) -> None:
    fmt = parse_format(spec)
    strict = poisoning(fmt)
    parts = {PairFormat: lambda f: [f.low, f.high], SegmentedFormat: lambda f: [p for p, _ in f.places()]}
    for part in parts.get(type(strict), lambda f: [f])(strict):
        has_nan = isinstance(part, BlockFormat) and part.scale.nan_code is not None
        assert not has_nan or part.nan_policy is NaNPolicy.POISON_BLOCK
    values = torch.ones(2, 64)
    values[0, 3] = math.nan
    restored = fake_quantize(values, strict)
    assert restored[0, 3].isnan() and not restored[1].isnan().any() and not restored[0, 32:].isnan().any()


def test_a_scale_without_nan_keeps_its_policy() -> None:
    fmt = parse_format("e2m1/32:e5m0-none")
    assert isinstance(fmt, BlockFormat) and fmt.scale.nan_code is None and poisoning(fmt) is fmt
    layer = next(iter(planned(family_model("llama"), format="mxfp4:nan_raise").values()))
    assert poisoned(layer).format == parse_format("mxfp4") and poisoned(layer).name == layer.name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_and_counted(bad: float) -> None:
    model: Any = family_model("llama")
    name, layer = next(iter(planned(model).items()))
    module = model.get_submodule(name)
    check_weight(module, layer, nan="raise")
    with torch.no_grad():
        module.weight[0, :3] = bad
    check_weight(module, layer, nan="poison")
    with pytest.raises(NonFiniteError) as caught:
        check_weight(module, layer, nan="raise")
    assert str(caught.value) == (
        f"{name}.weight holds 3 NaN or Inf values out of {module.weight.numel()}; mend the model, or let them poison"
        " their blocks (--nan poison, nan: poison in a recipe)"
    )
    check_weight(module.to("meta"), layer, nan="raise")  # it is still in its file


def test_a_layer_outside_of_the_blocks_is_rounded_on_its_own() -> None:
    model: Any = family_model("llama-biases-tied", dtype=torch.float32)
    layers = planned(model, include=("lm_head", "embed_tokens"), activations="mxfp8", method="gptq")
    head = quantize_module(model.lm_head, layers["lm_head"], layers["lm_head"].pipeline)
    assert (
        isinstance(head, QuantizedLinear) and head.method == layers["lm_head"].method and head.activations is not None
    )
    assert same_bits(head.tensor.parts["codes"], quantize(model.lm_head.weight.detach(), "mxfp4").parts["codes"])
    name = "model.embed_tokens"
    table = quantize_module(model.get_submodule(name), layers[name], layers[name].pipeline)
    assert isinstance(table, QuantizedEmbedding) and table.kind == "embedding"


def test_a_report_says_what_was_executed() -> None:
    module = QuantizedLinear.from_tensor(quantize(torch.ones(4, 32), "mxfp8"), activations=parse_activation("mxfp4"))
    layer = next(iter(planned(family_model("llama"), activations="nvfp4").values()))
    found = executed_layer(layer, module)
    assert found.format == parse_format("mxfp8") and found.activations == parse_activation("mxfp4")
    assert dataclasses.replace(found, format=layer.format, activations=layer.activations) == layer
    module.activations = None
    assert executed_layer(layer, module).activations is None


def test_activations_of_all_layers_are_set_and_taken_off() -> None:
    model = family_model("llama", dtype=torch.float32)
    quantize_model(model, make_recipe(format="mxfp4"))
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    set_activations(model, parse_activation("mxfp8"))
    assert all(each.activations is not None and str(each.activations.spec) == "mxfp8_e4m3" for each in linears)
    assert len({id(each.activations) for each in linears}) == len(linears) == 14, "each has its own"
    set_activations(model, None)
    assert all(each.activations is None for each in linears)


@pytest.mark.parametrize(
    ("method", "walk", "num_blocks"),
    [("rtn", Walk.WHOLE, 0), ("rtn", Walk.LAYERS, 2), ("gptq", Walk.WHOLE, 2), ("hadamard+rtn", Walk.WHOLE, 2)],
)
def test_plain_rounding_needs_no_structure(method: str, walk: Walk, num_blocks: int) -> None:
    model = family_model("llama")
    layers = planned(model, method=method)
    chains = list(pipelines_of(layers).values())
    structure, notes = structure_for(model, "language", chains, walk)
    assert (len(structure.blocks), notes) == (num_blocks, [])
    assert num_blocks == 0 or structure == describe(model)


def test_rotations_are_checked_and_noted() -> None:
    model = family_model("llama-biases-tied")
    layers = planned(model, method="quarot")
    notes = rotation_notes(model, layers, pipelines_of(layers))
    assert [note.partition(" ")[0] for note in notes] == ["quarot", "quarot"]
    assert "powers of two coarser (arXiv 2511.04214)" in notes[0] and "head, which was tied" in notes[1]
    untied = family_model("llama")
    fine = planned(untied, method="quarot", format="nvfp4")
    assert rotation_notes(untied, fine, pipelines_of(fine)) == []
    plain = planned(model)
    assert rotation_notes(model, plain, pipelines_of(plain)) == []
    with pytest.raises(ModelError, match="cannot be rotated"):
        structure_for(family_model("gemma2"), "language", list(pipelines_of(layers).values()))


@pytest.mark.parametrize(
    ("recipe", "facts", "error", "words"),
    [
        ({"method": "gptq"}, {"text": CalibrationText.ABSENT}, CalibrationError, "needs calibration text"),
        ({"method": "quarot"}, {"walk": Walk.LAYERS}, CalibrationError, "works on the whole model at once"),
        ({}, {"observer": "minmax"}, CalibrationError, "static"),
        ({"method": "quarot", "family": "gemma2"}, {}, ModelError, "cannot be rotated"),
    ],
)
def test_a_job_is_refused_before_a_weight_is_there(
    recipe: dict[str, Any], facts: dict[str, Any], error: type[Exception], words: str
) -> None:
    recipe = dict(recipe)
    model = family_model(recipe.pop("family", "llama")).to("meta")
    asked: dict[str, Any] = {"observer": None, "text": CalibrationText.GIVEN, "walk": Walk.WHOLE} | facts
    with pytest.raises(error, match=words):
        check_job(model, make_recipe(**{"format": "mxfp4", **recipe}), **asked)
    check_job(model, make_recipe(format="mxfp4"), observer=None, text=CalibrationText.ABSENT, walk=Walk.LAYERS)


def test_a_conv1d_keeps_its_kind_and_its_bias() -> None:
    model: Any = family_model("gpt2", dtype=torch.float32)
    name = "transformer.h.0.mlp.c_fc"
    before = model.get_submodule(name)
    quantize_model(model, make_recipe(format="mxfp8"), calibration=Calibration(windows=WINDOWS))
    layer: Any = model.get_submodule(name)
    assert layer.kind == "conv1d" and tuple(layer.shape) == tuple(before.weight.T.shape)
    assert same_bits(layer.weight.T, fake_quantize(before.weight.detach().T.contiguous(), "mxfp8"))
    assert same_bits(layer.bias.detach(), before.bias.detach())
