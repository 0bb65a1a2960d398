"""Models that other tools have quantized are read as the floats that they mean, and quantized again with a note."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foreign_files as files
import microscale
from command_line import fail, succeed
from gguf_files import as_llama_cpp, llama_tensors, write
from microscale.errors import CheckpointError, MicroscaleError, QuantizationNote
from microscale.integrations.loading import load_original
from small_models import edit_config, edit_tensors, logits, read_tensors, same_bits, save_two_layers


def _compressed(form: str, kind: str, bits: int = 8) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"format": form, "targets": ["Linear"], "weights": weights, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return said | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


KINDS: dict[str, tuple[Callable[[Tensor], files.Written], dict[str, Any] | None]] = {
    "fp8 blocks": (files.fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
    "fp8 tensor": (files.fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed fp8": (files.fp8_rows, _compressed("float-quantized", "float")),
    "compressed int8": (files.int8_rows, _compressed("int-quantized", "int")),
    "gptq": (files.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "gptq 8": (functools.partial(files.gptq, bits=8), {"quant_method": "gptq", "bits": 8, "group_size": 32}),
    "gptq act order": (
        functools.partial(files.gptq, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "gptq v2": (
        functools.partial(files.gptq, less_one=0),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (files.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "nf4": (files.nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4 nested": (
        functools.partial(files.nf4, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ),
    "int8": (files.llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "modelopt": (files.modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_the_floats_are_those_that_the_file_means(kind: str, original: Path, tmp_path: Path) -> None:
    writer, config = KINDS[kind]
    meant = files.write_foreign(original, tmp_path / "in", writer, config)
    with pytest.warns(QuantizationNote, match=f"{len(meant)} weights of .* read as bfloat16"):
        model = load_original(tmp_path / "in")
    found = model.state_dict()
    assert len(meant) == 14
    for name, weight in meant.items():
        assert same_bits(found[name], weight.to(torch.bfloat16)), name
    kept = read_tensors(original)["model.norm.weight"]
    assert same_bits(found["model.norm.weight"], kept)


@pytest.mark.parametrize("kind", ["fp8 blocks", "gptq", "nf4", "modelopt"])
@pytest.mark.parametrize("way", [[], ["--offload"]])
def test_it_is_quantized_again_with_a_note(kind: str, way: list[str], original: Path, tmp_path: Path) -> None:
    """As the floats would be, read as a whole or layer by layer; nothing of the first quantization is left."""
    writer, config = KINDS[kind]
    meant = files.write_foreign(original, tmp_path / "in", writer, config)
    way = [*way, *([str(tmp_path / "work")] if way else [])]
    with pytest.warns(QuantizationNote, match="What their first rounding lost stays lost"):
        succeed("quantize", tmp_path / "in", "-f", "mxfp4", *way, "-o", tmp_path / "out")
    model = microscale.load(tmp_path / "out")
    for name, weight in meant.items():
        packed = model.get_submodule(name.removesuffix(".weight")).weight
        assert same_bits(packed, microscale.fake_quantize(weight.to(torch.bfloat16), "mxfp4")), name
    left = set(read_tensors(tmp_path / "out"))
    assert not any(end in name for name in left for end in ("qweight", "absmax", "scale_inv", "input_scale"))
    assert not any((tmp_path / "out").glob("*quant*config*"))


def test_it_runs_as_floats(original: Path, tmp_path: Path) -> None:
    """`eval`, `generate` and `load` take it as they take any model."""
    writer, config = KINDS["awq"]
    meant = files.write_foreign(original, tmp_path / "in", writer, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, plain = microscale.load(tmp_path / "in"), microscale.load(original)
    state = plain.state_dict()
    for name, weight in meant.items():
        state[name].copy_(weight)
    assert torch.equal(logits(model), logits(plain))
    (tmp_path / "text.txt").write_text("The harbour was quiet. " * 40)
    found = succeed("eval", tmp_path / "in", "--text", tmp_path / "text.txt", "--window", "32", "--json").json
    assert found["perplexity"] > 1


def test_the_file_of_modelopt_beside_config_json(original: Path, tmp_path: Path) -> None:
    meant = files.write_foreign(original, tmp_path / "in", files.modelopt_nvfp4, None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}
    (tmp_path / "in" / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.warns(QuantizationNote, match=r"ModelOpt \(NVFP4\)"):
        found = load_original(tmp_path / "in").state_dict()
    assert all(same_bits(found[name], weight.to(torch.bfloat16)) for name, weight in meant.items())


def test_scales_of_inputs_and_of_the_cache_are_named(original: Path, tmp_path: Path) -> None:
    files.write_foreign(original, tmp_path / "in", *KINDS["fp8 tensor"])
    edit_tensors(tmp_path / "in", **{f"model.layers.0.self_attn.{side}_scale": torch.tensor(0.25) for side in "kv"})
    with pytest.warns(QuantizationNote) as notes:
        load_original(tmp_path / "in")
    said = " ".join(str(note.message) for note in notes)
    assert "14 tensors" in said and "inputs of layers" in said
    assert "keys and values" in said and "2 tensors" in said and "--kv-cache" in said


def test_our_own_files_are_quantized_again(original: Path, tmp_path: Path) -> None:
    """Packed, rotated and tied weights become floats first."""
    (tmp_path / "text.txt").write_text("The harbour was quiet. " * 200)
    text = ["--calibration", tmp_path / "text.txt", "--samples", "4", "--window", "32"]
    first = ["-f", "mxfp4_plus", "--method", "hadamard+gptq", "--include", "embedding", "--include", "lm_head"]
    succeed("quantize", original, *first, *text, "-o", tmp_path / "first")
    with pytest.warns(QuantizationNote, match="are packed: read as floats"):
        succeed("quantize", tmp_path / "first", "-f", "mxfp8", "-o", tmp_path / "second")
    before, after = microscale.load(tmp_path / "first"), microscale.load(tmp_path / "second")
    name = "model.layers.1.mlp.down_proj"
    once = before.get_submodule(name).weight
    assert same_bits(after.get_submodule(name).weight, microscale.fake_quantize(once, "mxfp8"))
    assert type(after.model.embed_tokens) is torch.nn.Embedding
    assert same_bits(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    torch.testing.assert_close(logits(after), logits(before), rtol=0.2, atol=1.5)


@pytest.mark.parametrize("layout", ["compressed-tensors", "quark"])
def test_other_layouts_of_ours_are_quantized_again(layout: str, original: Path, tmp_path: Path) -> None:
    succeed("quantize", original, "-f", "mxfp4", "--layout", layout, "-o", tmp_path / "first")
    succeed("quantize", tmp_path / "first", "-f", "mxfp4", "-o", tmp_path / "second")
    before, after = microscale.load(tmp_path / "first"), microscale.load(tmp_path / "second")
    assert torch.equal(logits(before), logits(after)), "numbers of a format stay what they are"


HOSTILE = {
    "an unknown method": (lambda path: edit_config(path, quantization_config={"quant_method": "quip"}), "quip"),
    "no zero points": (lambda path: drop(path, "qzeros"), "qzeros"),
    "three bits": (
        lambda path: edit_config(path, quantization_config={"quant_method": "gptq", "bits": 3}),
        "3 bits",
    ),
    "scales too short": (
        lambda path: edit_tensors(path, **{"model.layers.0.mlp.up_proj.scales": torch.zeros(3, 5).half()}),
        "up_proj",
    ),
}


def drop(path: Path, end: str) -> None:
    from safetensors.torch import save_file

    kept = {name: tensor for name, tensor in read_tensors(path).items() if not name.endswith(end)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fault", HOSTILE)
def test_damaged_files_are_refused_in_our_words(fault: str, original: Path, tmp_path: Path) -> None:
    files.write_foreign(original, tmp_path / "in", *KINDS["gptq"])
    damage, word = HOSTILE[fault]
    damage(tmp_path / "in")
    with pytest.raises(MicroscaleError, match=word):
        load_original(tmp_path / "in")
    assert word in fail("quantize", tmp_path / "in", "-f", "mxfp4", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_do_not_fit_are_refused(original: Path, tmp_path: Path) -> None:
    files.write_foreign(original, tmp_path / "in", *KINDS["fp8 blocks"])
    edit_tensors(tmp_path / "in", **{"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(5, 3)})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_original(tmp_path / "in")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (4, -1)])
def test_packed_integers_as_compressed_tensors_writes_them(
    bits: int, group: int, symmetric: bool, original: Path, tmp_path: Path
) -> None:
    """The library packs, and unpacks for comparison."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    numbers = pytest.importorskip("compressed_tensors.quantization.utils")
    arguments = schemes.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group" if group > 0 else "channel",
        **({"group_size": group} if group > 0 else {}),
    )  # fmt: skip
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")

    def write(weight: Tensor) -> files.Written:
        blocks = weight.float().unflatten(1, (-1, group if group > 0 else weight.shape[1]))
        scale, zero = numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero.to(torch.int8)}
        if symmetric:
            del state["weight_zero_point"]
        stored = dict(compressor.compress(dict(state), scheme))
        meant = dict(compressor.decompress(dict(stored), scheme))["weight"]
        return {name: part for name, part in stored.items() if part is not None}, meant

    weights = arguments.model_dump(mode="json")
    config = _compressed("pack-quantized", "int") | {
        "config_groups": {"group_0": {"format": "pack-quantized", "targets": ["Linear"], "weights": weights}}
    }
    meant = files.write_foreign(original, tmp_path / "in", write, config)
    with pytest.warns(QuantizationNote, match="pack-quantized"):
        found = load_original(tmp_path / "in").state_dict()
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], weight.to(torch.bfloat16), rtol=2**-7, atol=0)


def test_a_gguf_file_is_quantized(tmp_path: Path) -> None:
    """Its numbers are what `load` reads; a note says that they were rounded before where they were."""
    pytest.importorskip("gguf")
    path = write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors()))
    with pytest.warns(QuantizationNote, match="lost stays lost"):
        model = load_original(path)
    packed = microscale.load(path)
    weight = packed.get_submodule("model.layers.0.mlp.up_proj").weight
    assert same_bits(model.get_submodule("model.layers.0.mlp.up_proj").weight, weight)
    succeed("quantize", path, "-f", "mxfp8", "-o", tmp_path / "out")
    again = microscale.load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").weight
    assert same_bits(again, microscale.fake_quantize(weight, "mxfp8"))
