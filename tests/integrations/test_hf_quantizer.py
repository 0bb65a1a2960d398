"""The plugin for transformers: registration, the hazard without it, families of models, other heads, offloading."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import microscale
import microscale.hf
from microscale.errors import CheckpointError, MicroscaleError
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from small_models import (
    REPO_ROOT,
    TOKENS,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    same_bits,
    same_tensors,
    save_random_model,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "out"
    microscale.save(microscale.quantize(source, "mxfp4_plus", activations="mxfp8"), path)
    return path


def automatic(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


HAZARD = """\
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "microscale" not in sys.modules
print(type(model.model.layers[0].mlp.up_proj).__name__)
import microscale.hf
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_without_our_import_transformers_warns_and_leaves_random_weights(ours: Path) -> None:
    """The hazard that docs/reference/checkpoint.md tells of, and the cure."""
    variables = {**os.environ, "PYTHONPATH": str(REPO_ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HAZARD, str(ours)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["Linear", "QuantizedLinear"]
    assert "Unknown quantization type, got microscale" in result.stderr
    assert "newly initialized" in result.stderr and "up_proj.weight" in result.stderr


def test_registering_again_does_nothing() -> None:
    microscale.hf.register()
    microscale.hf.register()
    assert AUTO_QUANTIZER_MAPPING["microscale"] is microscale.hf.MicroscaleQuantizer


EXPERT_FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
FAMILIES = ["llama", "mistral", "qwen3", "gemma", "gemma3_text", "gpt2", "opt", "gpt_neox", *EXPERT_FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    """Conv1D, biases, fused projections, norms with an offset, tied heads, experts."""
    source = save_random_model(tmp_path / "source", family)
    in_memory = microscale.quantize(source, "mxfp4_plus", activations="mxfp8")
    expected = logits(in_memory)
    assert not same_bits(expected, logits(microscale.load(source)))
    microscale.save(in_memory, tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    assert same_bits(logits(loaded), expected)
    assert same_bits(logits(automatic(tmp_path / "out")), expected)
    assert {name for name, module in loaded.named_modules() if isinstance(module, PackedModule)} == {
        name for name, module in in_memory.named_modules() if isinstance(module, PackedModule)
    }
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")) == []
    assert read_config(tmp_path / "out") == read_config(tmp_path / "again")
    with torch.inference_mode():
        output = loaded.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert output.shape[1] <= TOKENS.shape[1] + 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_ragged_widths(family: str, tmp_path: Path) -> None:
    """Widths of 72 and 100 leave a last block of 8 or 4."""
    narrow = {"hidden_size": 72, "num_attention_heads": 2}
    sizes: dict[str, dict[str, Any]] = {
        "llama": narrow | {"intermediate_size": 100},
        "gpt2": {"n_embd": 72, "n_head": 2, "n_inner": 100},
        "opt": narrow | {"ffn_dim": 100, "word_embed_proj_dim": 72},
    }
    source = save_random_model(tmp_path / "source", family, **sizes[family])
    for name in ("mxfp4", "nvfp4", "int4_asym", "mxfp4_plusplus", "mxfp4_sparse", "adaptive_2_4"):
        in_memory = microscale.quantize(source, name)
        assert microscale.save(in_memory, tmp_path / name) == "microscale"
        assert same_bits(logits(microscale.load(tmp_path / name)), logits(in_memory))


def test_biases_are_kept_as_they_were(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "source", "opt")
    microscale.save(microscale.quantize(source, "mxfp4_plus"), tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) == 2 * (6 + 2) + 1  # six linears and two norms in each layer, and the last norm
    assert all(same_bits(before[name], after[name]) for name in biases)
    assert float(before[biases[0]].abs().max()) > 0


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("excluded", ["layers.0.mlp.experts.1.*", "layers.0.mlp.experts.*", "*.experts.*"])
def test_experts_that_are_left_alone(family: str, excluded: str, tmp_path: Path) -> None:
    """One expert, those of one layer, or all stay as they were, and the routers always do."""
    source = save_random_model(tmp_path / "source", family)
    original = microscale.load(source)
    in_memory = microscale.quantize(source, "mxfp4_plus", exclude=[excluded])
    microscale.save(in_memory, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    gate = "model.layers.0.mlp.gate.weight"
    assert same_bits(tensors[gate], original.get_parameter(gate))
    first = tensors["model.layers.0.mlp.experts.1.gate_proj.weight"]
    stacked = original.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[1]
    assert same_bits(first, stacked[: first.shape[0]].detach())
    other = "model.layers.0.mlp.experts.2.up_proj.weight_codes"
    assert (other in tensors) == (excluded == "layers.0.mlp.experts.1.*")
    for loaded in (microscale.load(tmp_path / "out"), automatic(tmp_path / "out")):
        assert same_bits(logits(loaded), logits(in_memory))
        loaded.save_pretrained(tmp_path / "again")
        assert same_tensors(tensors, read_tensors(tmp_path / "again")) == []


def test_a_bare_model_with_experts(tmp_path: Path) -> None:
    """Without the head every layer has a shorter name than in the file."""
    source = save_random_model(tmp_path / "source", "qwen3_moe")
    in_memory = microscale.quantize(source, "mxfp4_plus")
    microscale.save(in_memory, tmp_path / "out")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found, expected = bare(TOKENS).last_hidden_state, in_memory.model(TOKENS).last_hidden_state
    assert same_bits(found, expected)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"dtype": torch.float32}, {"device_map": {"": "cpu"}}])
def test_options_of_from_pretrained(options: dict[str, Any], ours: Path) -> None:
    model = automatic(ours, **options)
    parts = {key: value for key, value in model.state_dict().items() if ".weight_" in key}
    assert same_tensors(parts, {key: read_tensors(ours)[key] for key in parts}) == []
    assert same_bits(logits(model), logits(microscale.load(ours, dtype=options.get("dtype"))))


def test_a_classifier_on_the_same_checkpoint(ours: Path) -> None:
    """Another head on the base model: the layers are found without their prefix or with it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(ours, num_labels=2)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    with torch.inference_mode():
        assert model(input_ids=TOKENS[:1]).logits.shape == (1, 2)


def test_copies_and_casts_of_a_loaded_model(ours: Path) -> None:
    model = automatic(ours)
    expected = logits(model)
    assert same_bits(logits(copy.deepcopy(model)), expected)
    assert same_bits(logits(pickle.loads(pickle.dumps(model))), expected)
    parts = {key: value.clone() for key, value in model.state_dict().items() if ".weight_" in key}
    model.to(torch.float32)
    assert same_tensors(parts, {key: value for key, value in model.state_dict().items() if key in parts}) == []
    assert same_bits(logits(model), logits(microscale.load(ours, dtype=torch.float32)))


def test_the_packed_layers_need_no_gradient(ours: Path) -> None:
    model = automatic(ours)
    assert not model.hf_quantizer.is_trainable
    assert all(not buffer.requires_grad for buffer in model.buffers())
    names = [name for name, _ in model.named_parameters()]
    assert not any("_proj" in name for name in names)


@pytest.mark.parametrize("leaf", ["weight_codes", "weight_scale", "weight_index"])
def test_a_missing_part_is_an_error_with_transformers_too(leaf: str, ours: Path, tmp_path: Path) -> None:
    """transformers itself would only print a report, and the part would be whatever lay in memory."""
    import shutil

    shutil.copytree(ours, tmp_path / "copy")
    edit_tensors(tmp_path / "copy", **{f"model.layers.1.mlp.up_proj.{leaf}": None})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.mlp\.up_proj\.{leaf}' is missing"):
        automatic(tmp_path / "copy")


def test_the_config_survives_json(ours: Path) -> None:
    stored = read_config(ours)["quantization_config"]
    config = microscale.hf.MicroscaleConfig(**stored)
    assert config.to_dict() == stored
    assert microscale.hf.MicroscaleConfig(**stored, later={"a": 1}).to_dict() == stored | {"later": {"a": 1}}
    assert microscale.hf.MicroscaleConfig().to_dict()["layers"] == {}


def test_a_layer_of_another_kind_is_refused(ours: Path, tmp_path: Path) -> None:
    import shutil

    from small_models import edit_config

    shutil.copytree(ours, tmp_path / "copy")
    config = read_config(ours)["quantization_config"]
    config["layers"]["model.norm"] = config["layers"]["model.layers.0.mlp.up_proj"]
    edit_config(tmp_path / "copy", quantization_config=config)
    with pytest.raises(MicroscaleError, match=r"model\.norm"):
        automatic(tmp_path / "copy")


def test_generation_settings_are_kept(source: Path, tmp_path: Path) -> None:
    model = microscale.load(source)
    model.generation_config.max_length = 77
    for layout in ("microscale", "compressed-tensors"):
        quantized = microscale.quantize(copy.deepcopy(model), "mxfp4")
        microscale.save(quantized, tmp_path / layout, layout=layout)
        assert microscale.load(tmp_path / layout).generation_config.max_length == 77
