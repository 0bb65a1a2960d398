"""Jobs that keep their state on disk and read a model layer by layer: the same bits, resumed, in little memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale
from family_models import family_model
from microscale.calibration.cache import ActivationStore
from microscale.errors import CalibrationError, CheckpointError, ModelError, NonFiniteError
from microscale.integrations import hub
from microscale.integrations.layerwise import LayerFile
from microscale.nn.packed import PackedModule
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibration import Calibration
from microscale.recipes.offload import open_store
from microscale.recipes.recipe import make_recipe
from small_models import FAMILIES, edit_tensors, read_tensors, same_tensors, save_random_model

WINDOWS = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(2))
Progress = Callable[[int, int, str], None]


class StoppedError(Exception):
    """Stands for a kill."""


def stop_at(layer: int) -> Progress:
    def progress(done: int, total: int, name: str) -> None:
        if done == layer:
            raise StoppedError

    return progress


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=4)


def quantize(path: Any, method: str, offload: Path | None, progress: Progress | None = None, **options: Any) -> Any:
    given = {"activations": "mxfp8", "calibration": WINDOWS, "layout": "microscale"} | options
    return microscale.quantize(path, "mxfp4", method=method, offload=offload, progress=progress, **given)


def written(model: Any, target: Path) -> dict[str, Tensor]:
    microscale.save(model, target, layout="microscale", overwrite=True)
    return read_tensors(target)


def entries(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


CHAINS = [
    "hadamard:signs=true+gptq",
    "awq+permute+rtn:weighted=true+lowrank:rank=2",
    "smoothquant",
    "rtn",
    "hadamard",
    "autoround:steps=4+rtn",
    "omniquant:epochs=1+rtn",
    "flatquant:epochs=1+rtn",
    "batquant:epochs=1+gptq",
]


@pytest.mark.parametrize("feed", ["quantized", "original"])
@pytest.mark.parametrize("method", CHAINS)
def test_a_job_killed_anywhere_ends_with_the_same_bits(method: str, feed: str, path: Path, tmp_path: Path) -> None:
    if feed == "original" and method in ("rtn", "hadamard"):
        pytest.skip("nothing is fed")
    options = {"feed": feed, "exclude": ["layers.1.mlp.up_proj"]}
    expected = written(quantize(path, method, None, **options), tmp_path / "plain")
    store = tmp_path / "store"
    starts: list[int] = []
    for layer in (1, 3, 4):

        def stop(done: int, total: int, name: str, layer: int = layer) -> None:
            if name in ("", *(f"model.layers.{place}" for place in range(4))):  # else a step tells of its own progress
                starts.append(done)
                stop_at(layer)(done, total, name)

        with pytest.raises(StoppedError):
            quantize(path, method, store, stop, **options)
        assert len(entries(store)) == 1
    assert starts == [0, 1, 1, 2, 3, 3, 4]
    model = quantize(path, method, store, **options)
    assert same_tensors(written(model, tmp_path / "out"), expected) == []
    assert entries(store) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_read_layer_by_layer_gives_the_same_files(family: str, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", family)
    expected = written(quantize(source, "awq+hadamard+gptq", None), tmp_path / "plain")
    with pytest.raises(StoppedError):
        quantize(source, "awq+hadamard+gptq", tmp_path / "store", stop_at(1))
    found = written(quantize(source, "awq+hadamard+gptq", tmp_path / "store"), tmp_path / "out")
    assert same_tensors(found, expected) == []
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "plain" / name).read_text()


@pytest.mark.parametrize("part", ["language", "vision", "all"])
def test_a_model_that_sees(part: str, tmp_path: Path) -> None:
    family_model("qwen2_5_vl", dtype=torch.float32).save_pretrained(tmp_path / "model")
    options = {"part": part, "calibration": WINDOWS % 90}
    expected = written(quantize(tmp_path / "model", "gptq", None, **options), tmp_path / "plain")
    found = written(quantize(tmp_path / "model", "gptq", tmp_path / "store", **options), tmp_path / "out")
    assert same_tensors(found, expected) == []


@pytest.mark.parametrize(
    "method",
    [
        "distill:epochs=1+gptq",
        "micromix:scale=0.5+distill:transform=none,epochs=1+rtn",
        "awq+micromix:scale=0.5+distill:transform=none,epochs=1+gptq",
        "quarot+gptq",
        "spinquant:steps=2+gptq",
    ],
)
def test_a_model_in_memory_resumes_too_and_methods_for_the_whole_are_run_again(method: str, tmp_path: Path) -> None:
    def run(store: Path | None, progress: Progress | None = None) -> Any:
        model = family_model("llama", dtype=torch.bfloat16)
        return quantize(model, method, store, progress, calibration=WINDOWS % 90)

    def stop(done: int, total: int, name: str) -> None:
        if name == "model.layers.1":
            raise StoppedError

    expected = run(None).state_dict()
    with pytest.raises(StoppedError):
        run(tmp_path, stop)
    assert len(entries(tmp_path)) == 1
    assert same_tensors(run(tmp_path).state_dict(), expected) == []


def matrices_at_hand(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """Count the float numbers of matrices in each decoder layer; norms and biases stay, as they do in the result."""
    found: dict[str, int] = {}
    for name in names:
        layer = model.get_submodule(name)
        held = [p for p in layer.parameters() if p.ndim > 1 and not p.is_meta]
        packed = [module for module in layer.modules() if isinstance(module, PackedModule)]
        held += [module._cached_weight for module in packed if module._cached_weight is not None]
        if held:
            found[name] = sum(tensor.numel() for tensor in held)
    return found


class Counted:
    """A source that looks at the model whenever a layer is read."""

    def __init__(self, source: LayerFile, model: nn.Module) -> None:
        self.source, self.model, self.names, self.order = source, model, source.names, list[str]()

    def read(self, name: str) -> nn.Module:
        assert matrices_at_hand(self.model, self.names) == {}, "the layer before is still there"
        self.order.append(name)
        return self.source.read(name)


@pytest.mark.parametrize("method", ["awq+gptq", "rtn"])
def test_no_more_than_one_layer_is_at_hand(method: str, path: Path, tmp_path: Path) -> None:
    file = LayerFile(path)
    model = file.model()
    source = Counted(file, model)
    widest = sum(p.numel() for p in file.read(file.names[0]).parameters() if p.ndim > 1)
    seen: list[dict[str, int]] = []

    def look(*_: Any) -> None:
        seen.append(matrices_at_hand(model, file.names))

    for name in file.names:
        model.get_submodule(name).register_forward_pre_hook(look)
    recipe, calibration = make_recipe(format="mxfp4", method=method), Calibration(windows=WINDOWS, batch=2)
    store = open_store(tmp_path / "store", "this model", recipe, calibration)
    quantize_model(model, recipe, look, calibration=calibration, store=store, source=source)
    assert source.order == list(file.names)
    assert all(len(each) <= 1 and sum(each.values()) <= widest for each in seen)
    assert any(seen) == (method != "rtn") and seen[-1] == {}
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_another_job_is_not_taken_for_this_one(path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StoppedError):
        quantize(path, "gptq", store, stop_at(2))
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"calibration": WINDOWS + 1},
        {"activations": "mxfp4"},
        {"feed": "original"},
    ]
    for options in changes:
        first: list[int] = []
        model = quantize(path, "gptq", store, lambda done, *_, first=first: first.append(done), **options)
        assert first[0] == 0
        assert same_tensors(model.state_dict(), quantize(path, "gptq", None, **options).state_dict()) == []
        assert len(entries(store)) == 1  # the other job's, untouched
    edit_tensors(path, model__norm__weight=read_tensors(path)["model.norm.weight"])  # the same bytes, a new file
    first = []
    quantize(path, "gptq", store, lambda done, *_: first.append(done))
    assert first[0] == 0


def test_a_damaged_state_is_not_used(path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StoppedError):
        quantize(path, "gptq", store, stop_at(2))
    file = max(store.glob("*/state-0000/*.bin"), key=lambda each: each.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    first: list[int] = []
    model = quantize(path, "gptq", store, lambda done, *_: first.append(done))
    assert first[0] == 0
    assert same_tensors(model.state_dict(), quantize(path, "gptq", None).state_dict()) == []


def test_without_a_directory_nothing_is_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was written")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ActivationStore, "put_state", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    quantize(path, "gptq", None)
    assert entries(tmp_path) == []


def test_methods_for_the_whole_model_are_refused(path: Path, tmp_path: Path) -> None:
    segmented = "micromix+distill:transform=none+rtn"
    for method, step in ((segmented, "distill"), ("qad", "distill"), ("quarot", "quarot"), ("spinquant", "spinquant")):
        with pytest.raises(CalibrationError, match=f"{step} works on the whole model at once, but with --offload"):
            quantize(path, method, tmp_path / "store")


def test_a_directory_that_cannot_be_used(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot hold activations"):
        quantize(path, "gptq", tmp_path / "file")


def test_models_that_cannot_be_read_layer_by_layer(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "check_hub_name", lambda name: None)
    with pytest.raises(CheckpointError, match=r"does not exist|is not a model directory"):
        quantize(tmp_path / "absent", "gptq", tmp_path / "store")
    with pytest.raises(ModelError, match="is no local directory"):
        quantize("someone/model", "gptq", tmp_path / "store")
    microscale.save(quantize(path, "rtn", None), tmp_path / "packed")
    with pytest.raises(ModelError, match="holds packed weights"):
        quantize(tmp_path / "packed", "gptq", tmp_path / "store")
    broken = save_random_model(tmp_path / "broken")
    edit_tensors(broken, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"lacks 1 tensor of the model"):
        quantize(broken, "gptq", tmp_path / "store")


def test_a_weight_that_is_not_finite_is_named_when_its_layer_comes(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    weight = read_tensors(source)["model.layers.1.mlp.down_proj.weight"]
    weight[3, 3] = torch.nan
    edit_tensors(source, model__layers__1__mlp__down_proj__weight=weight)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        quantize(source, "gptq", tmp_path / "store")
