"""The steps from a model to a quantized one: their stages, and what is left for the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microscale.integrations.quantization import CalibrationOptions, quantize_original, report_quantizing
from microscale.nn import PackedModule
from microscale.recipes import ignore_progress, make_recipe
from small_models import TOKENS, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def test_each_stage_is_entered_once_and_left_before_the_next(source: Path) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def stages(title: str) -> Iterator[Callable[[int, int, str], None]]:
        seen.append(f"start {title}")
        yield lambda done, total, name: seen.append(title) if done == total else None
        seen.append(f"end {title}")

    recipe = make_recipe(format="nvfp4", activations="nvfp4@static")
    done = quantize_original(source, recipe, CalibrationOptions(source=TOKENS), version="1", stages=stages)
    titles = ("quantizing", "measuring ranges")
    assert seen == [text for title in titles for text in (f"start {title}", title, f"end {title}")]
    assert done.ranges is not None and len(done.ranges.ranges) == 14 and done.ranges.unseen == ()


def test_without_calibration_no_range_is_measured_and_nothing_is_stored(source: Path) -> None:
    recipe, silent = make_recipe(format="nvfp4", activations="nvfp4@static"), report_quantizing(ignore_progress)
    done = quantize_original(source, recipe, CalibrationOptions(), version="1", stages=silent)
    assert done.ranges is None and done.store is None


def test_a_job_stays_on_disk_until_the_caller_clears_it(source: Path, tmp_path: Path) -> None:
    recipe, silent = make_recipe(format="mxfp4", method="gptq"), report_quantizing(ignore_progress)
    options = CalibrationOptions(source=TOKENS)
    done = quantize_original(source, recipe, options, version="1", stages=silent, offload=tmp_path / "job")
    assert done.store is not None and done.store.path is not None and any(done.store.path.iterdir())
    done.store.clear()
    assert not done.store.path.exists()
    assert any(isinstance(module, PackedModule) for module in done.model.modules())
    assert done.model.config.microscale["version"] == "1"
