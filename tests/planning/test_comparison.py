"""compare_formats: the same numbers as separate runs, and the model as before, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import microscale
from microscale.errors import FormatSpecError, ModelError, NonFiniteError
from microscale.evaluation.perplexity import make_windows, perplexity
from microscale.families.batch import Batch
from microscale.nn.packed import PackedModule
from microscale.planning.comparison import ComparisonResult, compare_formats
from small_models import logits, same_bits, save_random_model

WINDOWS = make_windows(
    torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist(), window=20, bos=256
)


def language_model(model: Any) -> Callable[[Batch], Tensor]:
    return lambda batch: logits(model, batch.token_ids)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def snapshot(model: Any) -> dict[str, tuple[int, int]]:
    """Return every module by identity, with the address of its weight."""
    return {
        name: (id(module), module.weight.data_ptr() if isinstance(getattr(module, "weight", None), Tensor) else 0)
        for name, module in model.named_modules()
    }


def compare(model: Any, formats: list[str], **options: Any) -> list[ComparisonResult]:
    return compare_formats(model, formats, WINDOWS, language_model, stored_dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_separate_runs(tied: bool, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", tie_word_embeddings=tied)
    model = microscale.load(source, dtype=torch.float32)
    before, config = snapshot(model), model.config.to_dict()
    rows = compare(model, ["mxfp4", "nvfp4"])
    assert [(row.format, row.mode) for row in rows] == [
        *(("bfloat16", "none"), ("mxfp4", "w"), ("mxfp4", "w+a"), ("nvfp4", "w"), ("nvfp4", "w+a"))
    ]
    assert rows[0].perplexity == perplexity(language_model(model), WINDOWS).perplexity
    for row in rows[1:]:
        activations = row.format if row.mode == "w+a" else None
        quantized = microscale.quantize(source, row.format, activations=activations).float()
        alone = perplexity(language_model(quantized), WINDOWS).perplexity
        assert row.perplexity == pytest.approx(alone, rel=2.0**-20), "float32 sums in the order of another kernel"
        num_linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
        num_all = sum(parameter.numel() for parameter in model.parameters())
        assert row.bits_per_weight == pytest.approx(4.25 if row.format == "mxfp4" else 4.5, abs=0.01)
        expected = row.bits_per_weight * num_linear / 8 + 2 * (num_all - num_linear)
        assert row.num_bytes == pytest.approx(expected, rel=1e-12)
        assert row.model_bits_per_weight == pytest.approx(8 * expected / num_all, rel=1e-12)
    assert snapshot(model) == before
    assert model.config.to_dict() == config


def test_the_model_is_restored_after_an_error(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    before, expected = snapshot(model), logits(model)
    calls = [0]

    def failing(model: Any) -> Callable[[Batch], Tensor]:
        def call(batch: Batch) -> Tensor:
            calls[0] += 1
            if calls[0] > 5:
                assert any(isinstance(module, PackedModule) for module in model.modules())
                raise KeyboardInterrupt
            return logits(model, batch.token_ids)

        return call

    with pytest.raises(KeyboardInterrupt):
        compare_formats(model, ["mxfp4"], WINDOWS, failing, stored_dtype=torch.bfloat16, batch=2)
    assert calls[0] == 6  # four batches of the original, then in the middle of a format
    assert snapshot(model) == before
    assert same_bits(logits(model), expected)


def test_the_model_is_restored_after_a_weight_that_is_no_number(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match="down_proj"):
        compare(model, ["mxfp4"])
    assert snapshot(model) == before


def test_a_wrong_format_is_found_before_anything_runs(path: Path) -> None:
    model = microscale.load(path)

    def never(model: Any) -> Callable[[Batch], Tensor]:
        raise AssertionError(model)

    with pytest.raises(FormatSpecError, match="mxfp5"):
        compare_formats(model, ["mxfp8", "mxfp5"], WINDOWS, never, stored_dtype=torch.bfloat16)
    quantized = microscale.quantize(path, "mxfp4")
    with pytest.raises(ModelError, match="quantized already"):
        compare(quantized, ["mxfp8"])


def test_progress_counts_every_window_once(path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    compare(microscale.load(path), ["mxfp4", "mxfp8"], progress=lambda *step: steps.append(step), batch=2)
    done, totals, labels = zip(*steps, strict=True)
    assert list(done) == sorted(done) and done[0] == 0 and done[-1] == 5 * len(WINDOWS)
    assert set(totals) == {5 * len(WINDOWS)}
    assert labels.count("unquantized none") == 5
    assert set(labels) == {
        "unquantized none",
        *(f"{fmt} {mode}" for fmt in ("mxfp4", "mxfp8") for mode in ("w", "w+a")),
    }


def test_batches_matter_only_for_scales_over_the_whole_batch(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    by_batch = {batch: compare(model, ["mxfp4"], batch=batch) for batch in (1, 4)}
    for one, other in zip(by_batch[1], by_batch[4], strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)


def test_no_format_gives_the_unquantized_row(path: Path) -> None:
    assert [row.mode for row in compare(microscale.load(path), [])] == ["none"]
