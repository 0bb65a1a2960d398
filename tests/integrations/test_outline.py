"""The outline of a checkpoint: what loading it gives, on meta, for every kind of file that we read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import microscale
from command_line import succeed
from gguf_files import as_llama_cpp, llama_tensors, write
from microscale.integrations.outline import outline_checkpoint
from microscale.nn.attention_setting import model_attention
from small_models import save_random_model


def check_against_loading(path: Path) -> None:
    """The modules are those of the loaded model, and explaining either gives the same layers; nothing is read."""
    outline, loaded = outline_checkpoint(path), microscale.load(path)
    kinds = [{name: type(each) for name, each in model.named_modules()} for model in (outline, loaded)]
    assert kinds[0] == kinds[1]
    assert all(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))
    assert str(model_attention(outline)) == str(model_attention(loaded))
    assert outline.generation_config.to_dict() == loaded.generation_config.to_dict()
    said = microscale.explain(path)  # generate computes in float32 from a path, a loaded model in its own dtype
    assert said == dataclasses.replace(microscale.explain(loaded), why_not_decoder=said.why_not_decoder)


def test_gguf(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors()))
    check_against_loading(file)
    assert {layer.executed.weights for layer in microscale.explain(file).layers} == {"mxfp4"}


def test_our_layout_with_rounded_attention(tmp_path: Path) -> None:
    model = microscale.quantize(save_random_model(tmp_path / "original"), "nvfp4_plus", attention="mxfp8")
    microscale.save(model, tmp_path / "out")
    check_against_loading(tmp_path / "out")
    found = microscale.explain(tmp_path / "out")
    assert {layer.executed.weights for layer in found.layers if layer.layout is not None} == {"nvfp4_plus"}


def test_compressed_tensors(tmp_path: Path) -> None:
    original = save_random_model(tmp_path / "original")
    succeed("quantize", original, "-f", "mxfp4", "--layout", "compressed-tensors", "-o", tmp_path / "out")
    check_against_loading(tmp_path / "out")


def test_an_unquantized_model(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "original", dtype=torch.float32)
    check_against_loading(path)
    found = microscale.explain(path)
    assert {(layer.backend, layer.executed.weights) for layer in found.layers} == {("torch", "float32")}
