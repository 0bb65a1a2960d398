"""The engine that quantizes with calibration: every family, what is measured where, methods by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import microscale
from family_models import CONFIGS, family_model, run
from microscale.algorithms import registry
from microscale.algorithms.contract import BlockProblem, BlockStep, GroupProblem, LayerProblem
from microscale.algorithms.pipeline import parse_method
from microscale.calibration.statistics import StatisticsCollector, Wanted
from microscale.errors import CalibrationError, ModelError, NonFiniteError, TextError
from microscale.formats import parse_format
from microscale.kernels import dequantize
from microscale.nn.inference import cached_weights
from microscale.nn.linear import QuantizedLinear
from microscale.recipes.apply import QuantizationReport, quantize_model
from microscale.recipes.calibration import Calibration, Feed
from microscale.recipes.recipe import make_recipe
from recipe_words import make_rule
from small_models import same_tensors, save_random_model

METHODS = ["gptq", "awq", "smoothquant", "hadamard+gptq"]
WINDOWS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
"""Three windows in batches of two: the last batch is smaller."""


def apply(model: Any, method: str = "gptq", *, feed: Feed = Feed.QUANTIZED, **fields: Any) -> QuantizationReport:
    recipe = make_recipe(**({"format": "mxfp4", "method": method} | fields))
    return quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS, batch=2, feed=feed, seed=0))


def packed(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{part}": t for n, m in packed(model).items() for part, t in m.tensor.parts.items()}


def loaded(path: Path) -> Any:
    """Load a model with the attention that the models of these tests have."""
    model = microscale.load(path)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_goes_through_and_lasts(name: str, method: str, tmp_path: Path) -> None:
    model = family_model(name, dtype=torch.float32)
    before = run(model)
    report = apply(model, method, format="mxint8", activations="mxint8")
    assert set(packed(model)) == {layer.name for layer in report.plan.layers}
    assert all(module.method == parse_method(method).text for module in packed(model).values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = run(model)
    assert float((after - before).norm() / before.norm()) < 0.15  # 8 bits: a mixed-up scale or transform costs all
    if method in ("awq", "hadamard+gptq"):
        microscale.save(model, tmp_path / "out")
        assert torch.equal(run(loaded(tmp_path / "out")), after)


def test_the_same_again_gives_the_same_bits() -> None:
    models = [family_model("qwen3", dtype=torch.float32) for _ in range(2)]
    for model in models:
        apply(model, "awq+hadamard+gptq")
    assert same_tensors(codes(models[0]), codes(models[1])) == []


def statistics(model: nn.Module, name: str) -> Any:
    """Measure the inputs of a layer in the whole model, batch by batch as the engine does."""
    collector: list[StatisticsCollector] = []

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not collector:
            collector.append(StatisticsCollector(arguments[0].shape[-1], wanted=Wanted.SECOND_MOMENT))
        collector[0].update(arguments[0])

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with cached_weights(model), torch.no_grad():
        for piece in WINDOWS.split(2):
            model(input_ids=piece, use_cache=False)
    handle.remove()
    return collector[0].result()


def by_hand(model: nn.Module, name: str, inputs: Any) -> Tensor:
    layer = LayerProblem(
        name=name,
        weight=model.get_submodule(name).get_parameter("weight").detach(),
        format=parse_format("mxfp4"),
        activations=None,
        dtype=torch.float32,
        inputs=inputs,
    )
    return microscale.dequantize_tensor(parse_method("gptq").rounding.quantize(layer))


LAYER = "model.layers.1.mlp.up_proj"


def test_quantized_layers_feed_the_next() -> None:
    model, original = family_model("llama", dtype=torch.float32), family_model("llama", dtype=torch.float32)
    apply(model)
    earlier = family_model("llama", dtype=torch.float32)
    apply(earlier, exclude=("layers.1.mlp.*",))  # attention of layer 1 stands before its mlp
    expected = by_hand(original, LAYER, statistics(earlier, LAYER))
    assert torch.equal(packed(model)[LAYER].weight, expected)
    assert not torch.equal(expected, by_hand(original, LAYER, statistics(original, LAYER)))


def test_or_unquantized_ones_do() -> None:
    model, original = family_model("llama", dtype=torch.float32), family_model("llama", dtype=torch.float32)
    apply(model, feed=Feed.ORIGINAL)
    for name, module in packed(model).items():
        assert torch.equal(module.weight, by_hand(original, name, statistics(original, name))), name


class Watch(BlockStep):
    """Learns nothing, but keeps what it is shown."""

    name: ClassVar[str] = "watch"
    source: ClassVar[str] = "this test"
    seen: ClassVar[list[tuple[list[Tensor], list[Tensor]]]] = []

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        outputs = [problem.forward({}, batch).detach() for batch in range(len(problem.targets))]
        Watch.seen.append((list(problem.targets), outputs))
        return problem.groups


@pytest.mark.parametrize("feed", Feed)
def test_what_learns_from_a_layer_sees_the_exact_outputs(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REGISTERED, "watch", Watch)
    monkeypatch.setattr(Watch, "seen", [])
    original, model = family_model("llama", dtype=torch.float32), family_model("llama", dtype=torch.float32)
    apply(model, "watch+rtn", feed=feed)
    exact: dict[int, list[Tensor]] = {0: [], 1: []}
    for place, layer in enumerate(original.model.layers):
        layer.register_forward_hook(lambda _m, _a, output, place=place: exact[place].append(output))
    with torch.no_grad():
        for piece in WINDOWS.split(2):
            original(input_ids=piece, use_cache=False)
    for place, (targets, outputs) in enumerate(Watch.seen):
        assert [len(each) for each in targets] == [2, 1]
        for target, output, expected in zip(targets, outputs, exact[place], strict=True):
            assert torch.allclose(target, expected, atol=1e-6)
            # The second layer is fed what the quantized first one gives, or what the original one does.
            assert torch.allclose(output, target, atol=1e-6) == (place == 0 or feed is Feed.ORIGINAL)
    assert len(Watch.seen) == 2


def test_layers_of_one_group_with_methods_of_their_own() -> None:
    model, plain = family_model("llama", dtype=torch.float32), family_model("llama", dtype=torch.float32)
    rules = (
        make_rule(match="k_proj", method="rtn"),
        make_rule(match="layers.1.mlp.*", method="hadamard+gptq", weights="mxfp8"),
        make_rule(match="v_proj", method="awq"),
    )
    apply(model, "gptq", rules=rules)
    apply(plain, "rtn")
    methods = {name.removeprefix("model.layers."): module.method for name, module in packed(model).items()}
    assert methods["0.self_attn.q_proj"] == "gptq" and methods["0.self_attn.k_proj"] == "rtn"
    assert methods["1.mlp.down_proj"] == "hadamard+gptq" and methods["0.mlp.down_proj"] == "gptq"
    with_transforms = {name for name, module in packed(model).items() if module.transforms is not None}
    # A group that is scaled in part keeps the scale online.
    mlp = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert with_transforms == mlp | {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    for place in (0, 1):
        name = f"model.layers.{place}.self_attn.k_proj"
        assert torch.equal(packed(model)[name].weight, packed(plain)[name].weight)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(packed(model)[name].weight, packed(plain)[name].weight)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_family_is_served_without_folding_and_says_so(method: str, tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    torch.manual_seed(0)
    model: Any = transformers.BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = run(model)
    norms = {name: p.clone() for name, p in model.named_parameters() if "layernorm" in name}
    report = apply(model, method, format="mxint8")
    said = [note for note in report.plan.notes if "BloomForCausalLM is of no family that we have a record of" in note]
    assert bool(said) == (method in ("awq", "smoothquant"))
    assert all(torch.equal(p, norms[name]) for name, p in model.named_parameters() if name in norms)
    assert all((module.transforms is not None) == (method != "gptq") for module in packed(model).values())
    after = run(model)
    assert float((after - before).norm() / before.norm()) < 0.1
    microscale.save(model, tmp_path / "out")
    assert torch.equal(run(loaded(tmp_path / "out")), after)


@pytest.mark.parametrize("method", [*METHODS, "awq+rtn:search=true+lowrank"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_that_no_token_reaches_is_rounded_on_its_own(family: str, method: str) -> None:
    def build() -> Any:
        model = family_model(family, dtype=torch.float32, num_experts_per_tok=1)
        with torch.no_grad():
            for layer in model.model.layers:
                router = getattr(layer.mlp, "gate", None)
                if router is not None:
                    router.weight[1], router.weight[2:] = -router.weight[0], 0.0  # |t| beats 0: experts 0 and 1
        return model

    model, plain = build(), build()
    before = run(model)
    apply(model, method)
    apply(plain, "rtn:search=true" if "search" in method else "rtn")
    names = [name for name in packed(model) if ".layers.0." in name and ".experts.3." in name]
    assert len(names) == 3
    if "smoothquant" not in method:  # experts behind one norm are not scaled, but all of them would be
        weights = {name: packed(model)[name] for name in names}
        if "hadamard" not in method:
            others = {name: packed(plain)[name].tensor for name in names}
            pairs = [(dequantize(each.tensor), dequantize(others[name])) for name, each in weights.items()]
            assert all(torch.equal(*pair) for pair in pairs)
    assert bool(torch.isfinite(run(model)).all()) and run(model).shape == before.shape


def test_weights_that_are_not_finite_are_named_before_anything_changes() -> None:
    model = family_model("llama", dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        apply(model)
    assert packed(model) == {}


def test_activations_that_are_not_finite_are_named() -> None:
    model = family_model("llama", dtype=torch.float32)
    model.model.layers[1].input_layernorm.weight.data[5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the input of model\.layers\.1\.self_attn\.q_proj holds"):
        apply(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "mr-gptq", "qad", "rtn-weighted"])
def test_methods_that_learn_want_calibration(method: str) -> None:
    with pytest.raises(CalibrationError, match=r"needs calibration text: give --calibration FILE"):
        quantize_model(family_model("llama", dtype=torch.float32), make_recipe(format="mxfp4", method=method))


def test_methods_that_see_no_input_want_none() -> None:
    model = family_model("llama", dtype=torch.float32)
    seen: list[tuple[int, int, str]] = []
    report = quantize_model(model, make_recipe(format="mxfp4", method="hadamard"), lambda *args: seen.append(args))
    assert len(packed(model)) == len(report.plan.layers) == 14
    assert seen == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1"), (2, 2, "")]
    assert all(module.transforms is not None for module in packed(model).values())


def test_what_lies_outside_of_the_layers_is_rounded_on_its_own() -> None:
    model = family_model("llama", dtype=torch.float32)
    report = apply(model, "gptq", include=("lm_head", "embed_tokens"))
    assert {"lm_head", "model.embed_tokens"} < {layer.name for layer in report.plan.layers}
    plain = family_model("llama", dtype=torch.float32)
    apply(plain, "rtn", include=("lm_head",))
    assert torch.equal(packed(model)["lm_head"].weight, packed(plain)["lm_head"].weight)


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    model = family_model("qwen2", dtype=torch.bfloat16)
    apply(model, "awq+gptq", exclude=("layers.0.mlp.*",))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(module.weight_dtype == torch.bfloat16 for module in packed(model).values())


def test_text_that_does_not_serve(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model")
    (tmp_path / "short.txt").write_text("too short")
    options = {"method": "gptq", "samples": 4, "window": 16}
    with pytest.raises(TextError, match=r"has 9 tokens; 4 windows of 16 .* take 60"):
        microscale.quantize(path, "mxfp4", calibration=tmp_path / "short.txt", **options)
    with pytest.raises(TextError, match="cannot be read"):
        microscale.quantize(path, "mxfp4", calibration=tmp_path / "absent.txt", **options)
    with pytest.raises(TextError, match="hold ids from 0 to 5000"):
        microscale.quantize(path, "mxfp4", calibration=torch.tensor([[0, 5000]]), **options)
    with pytest.raises(CalibrationError, match=r"unknown feed 'both'; possible: quantized, original"):
        microscale.quantize(path, "mxfp4", calibration=torch.tensor([[0, 5]]), feed="both", **options)


def test_a_model_without_tokenizer_wants_tokens(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model")
    for file in path.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text.txt").write_text("a text that nobody can cut into tokens" * 9)
    options = {"method": "gptq", "samples": 2, "window": 16}
    for model in (path, family_model("llama", dtype=torch.float32)):
        with pytest.raises(ModelError, match="calibration text needs a tokenizer"):
            microscale.quantize(model, "mxfp4", calibration=tmp_path / "text.txt", **options)
    assert packed(microscale.quantize(path, "mxfp4", calibration=WINDOWS, **options))


def test_json_lines_with_a_field_of_their_own(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model")
    lines = [f'{{"text": 3, "body": "line {i} of the text, with some letters"}}\n' for i in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    options = {"method": "gptq", "samples": 2, "window": 16, "calibration": tmp_path / "text.jsonl"}
    assert packed(microscale.quantize(path, "mxfp4", calibration_field="body", **options))
    with pytest.raises(TextError, match="field 'text' of line 1"):
        microscale.quantize(path, "mxfp4", **options)
    with pytest.raises(TextError, match="has no field 'content'; its fields are 'text', 'body'"):
        microscale.quantize(path, "mxfp4", calibration_field="content", **options)
