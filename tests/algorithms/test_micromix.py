"""MicroMix: thresholds and counts by hand from the paper, segments beside the formats one by one, budgets, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from method_problems import block_problem, group_problem, input_rows, layer_problem, model_problem, random, statistics
from microscale.algorithms.block_error import block_error
from microscale.algorithms.contract import BlockStep, GroupProblem, LayerProblem, ModelProblem, ModelStep
from microscale.algorithms.distill import ENOUGH_TOKENS, mean_divergence
from microscale.algorithms.micromix import (
    MicroMix,
    granule,
    relative_magnitudes,
    segment_counts,
    threshold_factor,
)
from microscale.algorithms.pipeline import Pipeline, make_pipeline, parse_method
from microscale.errors import FormatSpecError, RecipeError
from microscale.formats import BlockFormat, SegmentedFormat, parse_activation, parse_format
from microscale.kernels import dequantize, reference
from microscale.kernels.transform import apply_transforms
from microscale.nn.linear import QuantizedLinear
from microscale.transforms import TransformKind, scale_transform


def block_format(spec: str) -> BlockFormat:
    found = parse_format(spec)
    assert isinstance(found, BlockFormat)
    return found


def cut(method: str, group: GroupProblem) -> GroupProblem:
    step = parse_method(method).steps[0]
    assert isinstance(step, MicroMix)
    assert step.refusal(group.layers[0].format, group.layers[0].activations) is None
    return step.segmented(group)


def widths(layer: LayerProblem) -> list[int]:
    return [segment.cols for segment in layer.format.segments] if isinstance(layer.format, SegmentedFormat) else []


def rounded(layer: LayerProblem, method: str = "rtn") -> QuantizedLinear:
    tensor = parse_method(method).rounding.quantize(layer)
    return QuantizedLinear.from_tensor(tensor, activations=layer.activations, transforms=layer.transforms)


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        ("mxfp4", 2 * 8 / 6),
        ("mxfp6_e3m2", 8 * 32 / 28),
        ("mxfp6_e2m3", 2 * 32 / 7.5),
        ("mxfp8", 128 * 128 / 448),
        ("mxfp4_plus", 2 * 8 / 6),
        ("mxint4", 2 * 7),
        ("int4_asym", 15),
        ("int2_asym", 3),
    ],
)
def test_thresholds_are_those_of_the_paper(spec: str, factor: float) -> None:
    """T(n) = 2^b 2^(n-1) / q_max E; for E2M1 and E3M2 0.0105 and 0.0360 of a token's largest number."""
    assert threshold_factor(block_format(spec)) == pytest.approx(factor)
    shares = {"mxfp4": 0.01050, "mxfp6_e3m2": 0.03600}
    if spec in shares:
        assert factor / 254 == pytest.approx(shares[spec], abs=5e-6)


def token(small: int, middle: int, large: int) -> Tensor:
    """A token whose E is 1, with so many numbers at and below 8 / 3, up to 64 / 7.5, and above."""
    numbers = [8 / 3 - 1e-3] * small + [8.5] * middle + [8.6] * (large - 1) + [-254.0]
    return torch.tensor([numbers])


@pytest.mark.parametrize(
    ("numbers", "unit", "counts"),
    [
        ((64, 32, 32), 32, (64, 32, 32)),
        ((63, 33, 32), 32, (32, 64, 32)),
        ((64, 31, 33), 32, (32, 32, 64)),
        ((127, 0, 1), 32, (96, 0, 32)),
        ((1, 1, 126), 32, (0, 0, 128)),
        ((64, 32, 32), 128, (0, 0, 128)),
        ((95, 32, 1), 48, (32, 48, 48)),
    ],
)
def test_counts_are_rounded_up_for_all_but_the_first(
    numbers: tuple[int, int, int], unit: int, counts: tuple[int, ...]
) -> None:
    factors = [threshold_factor(block_format(spec)) for spec in ("mxfp4", "mxfp6_e2m3")]
    magnitudes = relative_magnitudes(token(*numbers))
    assert segment_counts(magnitudes, factors, 128, unit) == counts


def test_each_token_has_its_own_threshold() -> None:
    rows = torch.cat([token(64, 32, 32), 1000 * token(32, 32, 64), torch.zeros(2, 128)])
    shares = [(64 + 32 + 256) / 512, 64 / 512, 96 / 512]  # tokens of zeros are within any threshold
    factors = [threshold_factor(block_format(spec)) for spec in ("mxfp4", "mxfp6_e2m3")]
    counts = segment_counts(relative_magnitudes(rows), factors, 1024, 32)
    assert counts == tuple(round(share * 1024) for share in shares)


def test_granules() -> None:
    mx, groups = block_format("mxfp4"), block_format("int4_asym")
    assert [granule([mx], cols) for cols in (512, 2047, 2048)] == [32, 32, 128]
    assert granule([mx, groups], 512) == 64
    assert granule([block_format("e2m1/48:fp16")], 512) == 96


def test_channels_are_sorted_and_segments_rise() -> None:
    inputs = (
        input_rows(cols=256)
        * torch.linspace(0.1, 3, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(3))]
    )
    group = group_problem(*(layer_problem(cols=256, seed=i, inputs=inputs, name=f"l{i}") for i in range(2)))
    result = cut("micromix:bits=5.5", group)
    first, second = result.layers
    assert first.format == second.format
    assert sum(widths(first)) == 256 and all(width % 32 == 0 for width in widths(first)[1:])
    assert [transform.spec.kind for transform in first.transforms] == [TransformKind.PERMUTE]
    means = inputs.abs().mean(0)[first.transforms[0].parts["order"].long()]
    assert torch.equal(means, means.sort().values)
    assert first.activations is not None and first.activations.format == first.format


def test_the_permutation_leaves_the_function_as_it_was() -> None:
    inputs = input_rows(cols=256)
    problem = cut("micromix:bits=5.5", group_problem(layer_problem(cols=256, inputs=inputs))).layers[0]
    assert torch.equal(problem.weight, layer_problem(cols=256, inputs=inputs).weight)
    moved = functional.linear(apply_transforms(inputs, problem.transforms), problem.target)
    torch.testing.assert_close(moved, functional.linear(inputs, problem.weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["same", "base"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_layer_is_the_sum_of_its_segments(weights: str, method: str) -> None:
    """The oracle quantizes each segment's weights and inputs by the reference kernels and multiplies densely."""
    inputs = input_rows(cols=256)
    problem = cut(f"micromix:bits=5.5,weights={weights}", group_problem(layer_problem(cols=256, inputs=inputs))).layers[
        0
    ]
    layer = rounded(problem, method)
    order = problem.transforms[0].parts["order"].long()
    assert isinstance(problem.format, SegmentedFormat)
    assert problem.activations is not None and isinstance(problem.activations.format, SegmentedFormat)
    total = torch.zeros(len(inputs), 48)
    pairs = zip(problem.format.places(), problem.activations.format.places(), strict=True)
    for (fmt, at), (act, own) in pairs:
        assert at == own
        assert fmt == (block_format("mxfp4") if weights == "base" else act)
        x = reference.fake_quantize(inputs[:, order[at]], act)
        if method == "rtn":
            total += x @ reference.fake_quantize(problem.weight[:, order[at]], fmt).T
        else:
            total += x @ dequantize(layer.tensor)[:, at].T
    torch.testing.assert_close(layer(inputs), total, rtol=1e-4, atol=1e-3)
    assert layer.num_bytes == layer.tensor.num_bytes + 4 * 256


@pytest.mark.parametrize("bits", [4.3, 4.75, 5.0, 5.5, 6.5, 8.5])
def test_a_budget_is_met_and_used(bits: float) -> None:
    group = group_problem(
        *(layer_problem(rows=512, cols=512, seed=i, inputs=input_rows(cols=512), name=f"l{i}") for i in (0, 1))
    )
    layers = cut(f"micromix:bits={bits}", group).layers
    stored = sum(8 * rounded(layer).num_bytes for layer in layers) / (2 * 512 * 512)
    assert stored <= bits
    finest = 8.25 + 32 / 512
    assert stored > min(bits, finest) - 2 * 32 / 512 - 32 / 512 - 1e-9, "a granule of 32 channels costs 2 bits at least"


def test_an_order_that_is_folded_costs_nothing() -> None:
    group = group_problem(layer_problem(rows=64, cols=512, inputs=input_rows(cols=512)))
    folded = dataclasses.replace(group, is_order_folded=True)
    online, free = (cut("micromix:bits=5.0", each).layers[0] for each in (group, folded))
    assert rounded(online).num_bytes * 8 <= 5.0 * 64 * 512 and rounded(free).tensor.num_bytes * 8 <= 5.0 * 64 * 512
    assert rounded(free).tensor.num_bytes - rounded(online).tensor.num_bytes >= 4 * 512 - 4 * 32 * 64
    assert widths(free)[0] < widths(online)[0]
    base = [cut("micromix:bits=5.0,weights=base", each).layers[0].format for each in (group, folded)]
    assert base[0] == base[1], "there the budget is that of the inputs"


def test_a_budget_of_the_narrowest_format_needs_no_order() -> None:
    group = group_problem(layer_problem(cols=256))
    assert cut("micromix:bits=4.25", group).layers[0] is group.layers[0]


def test_the_scale_moves_the_thresholds() -> None:
    group = group_problem(layer_problem(cols=512, inputs=input_rows(cols=512)))
    first = [widths(cut(f"micromix:scale={scale}", group).layers[0])[0] for scale in (1, 2, 4, 8)]
    assert first == sorted(first) and len(set(first)) > 1


def test_inputs_of_eight_bits_stay_whole() -> None:
    group = group_problem(layer_problem(activations="mxfp8", cols=256))
    layer = cut("micromix:bits=6.0", group).layers[0]
    assert layer.activations == parse_activation("mxfp8") and len(widths(layer)) > 1


def test_two_and_four_bit_channels_with_eight_bit_outliers() -> None:
    group = group_problem(layer_problem("int2/32:fp16:asym", None, cols=256))
    layer = cut("micromix:wider=(int4/32:fp16:asym,mxfp8),bits=5.0", group).layers[0]
    assert isinstance(layer.format, SegmentedFormat)
    assert [segment.format.element.bits for segment in layer.format.segments] == [2, 4, 8]
    assert rounded(layer).tensor.num_bytes * 8 <= 5.0 * 48 * 256


def test_smoothing_before_is_seen() -> None:
    """Segments follow the inputs as the layer sees them, after a scale that stays online."""
    problem = layer_problem(cols=256)
    scale = 1 / statistics(input_rows(cols=256)).amax
    smooth = dataclasses.replace(problem, transforms=(scale_transform(scale),))
    plain, other = (cut("micromix:bits=6.0", group_problem(each)).layers[0] for each in (problem, smooth))
    order = other.transforms[1].parts["order"].long()
    means = (input_rows(cols=256) * scale).abs().mean(0)[order]
    assert torch.allclose(means, means.sort().values, rtol=1e-4)
    assert not torch.equal(order, plain.transforms[0].parts["order"].long())


@pytest.mark.parametrize(
    ("method", "fmt", "activations", "problem"),
    [
        ("micromix:bits=4.0", "mxfp4", "mxfp4", "bits=4 is below the 4.25 bits .* smallest possible"),
        ("micromix", "mxfp8", "mxfp8", "ever finer"),
        ("micromix:wider=(mxfp8,mxfp6_e2m3)", "mxfp4", "mxfp4", "ever finer"),
        ("micromix", "mxfp4", "nvfp4@static", "numbers at hand, not static"),
        ("micromix", "adaptive_2_4", None, "cannot be a segment"),
        ("micromix", "mxfp4", "mxfp4_sparse", "cannot be a segment"),
        ("micromix:weights=base", "mxfp4", None, "leaves nothing to choose"),
    ],
)
def test_what_cannot_be_is_refused(method: str, fmt: str, activations: str | None, problem: str) -> None:
    step = parse_method(method).steps[0]
    spec = None if activations is None else parse_activation(activations)
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(step.refusal(parse_format(fmt), spec))


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("hadamard+micromix", "a rotation spreads outliers over all"),
        ("quarot+micromix+gptq", "outlier channels"),
        ("spinquant+micromix+gptq", "outlier channels"),
        ("permute+micromix", "mixes or moves channels"),
        ("micromix+omniquant+rtn", "transforms and clips for the blocks of one format"),
        ("micromix+distill+rtn", "transform=hadamard mixes channels.*distill:transform=none"),
        ("micromix+distill:transform=shared", "transform=shared mixes channels"),
        ("distill:transform=none+micromix", "must come in the order micromix then distill then rtn"),
        ("micromix+smoothquant", "must come in the order smoothquant then micromix then rtn"),
        ("micromix:weights=all", "weights must be same or base"),
        ("micromix:bits=few", "bits must be paper or a number"),
        ("micromix:scale=0", "scale must be positive"),
        ("micromix:wider=()", "at least one format"),
        ("micromix:wider=(adaptive_2_4)", "cannot be in adaptive_2_4"),
    ],
)
def test_chains_and_options_that_make_no_sense(method: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        parse_method(method)
    with pytest.raises(FormatSpecError, match="mxfp5"):
        parse_method("micromix:wider=(mxfp5)")


def test_the_words_of_a_chain_are_kept() -> None:
    text = "smoothquant+micromix:wider=(mxfp6_e3m2,mxfp8_e5m2),bits=5.0,weights=base+gptq"
    found: Pipeline = parse_method(text)
    assert parse_method(found.text) == found and found.is_online and found.is_streamed


@pytest.mark.parametrize(
    ("method", "is_found_ahead", "is_fed"),
    [
        ("mxplus+micromix+distill:transform=none+rtn", True, False),
        ("rule+smoothquant+micromix+distill:transform=none+gptq", True, True),
        ("micromix+distill:transform=none+autoround", True, True),
        ("micromix+autoround+rtn", False, True),
        ("distill+rtn", False, False),
        ("smoothquant+distill+rtn", True, False),
        ("rule+awq+distill+gptq", True, True),
    ],
)
def test_what_learns_end_to_end_comes_behind_segments(method: str, is_found_ahead: bool, is_fed: bool) -> None:
    found = parse_method(method)
    assert parse_method(found.text) == found and found.needs_calibration
    assert (found.is_found_ahead, found.is_fed) == (is_found_ahead, is_fed)


@pytest.mark.parametrize("activations", ["mxfp4", "mxfp8", None])
def test_distillation_learns_the_rounding_of_segments(activations: str | None) -> None:
    """The rounded layer, its order applied online, gets nearer to the model; without a step nothing changes."""
    problem = model_problem(activations=activations)
    group = cut("micromix:bits=5.5", problem.groups[0])
    problem = dataclasses.replace(problem, groups=(group,))
    learned = {epochs: distilled(problem, epochs) for epochs in (0, 12)}
    assert torch.equal(learned[0].weight, group.layers[0].weight), "the order is undone exactly"
    after = learned[12]
    assert after.format == group.layers[0].format and after.transforms == group.layers[0].transforms
    errors = [float(mean_divergence(problem, {one.name: rounded(one)}, problem.windows)) for one in (learned[0], after)]
    assert errors[1] < 0.85 * errors[0]


def distilled(problem: ModelProblem, epochs: int) -> LayerProblem:
    rate = 0.003 * ENOUGH_TOKENS / problem.windows.token_ids.numel()  # few tokens take less of it
    step = parse_method(f"micromix+distill:transform=none,lr={rate:g},epochs={epochs}").steps[1]
    assert isinstance(step, ModelStep)
    with torch.enable_grad():
        return step.learn(problem)[0].layers[0]


def test_rounding_is_tuned_in_segments() -> None:
    problem = block_problem(width=128)
    groups = tuple(cut("micromix:bits=6.0", group) for group in problem.groups)
    assert all(widths(layer) for group in groups for layer in group.layers)
    problem = dataclasses.replace(problem, groups=groups)
    step = parse_method("micromix+autoround:steps=30+rtn").steps[1]
    assert isinstance(step, BlockStep)
    with torch.enable_grad():
        tuned = step.learn(problem)
    assert block_error(problem, tuned) < 0.9 * block_error(problem, groups)


def test_a_token_of_nothing_but_zeros() -> None:
    assert torch.equal(relative_magnitudes(torch.zeros(2, 32)), torch.zeros(64))
    group = group_problem(layer_problem(cols=64, inputs=torch.zeros(8, 64)))
    assert cut("micromix", group).layers[0] is group.layers[0]
    assert not bool(torch.isnan(relative_magnitudes(random(4, 32))).any())


@pytest.mark.parametrize("options", ["", ",weights=base", ",wider=(mxfp6_e2m3)", ",wider=(mxfp6_e3m2,mxfp8)"])
@pytest.mark.parametrize("formats", [("mxfp4", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp4", None)])
@pytest.mark.parametrize("bits", [4.25, 4.6, 5.5, 8.5])
def test_what_was_cut_can_be_cut_again(options: str, formats: tuple[str, str | None], bits: float) -> None:
    fmt, activations = formats
    step = parse_method(f"micromix:bits={bits}{options}").steps[0]
    assert isinstance(step, MicroMix)
    problem = layer_problem(fmt, activations, cols=256, inputs=input_rows(cols=256))
    if step.refusal(problem.format, problem.activations) is not None:
        pytest.skip("refused for these formats")
    before = problem.format
    assert isinstance(before, BlockFormat)
    done = step.segmented(group_problem(problem)).layers[0]
    again = step.repeated((before, problem.activations), (done.format, done.activations))
    assert (again is None) == (done is problem or done.format == before)
    if again is not None:
        assert parse_method(make_pipeline([again]).text).steps[0] == again
        other = again.segmented(group_problem(problem)).layers[0]
        assert (other.format, other.activations) == (done.format, done.activations)
        assert torch.equal(other.transforms[0].parts["order"], done.transforms[0].parts["order"])


def test_counts_by_hand() -> None:
    group = group_problem(layer_problem(cols=128))
    assert widths(cut("micromix:counts=(64,0,64)", group).layers[0]) == [64, 64]
    assert cut("micromix:counts=(128,0,0)", group).layers[0] is group.layers[0]
    for words in ("(64,32,64)", "(80,16,32)"):
        with pytest.raises(
            RecipeError, match="add up to the layer's 128 channels, all but the first in multiples of 32"
        ):
            cut(f"micromix:counts={words}", group)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("counts=(64,64)", "must hold 3 numbers"),
        ("counts=(64,-32,96)", "numbers like"),
        ("counts=many", "numbers like"),
        ("counts=(64,32,32),bits=5", "leave nothing for bits or scale"),
        ("counts=(64,32,32),scale=2", "leave nothing for bits or scale"),
    ],
)
def test_counts_that_make_no_sense(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_method(f"micromix:{options}")
