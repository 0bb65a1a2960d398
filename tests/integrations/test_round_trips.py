"""Every named format through the whole house: quantize on the command line, load, generate, save again."""

from __future__ import annotations

import filecmp
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import microscale
import microscale.hf  # pyright: ignore[reportUnusedImport]  # registers with transformers
from command_line import succeed
from microscale.formats import NAMED_FORMATS
from microscale.nn.inference import row_major_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from small_models import (
    BOS,
    LLAMA_6M,
    TOKENS,
    edit_config,
    logits,
    read_config,
    read_tensors,
    same_bits,
    same_tensors,
    save_random_model,
    save_two_layers,
)

# Bits for each weight, counted by hand: element + (scale, zero point, index) / block + second level.
EXPECTED_BITS = {
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxfp6_e2m3": 6.25,
    "mxfp6_e3m2": 6.25,
    "mxfp4": 4.25,
    "mxint8": 8.25,
    "mxint4": 4.25,
    "nvfp4": 4.5,
    "mxfp4_plus": 4.5,
    "mxfp6_plus": 6.5,
    "mxfp8_plus": 8.5,
    "mxint8_plus": 8.5,
    "mxint4_plus": 4.5,
    "nvfp4_plus": 4.75,
    "mxfp4_plusplus": 4.5,
    "mxfp6_plusplus": 6.5,
    "mxfp8_plusplus": 8.5,
    "int4_asym": 4 + 20 / 64,
    "int3_asym": 3 + 19 / 64,
    "int2_asym": 2 + 18 / 32,
    "int4_asym_fp8": 4 + 16 / 64,
    # 0.5 % of the weights as 8 bits and a column of 16, and one offset of 32 bits for each row (width 256 to 704)
    "mxfp4_sparse": 4.25 + 0.005 * 24 + 32 / (704 * 256 * 3 + 256 * 256 * 3) * (704 * 2 + 256 + 256 * 3),
    "adaptive_2_4": (2 + 18 / 32) / 2 + (4 + 20 / 32) / 2 + 1 / 32,
}
COMPRESSED_TENSORS = {"mxfp4", "mxfp8_e4m3", "nvfp4"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a format to a checkpoint made on the command line, made once."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            succeed("quantize", original, "--format", name, "--output", folder / name)
        return folder / name

    return make


def header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file without the library: 8 bytes of length, then JSON."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length))


def test_the_table_of_bits_has_every_named_format() -> None:
    assert set(EXPECTED_BITS) == set(NAMED_FORMATS)


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_a_loaded_checkpoint_gives_the_logits_of_the_model_in_memory(
    name: str, original: Path, quantized: Callable[[str], Path]
) -> None:
    in_memory = microscale.quantize(original, name)
    loaded = microscale.load(quantized(name))
    packed = [module for module in loaded.modules() if isinstance(module, PackedModule)]
    assert len(packed) == 14
    assert {microscale.format_name(module.format) for module in packed} == {name}
    expected = logits(in_memory)
    assert bool(torch.isfinite(expected).all())
    assert same_bits(logits(loaded), expected)
    assert not same_bits(expected, logits(microscale.load(original)))  # and the format did do something


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_a_loaded_checkpoint_generates(name: str, quantized: Callable[[str], Path]) -> None:
    model, tokenizer = microscale.load(quantized(name)), microscale.load_tokenizer(quantized(name))
    prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer("The sea was", add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        output = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape == (1, prompt.shape[1] + 4)
    # Greedy decoding is the likeliest token of a plain forward call.
    expected = prompt
    for _ in range(4):
        step = logits(model, expected)[:, -1].clone()
        step[:, model.config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, step.argmax(-1, keepdim=True)], dim=1)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_quantized_layers_take_their_theoretical_size_on_disk(name: str, quantized: Callable[[str], Path]) -> None:
    path = quantized(name)
    names = [key.removesuffix(".weight") for key in header(LLAMA_6M / "model.safetensors") if "_proj" in key]
    stored = header(path / "model.safetensors")
    num_bytes = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for key, entry in stored.items()
        if any(key.startswith(f"{layer}.") for layer in names)
    )
    # 2 layers of q, k, v, o (4 and 2 heads of 64) and of three matrices 704 x 256
    num_weights = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 704 * 256)
    assert 8 * num_bytes / num_weights == pytest.approx(EXPECTED_BITS[name], rel=0.02)
    assert not any(key.endswith("_proj.weight") and entry["dtype"] == "BF16" for key, entry in stored.items())


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_auto_writes_compressed_tensors_where_it_suffices(name: str, quantized: Callable[[str], Path]) -> None:
    config = read_config(quantized(name))
    layout = "compressed-tensors" if name in COMPRESSED_TENSORS else "microscale"
    assert config["quantization_config"]["quant_method"] == layout
    assert config["microscale"]["layout"] == layout
    assert config["microscale"]["version"] == microscale.__version__
    (scheme,) = config["microscale"]["schemes"]
    assert scheme["name"] == name
    assert microscale.parse_format(scheme["format"]) == NAMED_FORMATS[name].format
    assert len(scheme["layers"]) == 14
    assert (scheme["activations"], scheme["method"]) == (None, "rtn")


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_saving_a_loaded_checkpoint_writes_the_same_files(
    name: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    path = quantized(name)
    model = microscale.load(path)
    microscale.save(model, tmp_path / "again", tokenizer=microscale.load_tokenizer(path))
    assert filecmp.cmp(path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)
    assert read_config(path) == read_config(tmp_path / "again")
    assert {file.name for file in path.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_save_pretrained_of_a_loaded_checkpoint(name: str, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Our layout comes back byte for byte; a checkpoint of another layout is written in ours, with the same codes."""
    path = quantized(name)
    model = microscale.load(path)
    model.save_pretrained(tmp_path)
    if name in COMPRESSED_TENSORS:
        assert read_config(tmp_path)["quantization_config"]["quant_method"] == "microscale"
        assert read_config(tmp_path)["microscale"]["layout"] == "microscale"
    else:
        assert filecmp.cmp(path / "model.safetensors", tmp_path / "model.safetensors", shallow=False)
        assert read_config(path) == read_config(tmp_path)
    assert same_bits(logits(microscale.load(tmp_path)), logits(model))


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_transformers_gives_the_same_logits_as_our_loader(name: str, quantized: Callable[[str], Path]) -> None:
    """After `import microscale.hf` for our layout; compressed-tensors is read by its own library.

    On the reference path, whose sums have torch's order, as those of that library.
    """
    loaded = transformers.AutoModelForCausalLM.from_pretrained(quantized(name))
    ours = microscale.load(quantized(name))
    with row_major_weights(loaded), row_major_weights(ours):
        assert same_bits(logits(loaded), logits(ours))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_plus", "adaptive_2_4"])
def test_transformers_writes_our_layout_back_byte_for_byte(name: str, original: Path, tmp_path: Path) -> None:
    succeed("quantize", original, "-f", name, "--layout", "microscale", "-o", tmp_path / "one")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert filecmp.cmp(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors", shallow=False)
    assert read_config(tmp_path / "one") == read_config(tmp_path / "two")


@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors", "quark"])
def test_a_sharded_checkpoint_holds_and_loads_the_same(layout: str, original: Path, tmp_path: Path) -> None:
    common = ("quantize", original, "-f", "mxfp4", "--layout", layout)
    succeed(*common, "-o", tmp_path / "whole")
    succeed(*common, "-o", tmp_path / "shards", "--max-shard-size", "200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert same_tensors(read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "shards")) == []
    assert same_bits(logits(microscale.load(tmp_path / "shards")), logits(microscale.load(tmp_path / "whole")))
    found = [succeed("inspect", tmp_path / name, "--json").json for name in ("whole", "shards")]
    assert found[0]["bytes"] == found[1]["bytes"]


ACTIVATIONS = [
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8"),
    ("mxfp8", "mxfp8"),
    ("nvfp4", "nvfp4"),
    ("mxfp4_plus", "mxfp4_plus"),
    ("mxfp4", "mxfp4:floor"),
    ("int4_asym", "int8/tensor:fp32"),
]


@pytest.mark.parametrize(("weights", "activations"), ACTIVATIONS)
def test_quantized_activations_survive_the_round_trip(
    weights: str, activations: str, original: Path, tmp_path: Path
) -> None:
    in_memory = microscale.quantize(original, weights, activations=activations, layout="auto")
    microscale.save(in_memory, tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    specs = {
        str(module.activations.spec)
        for module in loaded.modules()
        if isinstance(module, QuantizedLinear) and module.activations is not None
    }
    assert len(specs) == 1
    expected = logits(in_memory)
    assert same_bits(logits(loaded), expected)
    assert not same_bits(expected, logits(microscale.quantize(original, weights)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_plus"])
def test_a_model_in_another_float_type_keeps_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The norms and embeddings of a float32 model have bits that bfloat16 would drop."""
    source = save_random_model(tmp_path / "source", dtype=dtype)
    succeed("quantize", source, "-f", name, "-o", tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert same_bits(logits(loaded), logits(microscale.quantize(source, name)))
    microscale.save(loaded, tmp_path / "again")
    assert same_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")) == []
    assert read_config(tmp_path / "out") == read_config(tmp_path / "again")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_in_another_dtype_keeps_the_packed_weights(
    name: str, dtype: torch.dtype, quantized: Callable[[str], Path]
) -> None:
    reference = {key: value for key, value in read_tensors(quantized(name)).items() if "_proj" in key}
    model = microscale.load(quantized(name), dtype=dtype)
    assert logits(model).dtype == dtype
    microscale_parts = {key: value for key, value in model.state_dict().items() if "_proj" in key}
    assert sorted(value.numel() for value in microscale_parts.values()) == sorted(
        value.numel() for value in reference.values()
    )
    assert all(value.dtype == torch.uint8 for value in microscale_parts.values())
    exact = logits(microscale.load(quantized(name), dtype=torch.float32))
    assert float((logits(model).to(torch.float32) - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("words", [["lm_head"], ["lm_head", "*.embed_tokens"], ["*.embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_embeddings_on_request(words: list[str], tied: bool, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "source", tie_word_embeddings=tied)
    arguments = [piece for word in words for piece in ("--include", word)]
    succeed("quantize", source, "-f", "mxfp8", *arguments, "-o", tmp_path / "out")
    in_memory = microscale.quantize(source, "mxfp8", include=words)
    packed = {name for name, module in in_memory.named_modules() if isinstance(module, PackedModule)}
    expected = {"lm_head" if word == "lm_head" else "model.embed_tokens" for word in words}
    expected |= {"lm_head", "model.embed_tokens"} if tied else set()  # who names either means the weight
    assert {name for name in packed if "layers" not in name} == expected
    loaded = microscale.load(tmp_path / "out")
    assert same_bits(logits(loaded), logits(in_memory))
    assert {name for name, module in loaded.named_modules() if isinstance(module, PackedModule)} == packed
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(logits(stock), logits(in_memory))
    # A head that is still float has the weights that it was tied to.
    if "lm_head" not in expected:
        head = microscale.load(source).lm_head.weight
        assert same_bits(loaded.lm_head.weight.data, head.data)
    loaded.tie_weights()  # a public method of transformers, which must not undo anything
    assert same_bits(logits(loaded), logits(in_memory))


def test_static_activation_ranges_are_saved_and_loaded(original: Path, tmp_path: Path) -> None:
    model = microscale.quantize(original, "nvfp4", activations="nvfp4@static")
    with microscale_observing(model):
        logits(model)
    ranges = {key: value for key, value in model.state_dict().items() if key.endswith("activations.amax")}
    assert len(ranges) == 14 and all(0 < float(value) < math.inf for value in ranges.values())
    microscale.save(model, tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    assert same_tensors(ranges, {key: loaded.state_dict()[key] for key in ranges}) == []
    assert same_bits(logits(loaded), logits(model))


def microscale_observing(model: Any) -> Any:
    from microscale.nn.activation import observe_activations

    return observe_activations(model)


def test_an_uncalibrated_static_range_says_what_to_do(original: Path, tmp_path: Path) -> None:
    model = microscale.quantize(original, "nvfp4", activations="nvfp4@static")
    microscale.save(model, tmp_path / "out")
    with pytest.raises(microscale_errors().ModelError, match="observe_activations"):
        logits(microscale.load(tmp_path / "out"))


def microscale_errors() -> Any:
    from microscale import errors

    return errors


def test_the_base_model_of_a_checkpoint_loads_too(quantized: Callable[[str], Path]) -> None:
    path = quantized("mxfp4_plus")
    base = transformers.AutoModel.from_pretrained(path)
    with torch.inference_mode():
        hidden = base(input_ids=TOKENS).last_hidden_state
        expected = microscale.load(path).model(input_ids=TOKENS).last_hidden_state
    assert same_bits(hidden, expected)


def test_a_config_without_our_object_loads_as_well(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    for name in ("mxfp4", "mxfp4_plus"):
        shutil.copytree(quantized(name), tmp_path / name)
        edit_config(tmp_path / name, microscale=None)
        assert same_bits(logits(microscale.load(tmp_path / name)), logits(microscale.load(quantized(name))))


def test_the_tokens_of_the_tests_are_in_the_vocabulary() -> None:
    assert int(TOKENS.max()) < BOS
