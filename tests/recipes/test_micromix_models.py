"""Models with layers in segments: saved, read back, inspected, resumed, generated from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import microscale
from family_models import family_model
from microscale.algorithms.distill import ENOUGH_TOKENS
from microscale.checkpoint.reader import read_json
from microscale.checkpoint.writer import write_json
from microscale.errors import CheckpointError, LayoutError, RecipeError
from microscale.formats import SegmentedFormat, format_name
from microscale.integrations.loading import load_original
from microscale.nn.inference import prepare_for_inference
from microscale.nn.linear import QuantizedLinear
from microscale.planning.inspection import inspect_checkpoint
from microscale.recipes import preparing
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibrated import Calibration
from microscale.recipes.calibration import Feed
from microscale.recipes.offload import layer_state, restore_layer
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import make_recipe
from microscale.transforms import TransformKind
from small_models import same_tensors, save_two_layers

WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
METHOD = "micromix:bits=5.5"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("original") / "model")


def quantized(
    original: Path,
    method: str = METHOD,
    fmt: str = "mxfp4",
    activations: str | None = "mxfp4",
    windows: Tensor = WINDOWS,
    **options: Any,
) -> Any:
    model = load_original(original).to(torch.float32)
    return microscale.quantize(model, fmt, activations=activations, method=method, calibration=windows, **options)


def layers_of(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS, use_cache=False).logits


@pytest.mark.parametrize(
    ("method", "fmt", "activations"),
    [
        (METHOD, "mxfp4", "mxfp4"),
        (f"smoothquant+{METHOD}+gptq", "mxfp4", "mxfp4"),
        (f"rule+{METHOD},weights=base+gptq+lowrank:rank=2", "mxfp4", "mxfp4"),
        ("micromix:bits=5.5,wider=(mxfp8)", "mxfp4_plus", "mxfp4_plus"),
        (f"mxplus+{METHOD}+distill:transform=none,epochs=1+rtn", "mxfp4", "mxfp4"),
        ("adaptive-2-4", "int2/32:fp16:asym", None),
        ("micromix", "nvfp4", None),
    ],
)
def test_a_checkpoint_goes_there_and_back(
    method: str, fmt: str, original: Path, activations: str | None, tmp_path: Path
) -> None:
    model = quantized(original, method, fmt, activations)
    segmented = {
        name: module for name, module in layers_of(model).items() if isinstance(module.format, SegmentedFormat)
    }
    assert segmented, "no layer has segments"
    assert microscale.save(model, tmp_path / "saved") == "microscale"
    loaded = microscale.load(tmp_path / "saved")
    again = layers_of(loaded)
    for name, module in layers_of(model).items():
        assert again[name].format == module.format
        assert not same_tensors(dict(again[name].state_dict()), dict(module.state_dict()))
        own, other = module.activations, again[name].activations
        assert (own is None and other is None) or (own is not None and other is not None and own.spec == other.spec)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    facts = {layer.name: layer for layer in inspect_checkpoint(tmp_path / "saved").quantized}
    for name, module in segmented.items():
        assert facts[name].format == format_name(module.format)
        assert facts[name].num_bytes == module.num_bytes, "what stays for run time included"


def packed_parts(model: Any) -> dict[str, Tensor]:
    return {key: value for name, module in layers_of(model).items() for key, value in named_parts(name, module)}


def named_parts(name: str, module: QuantizedLinear) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{part}", value) for part, value in module.state_dict().items()]


@pytest.mark.parametrize(
    ("weights", "fold", "activations"),
    [("same", "", "mxfp4"), ("base", "smoothquant+", "mxfp4"), ("same", "smoothquant+", "mxfp8")],
)
def test_segments_before_distillation_are_those_of_the_unquantized_model(
    weights: str, fold: str, activations: str, original: Path
) -> None:
    """Without a step of learning the chain is plain MicroMix on the inputs that the unquantized model gives."""
    cut = f"{fold}micromix:bits=5.5,weights={weights}"
    plain = quantized(original, f"{cut}+rtn", activations=activations, feed="original")
    ahead = quantized(original, f"{cut}+distill:transform=none,epochs=0+rtn", activations=activations)
    assert any(isinstance(module.format, SegmentedFormat) for module in layers_of(plain).values())
    assert {name: module.format for name, module in layers_of(plain).items()} == {
        name: module.format for name, module in layers_of(ahead).items()
    }
    assert not same_tensors(packed_parts(plain), packed_parts(ahead))


def test_distillation_in_segments_brings_the_model_nearer(original: Path) -> None:
    exact = logits(load_original(original).to(torch.float32)).log_softmax(-1)
    windows = torch.randint(3, 90, (64, 16), generator=torch.Generator().manual_seed(2))
    rate = 0.0001 * ENOUGH_TOKENS / windows.numel()  # few tokens take less of it
    chains = [f"{METHOD}+rtn", f"{METHOD}+distill:transform=none,epochs=8,lr={rate:g}+rtn"]
    plain, learned = (logits(quantized(original, chain, windows=windows)).log_softmax(-1) for chain in chains)
    far, near = ((exact.exp() * (exact - found)).sum(-1).mean() for found in (plain, learned))
    assert float(near) < 0.8 * float(far)


WIDE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES = {
    "llama-biases-tied": WIDE,
    "phi3": WIDE,
    "phi": WIDE,
    "opt-gelu": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "gpt2": {"n_embd": 64, "n_inner": 96},
    "qwen2_moe": WIDE | {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 64},
}


def family_quantized(name: str, method: str) -> Any:
    model = family_model(name, dtype=torch.float32, **FAMILIES[name])
    recipe = make_recipe(format="mxfp4", activations="mxfp4", method=method)
    quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS, batch=2, feed=Feed.ORIGINAL))
    return model


@pytest.mark.parametrize("fold", ["", "awq:steps=2+"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_order_gives_the_model_that_the_online_one_gives(
    name: str, fold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of gate and up lie along their columns, so that rows in another order are quantized alike."""
    method = f"{fold}micromix:bits=5.5,weights=base"  # a budget of the inputs: the same segments in both
    folded = family_quantized(name, method)
    monkeypatch.setattr(preparing, "fold_segment_order", lambda model, block, group, problem: problem)
    online = family_quantized(name, method)
    own, other = layers_of(folded), layers_of(online)
    moved = [each for each, module in own.items() if kinds(module) != kinds(other[each])]
    ends = (".down_proj", ".fc2", "mlp.c_proj")
    assert moved and all(each.endswith(ends) for each in moved)
    assert not any(TransformKind.PERMUTE in kinds(module) for each, module in own.items() if each.endswith(ends))
    assert {each: module.format for each, module in own.items()} == {each: m.format for each, m in other.items()}
    torch.testing.assert_close(logits(folded), logits(online), rtol=1e-4, atol=1e-4)


def kinds(module: QuantizedLinear) -> list[TransformKind]:
    return [] if module.transforms is None else [spec.kind for spec in module.transforms.specs]


@pytest.mark.parametrize("method", [METHOD, f"{METHOD}+distill:transform=none,epochs=1+rtn"])
def test_a_folded_order_is_not_stored(method: str, original: Path) -> None:
    model = quantized(original, method)
    for name, module in layers_of(model).items():
        if isinstance(module.format, SegmentedFormat):
            assert kinds(module) == ([] if name.endswith("down_proj") else [TransformKind.PERMUTE])
            assert 8 * module.num_bytes <= 5.5 * module.in_features * module.out_features or "down" not in name


def test_the_report_says_what_was_executed(original: Path) -> None:
    model = load_original(original)
    recipe = make_recipe(format="mxfp4", activations="mxfp4", method=METHOD)
    report = quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS))
    layers = layers_of(model)
    assert {layer.name: layer.format for layer in report.plan.layers} == {n: m.format for n, m in layers.items()}
    stored = sum(8 * module.num_bytes for module in layers.values())
    assert report.bits_per_weight == stored / sum(m.in_features * m.out_features for m in layers.values()) <= 5.5


def test_layers_run_on_the_kernels_too(original: Path) -> None:
    model = quantized(original)
    expected = logits(model)
    changed = prepare_for_inference(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert not changed or set(changed) == set(layers_of(model))


def test_a_finished_layer_is_restored(original: Path) -> None:
    model, fresh = quantized(original), load_original(original).to(torch.float32)
    recipe = make_recipe(format="mxfp4", activations="mxfp4", method=METHOD)
    planned = {layer.name: layer for layer in make_plan(fresh, recipe).layers}
    name = "model.layers.0"
    restore_layer(fresh, name, layer_state(model.get_submodule(name)), planned)
    own, other = layers_of(model.get_submodule(name)), layers_of(fresh.get_submodule(name))
    assert {key: module.format for key, module in own.items()} == {key: module.format for key, module in other.items()}
    assert not same_tensors(dict(model.get_submodule(name).state_dict()), dict(fresh.get_submodule(name).state_dict()))


@pytest.mark.parametrize("layout", ["compressed-tensors", "quark"])
def test_other_layouts_refuse_with_the_reason(layout: str, original: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="leaves work for run time, which this layout has no place for"):
        quantized(original, activations=None, layout=layout)
    with pytest.raises(LayoutError, match="cannot hold layer"):
        microscale.save(quantized(original), tmp_path / "saved", layout=layout)


def saved(original: Path, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Write a model; returns its config, its tensors and the name of a layer in segments."""
    model = quantized(original)
    microscale.save(model, path)
    name = next(name for name, module in layers_of(model).items() if isinstance(module.format, SegmentedFormat))
    return read_json(path / "config.json"), load_file(path / "model.safetensors"), name


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    write_json(path / "config.json", config)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_damaged_segments_are_named(original: Path, tmp_path: Path) -> None:
    config, tensors, name = saved(original, tmp_path / "saved")
    scheme = config["quantization_config"]["schemes"][config["quantization_config"]["layers"][name]["scheme"]]
    missing = {key: value for key, value in tensors.items() if key != f"{name}.weight_s1_codes"}
    write(tmp_path / "saved", config, missing)
    with pytest.raises(CheckpointError, match=r"weight_s1_codes' is missing"):
        microscale.load(tmp_path / "saved")
    scheme["format"] = "segments(mxfp4*32)"
    write(tmp_path / "saved", config, tensors)
    with pytest.raises(CheckpointError, match="is for tensors of 32 columns"):
        microscale.load(tmp_path / "saved")


def test_a_budget_too_small_is_refused_before_anything_is_changed(original: Path) -> None:
    model = load_original(original)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match=r"q_proj.*bits=4 is below the 4.25 bits"):
        quantize_model(
            model, make_recipe(format="mxfp4", method="micromix:bits=4"), calibration=Calibration(windows=WINDOWS)
        )
    assert not same_tensors(before, dict(model.state_dict()))
