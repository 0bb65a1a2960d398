"""``--device`` of all jobs: what they refuse, that they compute there, and on a GPU that the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import fail
from microscale.errors import DeviceError
from microscale.nn.packed import PackedModule
from pretend_device import DEVICE, PretendDevice
from small_models import save_random_model

Job = Callable[..., Any]
JOBS = ("quantize", "evaluate", "compare", "analyze", "allocate", "generate", "bench")
TEXT = "It was a dark and stormy night; the rain fell in torrents. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("devices")
    (path / "text.txt").write_text(TEXT * 8)
    save_random_model(path / "model")
    return path


def call(job: str, folder: Path, device: str | None, **more: Any) -> Any:
    """Run a job on the model and the text of a folder."""
    text, sample = folder / "text.txt", {"calibration": folder / "text.txt", "samples": 2, "window": 16}
    words: dict[str, dict[str, Any]] = {
        "quantize": {"format": "mxfp4", "method": "gptq", **sample},
        "evaluate": {"text": text, "window": 16, "tokens": 60},
        "compare": {"text": text, "window": 16, "tokens": 30, "formats": "mxfp4"},
        "analyze": {"formats": "mxfp4", **sample},
        "allocate": {"budget": "5bits", "formats": "mxfp4,mxfp8", **sample},
        "generate": {"prompt": "The sea", "max_new_tokens": 3},
        "bench": {"prompt_tokens": 4, "new_tokens": 2, "repeat": 1},
    }
    return getattr(microscale, job)(str(folder / "model"), device=device, **(words[job] | more))


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("word", ["meta", "cuda:x"])
def test_words_that_are_no_device_are_refused(job: str, word: str, folder: Path) -> None:
    with pytest.raises(DeviceError, match="device is cpu, cuda, cuda:1 and so on"):
        call(job, folder, word)


def test_the_command_line_refuses_cuda_with_a_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fail("quantize", folder / "model", "-f", "mxfp4", "-o", folder / "out", "--device", "cuda")
    assert "sees no CUDA device here" in said and "--device cpu" in said


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendDevice:
    """A made-up GPU that every job takes for the one it is asked for."""
    for job in JOBS:
        monkeypatch.setattr(f"microscale.jobs.{job}.chosen_device", lambda word: None if word is None else DEVICE)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    return PretendDevice()


def numbers(job: str, found: Any) -> Any:
    """What of a result does not hang on time."""
    if job == "quantize":
        return [part.cpu() for m in found.modules() if isinstance(m, PackedModule) for part in m.tensor.parts.values()]
    if job == "evaluate":
        return found.on_text.score.perplexity
    if job == "compare":
        return [row.perplexity for row in found.rows]
    if job == "analyze":
        return [layer.errors["mxfp4"].weight_qsnr_db for layer in found.analysis.layers if layer.errors]
    if job == "allocate":
        return [value for values in found.allocation.table.sensitivity.values() for value in values]
    return found.generation.tokens if job == "generate" else found.executed.formats


SLOW = ("compare", "analyze", "allocate")


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.slow) if job in SLOW else job for job in JOBS])
def test_every_job_computes_on_the_device(job: str, folder: Path, pretend: PretendDevice) -> None:
    expected = numbers(job, call(job, folder, None))
    with pretend:
        found = numbers(job, call(job, folder, "cuda"))
    assert pretend.peak > 0
    if job == "quantize":
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    elif job in ("generate", "bench"):
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-4)


def test_ranges_are_measured_on_the_device_where_the_model_fits(
    folder: Path, pretend: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"method": "rtn", "format": "nvfp4", "activations": "nvfp4@static"}
    expected = call("quantize", folder, None, **words)
    for free in (10**9, 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        with pretend:
            found = call("quantize", folder, "cuda", **words)
        ranges = [float(m.amax) for m in found.modules() if getattr(m, "amax", None) is not None]
        assert ranges == pytest.approx(
            [float(m.amax) for m in expected.modules() if getattr(m, "amax", None) is not None], rel=1e-5
        )


def test_a_loaded_model_is_back_afterwards(folder: Path, pretend: PretendDevice) -> None:
    model, tokenizer = (
        microscale.load(folder / "model", dtype=torch.float32),
        microscale.load_tokenizer(folder / "model"),
    )
    with pretend:
        microscale.evaluate(model, tokenizer=tokenizer, text=folder / "text.txt", window=16, tokens=30, device="cuda")
        microscale.generate(model, "The sea", tokenizer=tokenizer, max_new_tokens=2, device="cuda")
    assert pretend.peak > 0 and not any(pretend.is_there(tensor) for tensor in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("words", [{"method": "rtn"}, {"method": "gptq"}, {"method": "best", "activations": "mxfp4"}])
def test_a_gpu_quantizes_as_the_processor_does(words: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Sums come out in another order, so that a code at a tie may differ where a method feeds errors back."""
    sample = {"calibration": folder / "text.txt", "samples": 4, "window": 32}
    tokenizer = microscale.load_tokenizer(folder / "model")
    outs = {device: tmp_path / device for device in ("cpu", "cuda")}
    models: dict[str, Any] = {}
    for device, out in outs.items():
        models[device] = microscale.quantize(
            str(folder / "model"), "mxfp4", output=out, tokenizer=tokenizer, device=device, **words, **sample
        )
        assert all(tensor.device.type == "cpu" for tensor in (*models[device].parameters(), *models[device].buffers()))
    same = total = 0
    for name, module in microscale.load(outs["cpu"]).named_modules():
        if isinstance(module, PackedModule):
            here, there = module.weight, microscale.load(outs["cuda"]).get_submodule(name).weight
            same, total = same + int((here == there).sum()), total + here.numel()
    assert same == total if words["method"] == "rtn" else same > 0.98 * total
    scores = [
        numbers("evaluate", microscale.evaluate(out, text=folder / "text.txt", window=32, device=device))
        for out, device in ((outs["cuda"], "cpu"), (outs["cuda"], "cuda"), (outs["cpu"], "cpu"))
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert scores[2] == pytest.approx(scores[0], rel=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("job", JOBS)
def test_a_gpu_does_every_job(job: str, folder: Path) -> None:
    expected, found = (numbers(job, call(job, folder, device)) for device in ("cpu", "cuda"))
    if job == "quantize":
        total = sum(part.numel() for part in expected)
        assert sum(int((a == b).sum()) for a, b in zip(found, expected, strict=True)) > 0.98 * total
    elif job in ("generate", "bench"):
        assert len(found) == len(expected)
    else:
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.gpu
def test_a_gpu_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    """The peak of its memory does not grow with the number of layers."""
    peaks: list[int] = []
    (tmp_path / "text.txt").write_text(TEXT * 8)
    for layers in (2, 12):
        path = save_random_model(tmp_path / str(layers), num_hidden_layers=layers, hidden_size=256)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        microscale.quantize(
            str(path), "mxfp4", method="gptq", calibration=tmp_path / "text.txt", samples=4, window=32, device="cuda"
        )
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]
