"""Checkpoints that round keys and values by scales of their own: used here as stock transformers does, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import foreign_files as files
import microscale
from command_line import fail, succeed
from microscale.errors import CheckpointError, QuantizationNote
from microscale.integrations.hf_quantizer import register
from microscale.nn.attention import by_scale
from microscale.nn.attention_setting import FileScales, model_attention
from small_models import edit_config, edit_tensors, logits, read_config, read_tensors, same_bits, save_two_layers

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
LAYERS = (0, 1)


def scales(*, heads: int = 0, first: float = 2.0**-8) -> dict[str, Tensor]:
    """Numbers of bfloat16, to which the library rounds scales; large keys and values leave their range."""
    sizes = (heads, 1, 1) if heads else (1,)
    return {
        f"model.layers.{layer}.self_attn.{side}_scale": torch.full(sizes, first * (1 + layer + (side == "v")))
        for layer in LAYERS
        for side in "kv"
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


def compressed(original: Path, out: Path, scheme: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Path:
    """An MXFP4 directory of compressed-tensors with a scheme for the cache."""
    microscale.quantize(original, "mxfp4", output=out, layout="compressed-tensors")
    config = read_config(out)
    del config["microscale"]
    config["quantization_config"]["kv_cache_scheme"] = scheme
    edit_config(out, **config)
    edit_tensors(out, **tensors)
    return out


def unrounded(path: Path, out: Path) -> Tensor:
    """The logits of the same weights without the scheme."""
    config = read_config(path)
    config["quantization_config"]["kv_cache_scheme"] = None
    files.shutil.copytree(path, out)
    edit_config(out, quantization_config=config["quantization_config"])
    edit_tensors(out, **dict.fromkeys(scales()))
    return logits(microscale.load(out))


@pytest.mark.parametrize("codes", FileScales)
@pytest.mark.parametrize("heads", [0, 2])
def test_numbers_are_those_of_the_library(codes: FileScales, heads: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    values = torch.randn(3, 2, 50, 16, generator=torch.Generator().manual_seed(0)) * 3
    scale = torch.tensor([0.004, 0.03]).reshape(2, 1, 1) if heads else torch.tensor([0.01])
    kind = "float" if codes is FileScales.E4M3 else "int"
    words = SCHEME | {"type": kind, "strategy": "attn_head" if heads else "tensor"}
    expected = fake_quantize(values, scale, torch.zeros_like(scale), QuantizationArgs.model_validate(words))
    assert same_bits(by_scale(values, scale, codes), expected)


@pytest.mark.parametrize("heads", [0, 2])
def test_the_scheme_is_executed_and_kept(heads: int, original: Path, tmp_path: Path) -> None:
    scheme = SCHEME | {"strategy": "attn_head" if heads else "tensor"}
    tensors = scales(heads=heads)
    path = compressed(original, tmp_path / "in", scheme, tensors)
    model = microscale.load(path)
    found = logits(model)
    attention = model_attention(model)
    assert attention is not None and attention.kv_cache is FileScales.E4M3
    stock = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(stock.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    with torch.no_grad():
        stock(input_ids=torch.tensor([[1]]))  # unpacks the weights
    torch.nn.Module._apply(stock, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    expected, plain = logits(stock), unrounded(path, tmp_path / "plain")
    wide = logits(microscale.load(path, dtype=torch.float32))
    assert (wide - expected).abs().max() < 1e-3 and (plain - expected).abs().max() > 1
    for layout in ("compressed-tensors", "microscale"):
        microscale.save(model, tmp_path / layout, layout=layout)
        assert read_config(tmp_path / layout)["quantization_config"]["kv_cache_scheme"] == scheme
        stored = read_tensors(tmp_path / layout)
        assert all(same_bits(stored[name], tensor) for name, tensor in tensors.items())
        assert same_bits(logits(microscale.load(tmp_path / layout)), found)
    register()
    direct = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "microscale")
    assert same_bits(logits(direct), found)


@pytest.mark.parametrize("way", [[], ["--offload"]])
@pytest.mark.parametrize("names", ["compressed-tensors", "modelopt"])
def test_a_float_source_keeps_its_cache(names: str, way: list[str], original: Path, tmp_path: Path) -> None:
    tensors = scales()
    said: dict[str, Any] = {"quant_method": "fp8", "kv_cache_scheme": SCHEME}
    if names == "modelopt":
        said = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
        tensors = {name.replace(".k_", ".k_proj.k_").replace(".v_", ".v_proj.v_"): t for name, t in tensors.items()}
    files.write_foreign(original, tmp_path / "in", files.fp8_tensor, said)
    edit_tensors(tmp_path / "in", **tensors)
    way = [*way, *([str(tmp_path / "work")] if way else [])]
    with pytest.warns(QuantizationNote):
        succeed("quantize", tmp_path / "in", "-f", "mxfp8", *way, "-o", tmp_path / "out")
    model = microscale.load(tmp_path / "out")
    attention = model_attention(model)
    assert attention is not None and attention.kv_cache is FileScales.E4M3
    stored = read_tensors(tmp_path / "out")
    assert {name: float(stored[name]) for name in scales()} == {name: float(t) for name, t in scales().items()}
    assert not [name for name in stored if name in tensors and name not in scales()]
    with pytest.warns(QuantizationNote):
        source = microscale.load(tmp_path / "in")
    assert model_attention(source) == attention
    shown = succeed("explain", tmp_path / "out", "--json").json
    assert shown["attention"]["kv_cache"] == "e4m3 by the scales of the file"


def test_what_cannot_be_used_is_said_and_kept(original: Path, tmp_path: Path) -> None:
    path = compressed(original, tmp_path / "in", SCHEME | {"dynamic": True}, {})
    with pytest.warns(QuantizationNote, match=r"measured at run time.*--kv-cache"):
        model = microscale.load(path)
    assert model_attention(model) is None
    wrong = compressed(original, tmp_path / "wrong", SCHEME, scales(first=-1.0))
    assert "finite and positive" in fail("eval", wrong, "--text", __file__)
    edit_tensors(path, **scales())
    edit_config(path, quantization_config=read_config(path)["quantization_config"] | {"kv_cache_scheme": 3})
    with pytest.raises(CheckpointError, match="must be an object"):
        microscale.load(path)


def test_a_format_that_is_asked_for_takes_its_place(original: Path, tmp_path: Path) -> None:
    path = compressed(original, tmp_path / "in", SCHEME, scales())
    with pytest.warns(QuantizationNote, match="takes the place of the scales of the file"):
        microscale.quantize(path, "mxfp8", kv_cache="mxfp8", output=tmp_path / "out")
    config = read_config(tmp_path / "out")["quantization_config"]
    assert config.get("kv_cache_scheme") is None and config["attention"]["kv_cache"] is not None
    assert not set(scales()) & set(read_tensors(tmp_path / "out"))
    kept = microscale.quantize(path, "mxfp8", attention="mxfp8", output=tmp_path / "both")
    attention = model_attention(kept)
    assert attention is not None and attention.kv_cache is FileScales.E4M3 and attention.products is not None
    again = microscale.load(tmp_path / "both")
    assert model_attention(again) == attention and same_bits(logits(again), logits(kept))
