"""Nothing of a model is lost without a word: classes, tensors without a place, the files beside the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import microscale
from microscale.integrations.places import leftover_of
from microscale.nn.packed import PackedModule
from small_models import same_bits
from tiny_models import TOKENS, add_tensors, logits, save_tiny, tiny_config, tiny_model

EXTRA = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(8, 32), "mtp.norm.weight": torch.ones(8)}


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "llama"])
@pytest.mark.parametrize("format", ["mxfp4", "mxfp4_plus"])
def test_layers_that_no_class_takes_are_copied_and_named(family: str, format: str, tmp_path: Path) -> None:
    """transformers leaves out the layers that predict several tokens, for some families in silence."""
    source = save_tiny(family, tmp_path / "source")
    add_tensors(source, EXTRA)
    with pytest.warns(UserWarning, match=r"no place for 2 tensors \(1,056 bytes\), e.g. 'mtp\.") as notes:
        model = microscale.quantize(source, format)
    assert sum("no place" in str(note.message) for note in notes) == 1
    microscale.save(model, tmp_path / "out")
    for directory in (tmp_path / "out", tmp_path / "again"):
        written = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert all(same_bits(written[name], tensor) for name, tensor in EXTRA.items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = microscale.load(directory)
        assert same_bits(logits(loaded), logits(model))
        if directory.name == "out":
            microscale.save(loaded, tmp_path / "again", layout="microscale")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    listed = ignored.get("ignore") or ignored["unquantized"]
    assert "mtp.layers.0.mlp.up_proj" in listed, "readers that have a place for it learn that it is not quantized"


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "mllama", "whisper"])
def test_the_class_is_the_one_that_the_config_names(family: str, tmp_path: Path) -> None:
    original = tiny_model(family, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "source")
    model = microscale.quantize(tmp_path / "source", "mxfp8", part="all")
    assert type(model) is type(original)
    microscale.save(model, tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    assert type(loaded) is type(original) and leftover_of(loaded) is None
    names = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    assert names == [name for name, module in loaded.named_modules() if isinstance(module, PackedModule)]


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaModel"])
@pytest.mark.parametrize("format", ["mxfp4", "mxfp4_plus"])
def test_models_that_write_no_text_load_again(kind: str, format: str, tmp_path: Path) -> None:
    getattr(transformers, kind)(tiny_config("llama", num_labels=3)).save_pretrained(tmp_path / "source")
    model = getattr(transformers, kind).from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    quantized = microscale.quantize(model, format)
    microscale.save(quantized, tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    assert type(loaded) is type(model)
    with torch.no_grad():
        expected, found = (each(input_ids=TOKENS) for each in (quantized, loaded))
    assert same_bits(expected[0], found[0])


@pytest.mark.parametrize("head", [False, True])
def test_tied_models_are_written_under_the_name_of_the_embedding(head: bool, tmp_path: Path) -> None:
    """From a file that has the head's name alone some servers read no embedding."""
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    if head:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = microscale.quantize(source, "mxfp4")
    microscale.save(model, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert same_bits(logits(microscale.load(tmp_path / "out")), logits(model))


def test_layers_that_blocks_share_are_written_and_found(tmp_path: Path) -> None:
    """Zamba2 ties its head and uses one attention layer in several places."""
    source = save_tiny("zamba2", tmp_path / "source", tie_word_embeddings=True)
    model = microscale.quantize(source, "mxfp4")
    microscale.save(model, tmp_path / "out")
    assert same_bits(logits(microscale.load(tmp_path / "out")), logits(model))
