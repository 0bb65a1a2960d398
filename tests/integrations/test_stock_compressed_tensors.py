"""compressed-tensors, both ways: what we write is read by its own library, and what it writes is read by us.

The oracle is `AutoModelForCausalLM.from_pretrained` of transformers with the compressed-tensors package, which knows
nothing of microscale: the same weights and the same logits, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import microscale
from command_line import fail, succeed
from microscale.checkpoint.compressed_tensors import input_range
from microscale.errors import CheckpointError, LayoutError
from microscale.formats import format_name, parse_format
from microscale.nn.activation import ActivationQuantizer
from microscale.nn.inference import row_major_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from small_models import (
    edit_config,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    same_bits,
    same_tensors,
    save_random_model,
    save_two_layers,
)

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


def stock(path: Path) -> Any:
    """Load with transformers and compressed-tensors alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(model.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    return model


def assert_equal_in_both(path: Path) -> Any:
    """Compare logits and weights of our loader and of the stock one, in one order of sums; returns our model."""
    ours, theirs = microscale.load(path), stock(path)
    expected = logits(theirs)  # the first call decompresses
    assert bool(torch.isfinite(expected).all())
    with row_major_weights(ours):  # sums in the order of torch, as the stock library has them
        assert same_bits(logits(ours), expected)
    packed = {name: module for name, module in ours.named_modules() if isinstance(module, PackedModule)}
    assert packed
    for name, module in packed.items():
        assert same_bits(module.weight, theirs.get_submodule(name).weight.data), name
    return ours


CASES: dict[str, tuple[list[str], set[tuple[str, str | None]]]] = {
    "W4A16": (["-f", "mxfp4"], {("mxfp4", None)}),
    "W8A16": (["-f", "mxfp8"], {("mxfp8_e4m3", None)}),
    "NVFP4": (["-f", "nvfp4"], {("nvfp4", None)}),
    "W4A4": (["-f", "mxfp4", "-a", "mxfp4"], {("mxfp4", "mxfp4:even")}),
    "W4A8": (["-f", "mxfp4", "-a", "mxfp8"], {("mxfp4", "mxfp8_e4m3:even(1)")}),
    "W8A8": (["-f", "mxfp8", "-a", "mxfp8"], {("mxfp8_e4m3", "mxfp8_e4m3:even(1)")}),
    "W8A4": (["-f", "mxfp8", "-a", "mxfp4"], {("mxfp8_e4m3", "mxfp4:even")}),
    "NVFP4 A8": (["-f", "nvfp4", "-a", "mxfp8"], {("nvfp4", "mxfp8_e4m3:even(1)")}),
    "their rule by name": (["-f", "mxfp4:even", "-a", "mxfp4:even"], {("mxfp4:even", "mxfp4:even")}),
    "rceil": (["-f", "mxfp4:rceil"], {("mxfp4:rceil", None)}),
    "threshold": (["-f", "mxfp4:threshold(7.25)", "-a", "mxfp8"], {("mxfp4:threshold(7.25)", "mxfp8_e4m3:even(1)")}),
    "mse": (["-f", "mxfp4:mse(-1,1)"], {("mxfp4:mse(-1,1)", None)}),
    "stochastic": (["-f", "mxfp8:stochastic(3)"], {("mxfp8_e4m3:stochastic(3)", None)}),
    "nvfp4 mse": (["-f", "nvfp4:mse"], {(format_name(parse_format("nvfp4:mse")), None)}),
    "mixed": (
        [
            *("-f", "mxfp4", "-a", "mxfp4", "--rule", "*.down_proj=mxfp8/mxfp8", "--rule", "o_proj=nvfp4/none"),
            *("--rule", "layers.0.self_attn.q_proj=none"),
        ],
        {("mxfp4", "mxfp4:even"), ("mxfp8_e4m3", "mxfp8_e4m3:even(1)"), ("nvfp4", None)},
    ),
    "one exclusion": (["-f", "mxfp4", "--exclude", "model.layers.0.*"], {("mxfp4", None)}),
    "same file format, two activations": (
        ["-f", "mxfp4", "--rule", "down_proj=mxfp4/mxfp8"],
        {("mxfp4", None), ("mxfp4", "mxfp8_e4m3:even(1)")},
    ),
    "tied head": (
        ["-f", "mxfp8", "--include", "lm_head", "--layout", "compressed-tensors"],
        {("mxfp8_e4m3", None)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_our_file_is_the_same_model_to_the_stock_library(case: str, original: Path, tmp_path: Path) -> None:
    arguments, schemes = CASES[case]
    written = succeed("quantize", original, *arguments, "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "compressed-tensors"
    assert {(scheme["weights"], scheme["activations"]) for scheme in written["schemes"]} == schemes
    ours = assert_equal_in_both(tmp_path / "out")
    executed = {
        (format_name(module.format), None if module.activations is None else str(module.activations.spec))
        for module in ours.modules()
        if isinstance(module, QuantizedLinear)
    }
    assert executed == schemes  # the recorded rules, not those that the file alone would suggest
    if case == "tied head":
        assert isinstance(ours.lm_head, QuantizedLinear)
        assert read_config(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_allocation_is_the_same_model_to_the_stock_library(method: str, original: Path, tmp_path: Path) -> None:
    """Formats that their mixed layout has suffice for a mixed model: no one needs microscale to run it."""
    (tmp_path / "book.txt").write_text("The harbour was quiet, and the boats lay still. " * 60)
    text = ["--calibration", tmp_path / "book.txt", "--samples", "2", "--window", "64"]
    allocation = ["--budget", "5.2bits", "-f", "mxfp4,nvfp4/none,mxfp8,mxfp4/mxfp8", "--method", method, *text]
    found = succeed("allocate", original, *allocation, "-o", tmp_path / "recipe.yaml", "--json").json
    assert len(found["result"]["layers"]) > 1, "a mixed model"
    done = succeed(
        "quantize", original, "--recipe", tmp_path / "recipe.yaml", *text, "-o", tmp_path / "out", "--json"
    ).json
    assert done["layout"] == "compressed-tensors", done["notes"]
    assert len(done["schemes"]) > 1
    assert read_config(tmp_path / "out")["quantization_config"]["format"] == "mixed-precision"
    assert_equal_in_both(tmp_path / "out")


BOOK = "The harbour was quiet, and the boats lay still. " * 60


def with_text(folder: Path) -> list[Any]:
    (folder / "book.txt").write_text(BOOK)
    return ["--calibration", folder / "book.txt", "--samples", "4", "--window", "64"]


FOLDED = {
    "best": ["--method", "best"],
    "best good": ["--method", "best", "--effort", "good"],
    "smoothquant": ["--method", "smoothquant"],
    "quarot": ["--method", "quarot+gptq"],
}


@pytest.mark.parametrize(
    ("method", "family"),
    [*((method, family) for method in FOLDED for family in ("llama", "opt")), ("best good", "gemma3_text")],
)
def test_what_a_method_finds_goes_into_the_weights(method: str, family: str, tmp_path: Path) -> None:
    """Under the name of this layout nothing is left for run time: stock transformers computes the same model."""
    source = save_random_model(tmp_path / "source", family)
    asked = ["-f", "mxfp4", "-a", "mxfp4", *FOLDED[method], "--layout", "compressed-tensors", *with_text(tmp_path)]
    written = succeed("quantize", source, *asked, "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "compressed-tensors"
    ours = assert_equal_in_both(tmp_path / "out")
    rules = {module.spec for module in ours.modules() if isinstance(module, ActivationQuantizer)}
    assert {str(rule) for rule in rules} == {"mxfp4:even"}


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
def test_ranges_of_nvfp4_inputs_are_written(method: str, original: Path, tmp_path: Path) -> None:
    """W4A4: the layout wants 2688 over the largest input of the calibration for each layer."""
    asked = ["-f", "nvfp4", "-a", "nvfp4", "--method", method, "--layout", "compressed-tensors", *with_text(tmp_path)]
    succeed("quantize", original, *asked, "-o", tmp_path / "out")
    ours, theirs = microscale.load(tmp_path / "out"), stock(tmp_path / "out")
    logits(theirs)
    inputs = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    ranges = set[float]()
    for name, module in layers.items():
        other, quantizer = theirs.get_submodule(name), module.activations
        assert quantizer is not None and quantizer.amax is not None
        assert str(quantizer.spec) == "nvfp4@static" and same_bits(module.weight, other.weight.data)
        amax = float(quantizer.amax)
        ranges.add(amax)
        assert float(other.input_global_scale) == pytest.approx(2688 / amax, rel=1e-6)
        assert same_bits(input_range(other.input_global_scale.data), quantizer.amax)
        rows = inputs[:, : module.weight.shape[1]] * amax / 3
        arguments = other.quantization_scheme.input_activations
        assert torch.equal(quantizer(rows), forward_quantize(other, rows.clone(), "input", arguments)), name
    assert len(ranges) > 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt_neox", "gemma3_text"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Attention with norms, biases, fused query-key-value, scaled embeddings; untied heads are quantized on request."""
    extra: dict[str, Any] = {"tie_word_embeddings": False} if family in ("llama", "qwen3") else {}
    source = save_random_model(tmp_path / "source", family, **extra)
    include = ["--include", "lm_head"] if extra else []
    written = succeed("quantize", source, "-f", "mxfp4", "-a", "mxfp8", *include, "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "compressed-tensors"
    assert_equal_in_both(tmp_path / "out")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_block_is_nan_in_both(name: str, value: float, original: Path, tmp_path: Path) -> None:
    source, layer = tmp_path / "source", "model.layers.1.mlp.down_proj"
    shutil.copytree(original, source)
    weight = read_tensors(source)[f"{layer}.weight"]
    weight[3, 40] = value
    edit_tensors(source, **{f"{layer}.weight": weight})
    succeed("quantize", source, "-f", name, "--nan", "poison", "-o", tmp_path / "out")
    ours, theirs = microscale.load(tmp_path / "out"), stock(tmp_path / "out")
    logits(theirs)
    found, expected = ours.get_submodule(layer).weight, theirs.get_submodule(layer).weight
    assert 0 < int(torch.isnan(expected).sum()) <= 32
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_no_warning_of_the_stock_library(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("quantize", original, "-f", "mxfp4", "-a", "mxfp8", "-o", tmp_path / "out")
    capsys.readouterr()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    _, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "Could not match" not in caplog.text + capsys.readouterr().err


def test_a_note_says_that_activations_follow_the_rule_of_the_layout(original: Path, tmp_path: Path) -> None:
    written = succeed("quantize", original, "-f", "mxfp4", "-a", "mxfp8", "-o", tmp_path / "out", "--json").json
    (note,) = [note for note in written["notes"] if "activations" in note]
    assert "mxfp8" in note and "mxfp8_e4m3:even(1)" in note and "compressed-tensors" in note
    assert not any("activations" in note for note in quantized_notes(original, tmp_path, "mxfp8:even(1)"))


def quantized_notes(original: Path, folder: Path, activations: str) -> list[str]:
    arguments = ("-f", "mxfp4", "-a", activations, "-o", folder / "named", "--json")
    return succeed("quantize", original, *arguments).json["notes"]


NOT_EXPRESSIBLE = [
    (["-f", "mxfp4", "-a", "mxfp4:floor"], "mxfp4"),
    (["-f", "mxfp8", "-a", "mxfp8:rceil"], "mxfp8_e4m3"),
    (["-f", "nvfp4", "-a", "nvfp4"], "nvfp4"),
    (["-f", "mxfp4", "-a", "mxfp6_e2m3"], "mxfp6_e2m3"),
    (["-f", "mxfp4", "--rule", "down_proj=mxfp6_e3m2"], "mxfp6_e3m2"),
    (["-f", "e2m1/16:e8m0"], "e2m1/16:e8m0:floor"),
    (["-f", "mxfp4:prescale(0.75)"], "mxfp4:prescale(0.75)"),
    (["-f", "mxfp8:nonfinite"], "nonfinite"),
    (["-f", "mxfp4+sparse0.5%:fp8"], "mxfp4_sparse"),
    (["-f", "mxfp8", "--include", "embed_tokens"], "embedding"),
]


@pytest.mark.parametrize(("arguments", "word"), NOT_EXPRESSIBLE, ids=[" ".join(row[0]) for row in NOT_EXPRESSIBLE])
def test_what_the_layout_cannot_say_goes_into_ours(
    arguments: list[str], word: str, original: Path, tmp_path: Path
) -> None:
    written = succeed("quantize", original, *arguments, "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "microscale"
    assert any(note.startswith("layout microscale, because") and word in note for note in written["notes"])
    message = fail("quantize", original, *arguments, "--layout", "compressed-tensors", "-o", tmp_path / "refused")
    is_measured = arguments[-1] == "nvfp4"  # with text it could be written: the range of the inputs is measured
    said = "need text to measure their range on" if is_measured else "layout compressed-tensors cannot hold this model"
    assert said in message and word in message
    assert not (tmp_path / "refused").exists()


def test_a_named_rule_is_executed_as_named(original: Path, tmp_path: Path) -> None:
    succeed("quantize", original, "-f", "mxfp4", "-a", "mxfp4:floor", "-o", tmp_path / "out")
    in_memory = microscale.quantize(original, "mxfp4", activations="mxfp4")  # in memory a name means itself
    assert same_bits(logits(microscale.load(tmp_path / "out")), logits(in_memory))
    assert not same_bits(logits(in_memory), logits(microscale.quantize(original, "mxfp4", activations="mxfp4:even")))


def test_saving_in_the_layout_is_refused_where_it_cannot_hold_the_model(original: Path, tmp_path: Path) -> None:
    model = microscale.quantize(original, "mxfp4", activations="mxfp4")
    with pytest.raises(LayoutError, match="own rules"):
        microscale.save(model, tmp_path / "out", layout="compressed-tensors")
    assert list(tmp_path.iterdir()) == []
    assert microscale.save(model, tmp_path / "out") == "microscale"


def test_a_ragged_width_goes_into_our_layout(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "source", hidden_size=72, intermediate_size=100, num_attention_heads=2)
    written = succeed("quantize", source, "-f", "mxfp4", "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "microscale"
    assert any("72 is not a multiple of 32" in note for note in written["notes"])
    assert same_bits(logits(microscale.load(tmp_path / "out")), logits(microscale.quantize(source, "mxfp4")))
    message = fail("quantize", source, "-f", "mxfp4", "--layout", "compressed-tensors", "-o", tmp_path / "refused")
    assert "72 is not a multiple of 32" in message
    message = fail("quantize", source, "-f", "mxfp4", "--layout", "quark", "-o", tmp_path / "refused")
    assert "72" in message
    assert not (tmp_path / "refused").exists()


def test_a_conv1d_goes_into_our_layout(tmp_path: Path) -> None:
    """The stock library quantizes nn.Linear only: packed weights of GPT-2 would be unexpected, its weights random."""
    source = save_random_model(tmp_path / "source", "gpt2")
    written = succeed("quantize", source, "-f", "mxfp4", "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "microscale"
    loaded = microscale.load(tmp_path / "out")
    assert microscale.save(loaded, tmp_path / "again") == "microscale"
    for layout in ("compressed-tensors", "quark"):
        message = fail("quantize", source, "-f", "mxfp4", "--layout", layout, "-o", tmp_path / "refused")
        assert "conv1d" in message
        with pytest.raises(LayoutError, match="conv1d"):
            microscale.save(loaded, tmp_path / "refused", layout=layout)


def test_stacked_experts_go_into_our_layout(tmp_path: Path) -> None:
    """transformers 5.23 cannot load the experts of Mixtral beside compressed layers."""
    source = save_random_model(tmp_path / "source", "mixtral")
    written = succeed("quantize", source, "-f", "mxfp4", "-o", tmp_path / "out", "--json").json
    assert written["layout"] == "microscale"
    loaded = microscale.load(tmp_path / "out")
    assert microscale.save(loaded, tmp_path / "again") == "microscale"
    assert "experts" in fail(
        "quantize", source, "-f", "mxfp4", "--layout", "compressed-tensors", "-o", tmp_path / "refused"
    )
    with pytest.raises(LayoutError, match="experts"):
        microscale.save(loaded, tmp_path / "refused", layout="compressed-tensors")


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_experts_go_into_this_layout_where_asked(tmp_path: Path, family: str) -> None:
    """One by one, by the names that vLLM reads; the routers are told apart, for vLLM has them as linear layers."""
    source = save_random_model(tmp_path / "source", family)
    in_memory = microscale.quantize(source, "mxfp4")
    assert microscale.save(in_memory, tmp_path / "auto") == "microscale"
    assert microscale.save(in_memory, tmp_path / "out", layout="compressed-tensors") == "compressed-tensors"
    assert "model.layers.0.mlp.experts.3.gate_proj.weight_packed" in read_tensors(tmp_path / "out")
    ignored = read_config(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(ignored)
    loaded = microscale.load(tmp_path / "out")
    assert same_bits(logits(loaded), logits(in_memory))
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts.3.gate_proj"), QuantizedLinear)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(logits(stock), logits(in_memory))


# What follows reads files that microscale did not write.

PRESETS = {"mxfp4-pack-quantized": "MXFP4", "mxfp8-quantized": "MXFP8", "nvfp4-pack-quantized": "NVFP4"}


def compress(weight: Tensor, file_format: str) -> dict[str, Tensor]:
    """Quantize and compress a weight with compressed-tensors alone."""
    scheme = preset_name_to_scheme(PRESETS[file_format], ["Linear"])
    arguments: Any = scheme.weights
    blocks = weight.unflatten(-1, (-1, arguments.group_size))
    global_scale = generate_gparam(weight.amin(), weight.amax()) if arguments.group_size == 16 else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=global_scale)
    state = {"weight": weight.clone(), "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor: Any = BaseCompressor.get_value_from_registry(file_format)
    return compressor.compress(state, scheme)


def arguments_of(preset: str, field: str) -> dict[str, Any]:
    """Return the weights or input_activations of a preset as its own library writes them to JSON."""
    found: Any = getattr(preset_name_to_scheme(preset, ["Linear"]), field)
    return json.loads(found.model_dump_json())


def group(file_format: str | None, preset: str, targets: list[str], activations: str | None) -> dict[str, Any]:
    return {
        "format": file_format,
        "targets": targets,
        "weights": arguments_of(preset, "weights"),
        "input_activations": None if activations is None else arguments_of(activations, "input_activations"),
        "output_activations": None,
    }


def foreign_config(groups: list[dict[str, Any]], ignore: list[str]) -> dict[str, Any]:
    formats = {entry["format"] for entry in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": "0.20.0",
    }


Foreign = Callable[..., Path]


@pytest.fixture
def foreign(original: Path, tmp_path: Path) -> Foreign:
    """Return a function that writes a checkpoint with compressed-tensors alone."""

    def make(config: dict[str, Any], formats: dict[str, str], extra: dict[str, float] | None = None) -> Path:
        path = tmp_path / "foreign"
        shutil.copytree(original, path)
        tensors: dict[str, Tensor] = {}
        for name, value in read_tensors(original).items():
            layer, leaf = name.removesuffix(".weight"), name.rsplit(".", 2)[-2]
            if leaf not in formats:
                tensors[name] = value
                continue
            stored = compress(value, formats[leaf])
            stored |= {key: torch.tensor([number]) for key, number in (extra or {}).items()}
            tensors.update({f"{layer}.{key}": part.contiguous() for key, part in stored.items()})
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        edit_config(path, quantization_config=config, dtype="bfloat16")
        return path

    return make


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FOREIGN = {
    "MXFP4A16": ("mxfp4-pack-quantized", "MXFP4", None, "mxfp4:even", None),
    "MXFP4": ("mxfp4-pack-quantized", "MXFP4", "MXFP4", "mxfp4:even", "mxfp4:even"),
    "MXFP4 A8": ("mxfp4-pack-quantized", "MXFP4", "MXFP8", "mxfp4:even", "mxfp8_e4m3:even(1)"),
    "MXFP8A16": ("mxfp8-quantized", "MXFP8", None, "mxfp8_e4m3:even(1)", None),
    "MXFP8": ("mxfp8-quantized", "MXFP8", "MXFP8", "mxfp8_e4m3:even(1)", "mxfp8_e4m3:even(1)"),
    "NVFP4A16": ("nvfp4-pack-quantized", "NVFP4", None, "nvfp4", None),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("has_group_format", [True, False])
def test_a_foreign_file_is_read(case: str, has_group_format: bool, foreign: Foreign) -> None:
    """The format stands in each group, or (AutoRound) only at the top."""
    file_format, preset, activations, weights_rule, activations_rule = FOREIGN[case]
    config = foreign_config([group(file_format, preset, ["Linear"], activations)], ["lm_head"])
    if not has_group_format:
        config["config_groups"]["group_0"]["format"] = None
    path = foreign(config, dict.fromkeys(ALL, file_format))
    model = assert_equal_in_both(path)
    rules = {
        (
            format_name(module.format),
            None if module.activations is None else str(module.activations.spec),
            module.method,
        )
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    }
    assert rules == {(weights_rule, activations_rule, "unknown")}


def test_a_foreign_mixed_file_is_read(foreign: Foreign) -> None:
    groups = [
        group("mxfp8-quantized", "MXFP8", ["re:.*self_attn.[qkv]_proj$"], "MXFP8"),
        group("mxfp4-pack-quantized", "MXFP4", ["re:.*mlp.(gate|up)_proj$"], "MXFP4"),
        group("nvfp4-pack-quantized", "NVFP4", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"], None),
    ]
    formats = {name: "mxfp8-quantized" for name in ("q_proj", "k_proj", "v_proj")}
    formats |= {name: "mxfp4-pack-quantized" for name in ("gate_proj", "up_proj")}
    path = foreign(foreign_config(groups, ["lm_head", "re:.*o_proj"]), formats | {"down_proj": "nvfp4-pack-quantized"})
    model = assert_equal_in_both(path)
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == 12
    facts = succeed("inspect", path, "--json").json
    assert {layer["format"] for layer in facts["layers"]} == {"mxfp8_e4m3:even(1)", "mxfp4:even", "nvfp4"}


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class(foreign: Foreign) -> None:
    """One file format, three activation settings: the group that compressed-tensors picks decides."""
    groups = [
        group("mxfp4-pack-quantized", "MXFP4", ["Linear"], None),
        group("mxfp4-pack-quantized", "MXFP4", ["re:.*mlp.*"], "MXFP4"),
        group("mxfp4-pack-quantized", "MXFP4", ["model.layers.1.mlp.up_proj"], "MXFP8"),
    ]
    path = foreign(foreign_config(groups, ["lm_head"]), dict.fromkeys(ALL, "mxfp4-pack-quantized"))
    model = assert_equal_in_both(path)
    assert model.model.layers[1].self_attn.q_proj.activations is None
    assert str(model.model.layers[1].mlp.gate_proj.activations.spec) == "mxfp4:even"
    assert str(model.model.layers[1].mlp.up_proj.activations.spec) == "mxfp8_e4m3:even(1)"


def test_foreign_nvfp4_with_dynamic_activations(foreign: Foreign) -> None:
    config = foreign_config([group("nvfp4-pack-quantized", "NVFP4", ["Linear"], "NVFP4")], ["lm_head"])
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = True
    path = foreign(config, dict.fromkeys(ALL, "nvfp4-pack-quantized"))
    model = microscale.load(path)
    assert str(model.model.layers[0].mlp.up_proj.activations.spec) == "e2m1/16:e4m3:amax"
    expected = logits(stock(path)).to(torch.float32)
    with row_major_weights(model):  # sums in the order of torch: in bfloat16 another order turns many roundings over
        found = logits(model).to(torch.float32)
    assert float((found - expected).abs().mean()) < 0.05 * float(expected.abs().mean())
    precise = microscale.load(path, dtype=torch.float32)
    with row_major_weights(precise):
        by_torch = logits(precise)
    torch.testing.assert_close(logits(precise), by_torch, rtol=1e-4, atol=1e-4)


GLOBAL_SCALE = 100.0


def test_foreign_nvfp4_with_a_static_range(foreign: Foreign) -> None:
    """`input_global_scale` is 448 * 6 over the largest input of the calibration."""
    config = foreign_config([group("nvfp4-pack-quantized", "NVFP4", ["Linear"], "NVFP4")], ["lm_head"])
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    path = foreign(config, dict.fromkeys(ALL, "nvfp4-pack-quantized"), {"input_global_scale": GLOBAL_SCALE})
    model = microscale.load(path)
    layer = model.model.layers[0].mlp.up_proj
    assert str(layer.activations.spec) == "nvfp4@static"
    assert float(layer.activations.amax) == pytest.approx(26.88, rel=1e-6)

    theirs: Any = torch.nn.Linear(4, 4)
    theirs.quantization_status = QuantizationStatus.DECOMPRESSED
    theirs.input_global_scale = torch.nn.Parameter(torch.tensor([GLOBAL_SCALE]), requires_grad=False)
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    arguments: Any = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    assert torch.equal(layer.activations(inputs), forward_quantize(theirs, inputs.clone(), "input", arguments))
    # In bfloat16 compressed-tensors rounds amax / 6 first, so a scale near a tie of E4M3 may go the other way.
    half = inputs.to(torch.bfloat16)
    expected = forward_quantize(theirs, half.clone(), "input", arguments)
    differs = (layer.activations(half) != expected).unflatten(-1, (-1, 16)).any(-1)
    assert float(differs.float().mean()) < 0.02


def test_a_static_range_without_its_tensor_is_refused(foreign: Foreign) -> None:
    config = foreign_config([group("nvfp4-pack-quantized", "NVFP4", ["Linear"], "NVFP4")], ["lm_head"])
    path = foreign(config, dict.fromkeys(ALL, "nvfp4-pack-quantized"))
    with pytest.raises(CheckpointError, match="input_global_scale"):
        microscale.load(path)


def test_a_static_range_of_another_shape_is_refused(foreign: Foreign) -> None:
    config = foreign_config([group("nvfp4-pack-quantized", "NVFP4", ["Linear"], "NVFP4")], ["lm_head"])
    path = foreign(config, dict.fromkeys(ALL, "nvfp4-pack-quantized"), {"input_global_scale": GLOBAL_SCALE})
    edit_tensors(path, **{"model.layers.0.mlp.up_proj.input_global_scale": torch.ones(3)})
    with pytest.raises(CheckpointError, match="input_global_scale"):
        microscale.load(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_global_scale", "input_global_scale"])
def test_an_impossible_global_scale_is_refused(name: str, value: float, foreign: Foreign) -> None:
    config = foreign_config([group("nvfp4-pack-quantized", "NVFP4", ["Linear"], "NVFP4")], ["lm_head"])
    path = foreign(config, dict.fromkeys(ALL, "nvfp4-pack-quantized"), {"input_global_scale": GLOBAL_SCALE})
    edit_tensors(path, **{f"model.layers.1.mlp.up_proj.{name}": torch.tensor([value])})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        microscale.load(path)


def test_a_foreign_file_can_be_saved_in_every_layout(foreign: Foreign, tmp_path: Path) -> None:
    config = foreign_config([group("mxfp4-pack-quantized", "MXFP4", ["Linear"], "MXFP4")], ["lm_head"])
    path = foreign(config, dict.fromkeys(ALL, "mxfp4-pack-quantized"))
    model = microscale.load(path)
    for layout in ("auto", "microscale", "quark"):
        microscale.save(model, tmp_path / layout, layout=layout)
        assert same_bits(logits(microscale.load(tmp_path / layout)), logits(model))
    renamed = {"lm_head.weight", "model.embed_tokens.weight"}  # the two names of the tied weight
    assert set(same_tensors(read_tensors(path), read_tensors(tmp_path / "auto"))) == renamed
    assert read_config(tmp_path / "auto")["microscale"]["schemes"][0]["method"] == "unknown"


def damaged(original: Path, tmp_path: Path, **changes: Any) -> Path:
    """Write a file of ours in their layout and change its `microscale` object."""
    succeed("quantize", original, "-f", "mxfp4", "-a", "mxfp8", "-o", tmp_path / "out")
    config = read_config(tmp_path / "out")
    config["microscale"]["schemes"][0].update(changes)
    edit_config(tmp_path / "out", microscale=config["microscale"])
    return tmp_path / "out"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "e4m3/32:e8m0:rceil"},
        {"format": "e2m1/16:e8m0:floor"},
        {"format": "no format"},
        {"activations": None},
        {"activations": "mxfp4:even"},
        {"activations": "no format"},
        {"layers": ["model.layers.7.mlp.up_proj"]},
        {"layers": 3},
    ],
    ids=str,
)
def test_an_object_that_contradicts_the_file_is_refused(
    changes: dict[str, Any], original: Path, tmp_path: Path
) -> None:
    path = damaged(original, tmp_path, **changes)
    with pytest.raises(CheckpointError, match="microscale object"):
        microscale.load(path)
    assert "microscale object" in fail("inspect", path)


def test_the_recorded_rule_comes_back(original: Path, tmp_path: Path) -> None:
    path = damaged(original, tmp_path, format="e2m1/32:e8m0:rceil", method="later")
    facts = succeed("inspect", path, "--json").json
    assert {(layer["format"], layer["method"]) for layer in facts["layers"]} == {("mxfp4:rceil", "later")}
