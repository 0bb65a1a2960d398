"""`microscale quantize`: what it writes and says, and what it refuses, with nothing half-written left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import fail, microscale_command, succeed
from microscale.errors import (
    CheckpointError,
    CheckpointWriteError,
    MicroscaleError,
    NonFiniteError,
    QuantizationNote,
    RecipeError,
)
from microscale.integrations import saving
from microscale.nn.packed import PackedModule
from small_models import (
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    same_bits,
    same_tensors,
    save_random_model,
    save_two_layers,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=False)


def files(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_the_json_answer(model: Path, tmp_path: Path) -> None:
    outcome = succeed("quantize", model, "-f", "mxfp4", "-a", "mxfp8:rceil", "-o", tmp_path / "out", "--json")
    found = outcome.json
    assert found["output"] == str(tmp_path / "out")
    assert found["layout"] == "microscale"
    assert found["layers"] == 14
    assert found["schemes"] == [{"weights": "mxfp4", "activations": "mxfp8_e4m3", "layers": 14}]
    assert found["unquantized"] == ["lm_head"]
    assert found["bits_per_weight"] == 4.25
    stored = sum(tensor.numel() * tensor.element_size() for tensor in read_tensors(tmp_path / "out").values())
    num_weights = sum(tensor.numel() for tensor in read_tensors(model).values())
    assert found["bytes"] == stored
    assert found["bits_per_weight_model"] == pytest.approx(8 * stored / num_weights, rel=1e-12)
    assert found["bits_per_weight_before"] == 16 and found["bytes_before"] == 2 * num_weights
    assert found["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["seconds"] > 0
    assert any("layout microscale, because" in note for note in found["notes"])


def test_the_text_answer(model: Path, tmp_path: Path) -> None:
    outcome = succeed("quantize", model, "-f", "mxfp4", "-a", "mxfp4", "-o", tmp_path / "out")
    for piece in (
        "14 layers: weights mxfp4, activations mxfp4:even",
        "left alone: lm_head",
        "4.250 bits per quantized weight",
        "(16.000 bits per weight) before",
        "bytes in 1 file",
        "note: activations mxfp4 are executed as mxfp4:even",
        f"wrote {tmp_path / 'out'} (layout compressed-tensors)",
    ):
        assert piece in outcome.stdout


def test_the_tokenizer_is_copied(model: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= files(
        tmp_path / "out"
    )
    for text in ("The sea was", "ünï ☃"):
        assert microscale.load_tokenizer(tmp_path / "out")(text) == microscale.load_tokenizer(model)(text)


def test_a_model_without_tokenizer_is_quantized_with_a_note(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    found = succeed("quantize", tmp_path / "bare", "-f", "mxfp4", "-o", tmp_path / "out", "--json").json
    assert any("tokenizer" in note for note in found["notes"])
    assert "tokenizer.json" not in files(tmp_path / "out")


def test_command_line_python_and_recipe_write_the_same(model: Path, tmp_path: Path) -> None:
    rules = ["*.down_proj=mxfp8/mxfp6_e2m3", "layers.0.self_attn.q_proj=none", "o_proj=e2m1/16:e4m3+fp32/mxfp8"]
    arguments = [piece for rule in rules for piece in ("--rule", rule)]
    common = ("-f", "mxfp4_plus", "-a", "mxfp8", "--include", "lm_head", "--exclude", "*.up_proj")
    succeed("quantize", model, *common, *arguments, "-o", tmp_path / "cli")
    (tmp_path / "recipe.yaml").write_text(
        "format: mxfp4_plus\nactivations: mxfp8\ninclude: [lm_head]\nexclude: ['*.up_proj']\nrules:\n"
        "  - {match: '*.down_proj', weights: mxfp8, activations: mxfp6_e2m3}\n"
        "  - {match: layers.0.self_attn.q_proj, weights: none}\n"
        "  - {match: o_proj, weights: 'e2m1/16:e4m3+fp32', activations: mxfp8}\n"
    )
    succeed("quantize", model, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "recipe")
    in_memory = microscale.quantize(
        model, "mxfp4_plus", activations="mxfp8", include=["lm_head"], exclude=["*.up_proj"], rules=rules, layout="auto"
    )
    microscale.save(in_memory, tmp_path / "python", tokenizer=microscale.load_tokenizer(model))
    for other in ("recipe", "python"):
        assert read_config(tmp_path / "cli") == read_config(tmp_path / other)
        assert same_tensors(read_tensors(tmp_path / "cli"), read_tensors(tmp_path / other)) == []
        assert files(tmp_path / "cli") == files(tmp_path / other)
    assert len({layer["format"] for layer in succeed("inspect", tmp_path / "cli", "--json").json["layers"]}) == 3


def test_quantizing_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        succeed("quantize", model, "-f", "mxfp4:stochastic(7)", "-o", tmp_path / name)
    assert same_tensors(read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")) == []


def test_the_original_is_not_touched(model: Path, tmp_path: Path) -> None:
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in model.iterdir()}
    succeed("quantize", model, "-f", "mxfp4", "--include", "*", "-o", tmp_path / "out")
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in model.iterdir()} == before


# What is refused: exit code 1, the reason on standard error, nothing written

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no format": ([], ["--format mxfp4", "--recipe"]),
    "an unknown format": (["-f", "mxfp5"], ["unknown format 'mxfp5'", "mxfp4", "^"]),
    "a wrong spec": (["-f", "e2m1/32:e8m0:sideways"], ["unknown option 'sideways'", "possible options"]),
    "unknown activations": (["-f", "mxfp4", "-a", "mxfp5"], ["unknown format 'mxfp5'"]),
    "an unknown range": (["-f", "mxfp4", "-a", "nvfp4@sometimes"], ["unknown range 'sometimes'"]),
    "an unknown layout": (["-f", "mxfp4", "--layout", "gguf"], ["layout", "'auto'"]),
    "an unknown method": (["-f", "mxfp4", "--method", "magic"], ["unknown method or step 'magic'", "rtn"]),
    "an unknown word for NaN": (["-f", "mxfp4", "--nan", "ignore"], ["nan", "'raise'", "'poison'"]),
    "an exclusion without a match": (["-f", "mxfp4", "--exclude", "*.down_prj"], ["*.down_prj", "down_proj"]),
    "an inclusion without a match": (["-f", "mxfp4", "--include", "head"], ["'head'", "lm_head"]),
    "a rule without a match": (["-f", "mxfp4", "--rule", "fc1=mxfp8"], ["'fc1' matches no layer", "down_proj"]),
    "a rule without a format": (["-f", "mxfp4", "--rule", "down_proj"], ["GLOB=WEIGHTS"]),
    "a rule with a wrong format": (["-f", "mxfp4", "--rule", "down_proj=mxfp5"], ["mxfp5", "WEIGHTS/ACTIVATIONS"]),
    "nothing left to do": (["-f", "mxfp4", "--exclude", "*"], ["leaves every layer unquantized"]),
    "no recipe file": (["--recipe", "absent.yaml"], ["absent.yaml cannot be read"]),
    "a shard size that is no size": (["-f", "mxfp4", "--max-shard-size", "large"], ["'large'", "5GB"]),
    "a negative shard size": (["-f", "mxfp4", "--max-shard-size", "-1GB"], ["'-1GB'", "5GB"]),
    "a shard size of zero": (["-f", "mxfp4", "--max-shard-size", "0GB"], ["'0GB'", "5GB"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request(case: str, model: Path, tmp_path: Path) -> None:
    arguments, words = REFUSED[case]
    message = fail("quantize", model, *arguments, "-o", tmp_path / "out")
    for word in words:
        assert word in message
    assert files(tmp_path) == set()


@pytest.mark.parametrize("case", ["an unknown format", "no format", "nothing left to do"])
def test_with_json_a_refusal_is_json_too(case: str, model: Path, tmp_path: Path) -> None:
    outcome = microscale_command("quantize", model, *REFUSED[case][0], "-o", tmp_path / "out", "--json")
    assert outcome.code == 1
    error = outcome.json["error"]
    assert set(error) == {"class", "message"}
    assert issubclass(getattr(microscale.errors, error["class"]), MicroscaleError)
    assert error["message"] in outcome.stderr


def test_a_recipe_and_flags_exclude_each_other(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: mxfp4\n")
    for flag, value in (("-f", "mxfp8"), ("-a", "mxfp8"), ("--rule", "o_proj=mxfp8"), ("--nan", "poison")):
        assert "not both" in fail("quantize", model, "--recipe", recipe, flag, value, "-o", tmp_path / "out")
    found = succeed("quantize", model, "--recipe", recipe, "--layout", "microscale", "-o", tmp_path / "out", "--json")
    assert found.json["layout"] == "microscale"


def test_a_wrong_recipe_names_its_line(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: mxfp4\nrules:\n  - match: o_proj\n    weights: mxfp5\n")
    message = fail("quantize", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert "recipe.yaml, line 4" in message and "mxfp5" in message


@pytest.mark.parametrize("place", ["absent", "empty", "bare", "truncated", "sharded"])
def test_a_broken_original(place: str, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / place
    source.parent.mkdir()
    if place == "empty":
        source.mkdir()
    elif place != "absent":
        shutil.copytree(model, source)
    if place == "bare":
        (source / "model.safetensors").unlink()
    if place == "truncated":
        os.truncate(source / "model.safetensors", 5000)
    if place == "sharded":
        (source / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        )
    message = fail("quantize", source, "-f", "mxfp4", "-o", tmp_path / "out")
    assert str(source) in message
    assert files(tmp_path) == {"source"}


def test_a_quantized_original(model: Path, tmp_path: Path) -> None:
    """It is quantized a second time, and that is said; see tests/integrations/test_foreign_inputs.py."""
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "first")
    with pytest.warns(QuantizationNote, match="14 weights .* are packed: read as floats"):
        succeed("quantize", tmp_path / "first", "-f", "mxfp8", "-o", tmp_path / "second")


def test_a_model_with_an_encoder(tmp_path: Path) -> None:
    """What its config names is loaded, whatever it does: here text into text."""
    import transformers

    config = transformers.T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=64)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert "16 layers" in str(succeed("quantize", tmp_path / "t5", "-f", "mxfp4", "-o", tmp_path / "out"))
    assert type(microscale.load(tmp_path / "out")).__name__ == "T5ForConditionalGeneration"


# NaN and Inf in the weights


BAD_LAYER = "model.layers.1.mlp.down_proj"


def with_bad_weight(model: Path, path: Path, value: float) -> Path:
    shutil.copytree(model, path)
    weight = read_tensors(path)[f"{BAD_LAYER}.weight"]
    weight[3, 40] = value
    edit_tensors(path, **{f"{BAD_LAYER}.weight": weight})
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mxfp4", "int4_asym", "mxfp4_sparse", "adaptive_2_4"])
def test_a_weight_that_is_no_number(value: float, name: str, model: Path, tmp_path: Path) -> None:
    source = with_bad_weight(model, tmp_path / "source", value)
    message = fail("quantize", source, "-f", name, "-o", tmp_path / "out")
    assert f"{BAD_LAYER}.weight holds 1 NaN or Inf value" in message and "--nan poison" in message
    assert files(tmp_path) == {"source"}
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        microscale.quantize(source, name)
    succeed("quantize", source, "-f", name, "--exclude", BAD_LAYER, "-o", tmp_path / "without")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "block"), [("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32), ("int4_asym", 64), ("mxfp4_plusplus", 32)]
)
def test_poison_makes_one_block_nan(value: float, name: str, block: int, model: Path, tmp_path: Path) -> None:
    source = with_bad_weight(model, tmp_path / "source", value)
    succeed("quantize", source, "-f", name, "--nan", "poison", "-o", tmp_path / "out")
    loaded = microscale.load(tmp_path / "out")
    weight = loaded.get_submodule(BAD_LAYER).weight
    expected = torch.zeros(weight.shape, dtype=torch.bool)
    start = 40 // block * block
    expected[3, start : start + block] = True
    assert torch.equal(torch.isnan(weight), expected)
    assert not bool(torch.isinf(weight).any())
    others = [
        module for name, module in loaded.named_modules() if isinstance(module, PackedModule) and name != BAD_LAYER
    ]
    assert len(others) == 13 and all(bool(torch.isfinite(module.weight).all()) for module in others)
    text = tmp_path / "text.txt"
    text.write_text("a broken model\n" * 5)
    score = succeed("eval", tmp_path / "out", "--text", text, "--window", "16", "--json").json
    assert score["perplexity"] is None  # strict JSON has no NaN
    assert "not finite" in fail("generate", tmp_path / "out", "a")


# Places to write


def test_an_existing_output_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    message = fail("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    assert "exists already" in message and "--overwrite" in message
    message = fail("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out", "--overwrite")
    assert "holds no model" in message
    assert files(tmp_path / "out") == {"mine.txt"}
    message = fail("quantize", tmp_path / "absent", "-f", "mxfp4", "-o", tmp_path / "out")
    assert "exists already" in message  # before the model is even looked for


def test_overwrite(model: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    succeed("quantize", model, "-f", "mxfp8", "-o", tmp_path / "out", "--overwrite")
    assert read_config(tmp_path / "out")["microscale"]["schemes"][0]["name"] == "mxfp8_e4m3"
    assert files(tmp_path) == {"out"}


def test_an_error_while_overwriting_leaves_the_old_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with small_files(20_000):
        message = fail("quantize", model, "-f", "mxfp8", "-o", tmp_path / "out", "--overwrite")
    assert "failed" in message
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert files(tmp_path) == {"out"}


def test_an_interruption_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, directory: Path) -> None:
        assert (directory / "model.safetensors").exists()  # the weights were written already
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "copy_beside", interrupted)
    outcome = microscale_command("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    assert outcome.code == 130 and "interrupted" in outcome.stderr
    assert files(tmp_path) == set()


@pytest.mark.parametrize("place", ["/proc/microscale-test/out", "/dev/null/out"])
def test_a_place_where_nobody_can_write(place: str, model: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    assert "cannot write to" in fail("quantize", model, "-f", "mxfp4", "-o", place)


@contextlib.contextmanager
def small_files(limit: int) -> Generator[None]:
    """Let every write past a file size fail, as on a disk with no room left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 1_500, 20_000, 60_000])
@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_files_that_cannot_grow(limit: int, layout: str, model: Path, tmp_path: Path) -> None:
    with small_files(limit):
        message = fail("quantize", model, "-f", "mxfp4", "--layout", layout, "-o", tmp_path / "out")
    assert "writing" in message and "failed" in message
    assert files(tmp_path) == set()


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    """The tokenizer of llama-6m is larger than its first shards, and its library has errors of its own."""
    source = save_two_layers(tmp_path / "source")
    with small_files(500_000):
        message = fail(
            *("quantize", source, "-f", "mxfp4", "--exclude", "layers.1.*", "--include", "embed_tokens"),
            *("--include", "lm_head", "--max-shard-size", "300KB", "-o", tmp_path / "out"),
        )
    assert "writing" in message and "failed" in message
    assert files(tmp_path) == {"source"}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a small file system in memory; it takes root and a kernel that lets us."""
    mounted: list[Path] = []

    def mount(num_kib: int) -> Path:
        place = tmp_path / f"disk-{num_kib}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(place)]
        if (
            os.geteuid() != 0
            or shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("cannot mount a small file system here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("num_kib", [4, 16, 64, 108])
def test_a_full_disk(num_kib: int, model: Path, full_disk: Callable[[int], Path]) -> None:
    disk = full_disk(num_kib)
    message = fail("quantize", model, "-f", "mxfp4", "-o", disk / "out")
    assert "failed" in message and "space" in message
    assert files(disk) == set()


def test_a_disk_with_room_for_one(model: Path, full_disk: Callable[[int], Path]) -> None:
    disk = full_disk(250)
    succeed("quantize", model, "-f", "mxfp4", "-o", disk / "out")
    before = {file.name: file.read_bytes() for file in (disk / "out").iterdir()}
    assert "failed" in fail("quantize", model, "-f", "mxfp8", "-o", disk / "out", "--overwrite")
    assert {file.name: file.read_bytes() for file in (disk / "out").iterdir()} == before
    assert files(disk) == {"out"}


# The same from Python


def test_python_errors_have_the_same_classes(model: Path, tmp_path: Path) -> None:
    quantized = microscale.quantize(model, "mxfp4")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(CheckpointWriteError, match="exists already"):
        microscale.save(quantized, tmp_path / "taken")
    with pytest.raises(MicroscaleError, match="quantized already"):
        microscale.quantize(quantized, "mxfp8")
    with pytest.raises(RecipeError, match="unknown method"):
        microscale.quantize(model, "mxfp4", method="magic")
    with pytest.raises(MicroscaleError, match="no quantized layers"):
        microscale.save(microscale.load(model), tmp_path / "plain")
    with pytest.raises(CheckpointError):
        microscale.quantize(tmp_path / "absent" / "x", "mxfp4")
    assert files(tmp_path) == {"taken"}


def test_a_failed_quantization_leaves_the_model_as_it_was(model: Path, tmp_path: Path) -> None:
    """Every refusal comes before the first layer is replaced."""
    source = with_bad_weight(model, tmp_path / "source", float("nan"))
    loaded = microscale.load(source)
    before = {name: type(module) for name, module in loaded.named_modules()}
    failing: list[dict[str, Any]] = [{"format": "mxfp4"}, {"format": "mxfp4", "exclude": ["nothing"]}]
    for arguments in failing:
        with pytest.raises(MicroscaleError):
            microscale.quantize(loaded, **arguments)
    assert {name: type(module) for name, module in loaded.named_modules()} == before


def test_poison_does_not_change_a_healthy_model(model: Path, tmp_path: Path) -> None:
    for name in ("mxfp4", "mxfp4_plus"):
        one = microscale.quantize(model, name)
        other = microscale.quantize(model, name, nan="poison")
        assert same_bits(logits(one), logits(other))


def test_the_seed_must_be_a_seed(model: Path, tmp_path: Path) -> None:
    outcome = microscale_command("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out", "--seed", str(1 << 80))
    assert outcome.code == 2 and "seed" in outcome.stderr
    assert files(tmp_path) == set()


CALIBRATED = ("-f", "mxfp4", "-a", "mxfp8", "--method", "awq+gptq", "--samples", "4", "--window", "24", "--calibration")
TEXT = "The sea was calm, and the ship went on over it for days without a word from anybody on board. " * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_offload_writes_the_same_files_and_goes_on_after_an_interruption(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("quantize", model, *CALIBRATED, text, "-o", tmp_path / "plain")
    command = ("quantize", model, *CALIBRATED, text, "--offload", tmp_path / "store", "-o", tmp_path / "out")
    with monkeypatch.context() as patch:  # killed while the checkpoint is written: all layers are finished
        patch.setattr("microscale.integrations.saving.write_directory", interrupt)
        assert microscale_command(*command).code == 130
    assert not (tmp_path / "out").exists() and len(files(tmp_path / "store")) == 1
    with monkeypatch.context() as patch:
        patch.setattr("microscale.recipes.calibrated.Quantizer._round_block", interrupt)  # and none is quantized again
        succeed(*command)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert files(tmp_path / "store") == set()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_offload_without_calibration(model: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp6_e2m3", "-o", tmp_path / "plain")
    succeed("quantize", model, "-f", "mxfp6_e2m3", "--offload", tmp_path / "store", "-o", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_offload_does_not_lie_where_the_checkpoint_will(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for place in (out, out / "in" / "it"):
        assert "which is written at the end" in fail(
            "quantize", model, *CALIBRATED, text, "--offload", place, "-o", out
        )
    assert not out.exists()


def test_feeds_and_fields(model: Path, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text(f'{{"body": "{TEXT}"}}\n')
    succeed("quantize", model, *CALIBRATED, text, "-o", tmp_path / "plain")
    succeed("quantize", model, *CALIBRATED, lines, "--calibration-field", "body", "-o", tmp_path / "lines")
    found, plain = contents(tmp_path / "lines"), contents(tmp_path / "plain")
    assert found.pop("README.md") != plain.pop("README.md"), "the card names the text"
    assert found == plain
    assert "has no field 'text'; its fields are 'body'" in fail(
        "quantize", model, *CALIBRATED, lines, "-o", tmp_path / "other"
    )
    succeed("quantize", model, *CALIBRATED, text, "--feed", "original", "-o", tmp_path / "original")
    assert same_tensors(read_tensors(tmp_path / "original"), read_tensors(tmp_path / "plain")) != []
    assert "unknown feed 'both'" in fail("quantize", model, *CALIBRATED, text, "--feed", "both", "-o", tmp_path / "x")


def test_calibration_text_without_a_tokenizer(model: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    message = fail("quantize", tmp_path / "bare", *CALIBRATED, text, "-o", tmp_path / "out")
    assert "calibration text needs a tokenizer, and none can be loaded beside the model" in message


def test_static_ranges_are_measured_and_layers_without_one_are_named(text: Path, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "moe", "mixtral", num_experts_per_tok=1)
    gates = {name: tensor for name, tensor in read_tensors(source).items() if "gate.weight" in name}
    assert gates
    for gate in gates.values():
        gate[1], gate[2:] = -gate[0], 0.0  # |t| beats 0: no token comes to the experts 2 and 3
    edit_tensors(source, **{name.replace(".", "__"): tensor for name, tensor in gates.items()})
    options = ("-f", "nvfp4", "-a", "nvfp4@static", "--samples", "4", "--window", "24")
    found = succeed("quantize", source, *options, "--calibration", text, "-o", tmp_path / "out", "--json").json
    notes = [note for note in found["notes"] if "no calibration token reached 12 layers" in note]
    assert len(notes) == 1 and "experts.2" in notes[0]
    ranges = {name: tensor for name, tensor in read_tensors(tmp_path / "out").items() if name.endswith("amax")}
    assert len(ranges) == 32 and sum(bool(torch.isnan(tensor).any()) for tensor in ranges.values()) == 12
    succeed("quantize", source, *options, "--calibration", text, "--observer", "mse", "-o", tmp_path / "mse")
    assert same_tensors(read_tensors(tmp_path / "mse"), read_tensors(tmp_path / "out")) == []  # mse is the default


def test_options_that_would_do_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    asked = ("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    assert "method best" in fail(*asked, "--method", "gptq", "--effort", "good")
    assert "--calibration" in fail(*asked, "-a", "nvfp4@static")
    assert "--calibration" in fail(*asked, "--rule", "*down_proj=mxfp4/nvfp4@static")
    assert "roles is one of" in fail(*asked, "--method", "hadamard:roles=foo")
    assert "at least 0" in fail(*asked, "--method", "gptq:damp=-1")
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused_before_the_text_is_read(model: Path, tmp_path: Path) -> None:
    """The text does not exist: who read it would say so."""
    job = ("quantize", model, "--calibration", tmp_path / "absent.txt", "--window", "32", "-o", tmp_path / "out")
    static = ("-f", "nvfp4", "-a", "nvfp4@static")
    for words, options in (
        ("unknown observer 'nope'", (*static, "--observer", "nope")),
        ("use mse", (*static, "--observer", "kl")),
        ("write the activations with @static", ("-f", "nvfp4", "-a", "nvfp4", "--observer", "mse")),
        ("quarot works on the whole model", ("-f", "mxfp4", "--method", "quarot", "--offload", tmp_path / "job")),
        ("step gptq cannot quantize to", ("-f", "mxfp4:stochastic(1)", "--method", "gptq")),
    ):
        assert words in fail(*job, *options)
    assert list(tmp_path.iterdir()) == []
    assert "absent.txt" in fail(*job, *static, "--observer", "mse")


def test_a_step_that_changes_nothing_is_noted(model: Path, tmp_path: Path) -> None:
    options = ("quantize", model, "--method", "prescale", "--json", "-o")
    notes = [succeed(*options, tmp_path / word, "-f", word).json["notes"] for word in ("nvfp4", "mxfp4")]
    assert sum("step rule changes nothing for nvfp4: its block scales" in note for note in notes[0]) == 1
    assert not any("changes nothing" in note for note in notes[1])
