"""Perplexity: windows by the reference protocol, the number from its definition, batches, and short texts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from microscale.errors import TextError
from microscale.evaluation.perplexity import DEFAULT_WINDOW, make_windows, perplexity
from microscale.families.batch import Batch

VOCABULARY = 11


def lists(windows: list[Tensor]) -> list[list[int]]:
    return [window.tolist() for window in windows]


def test_windows_with_bos() -> None:
    assert lists(make_windows([10, 11, 12, 13, 14, 15, 16], window=4, bos=1)) == [
        [1, 10, 11, 12],
        [1, 13, 14, 15],
        [1, 16],
    ]
    assert lists(make_windows([10, 11, 12], window=4, bos=1)) == [[1, 10, 11, 12]]
    assert lists(make_windows([10], window=4, bos=1)) == [[1, 10]]
    assert lists(make_windows([10, 11, 12, 13], window=4, num_tokens=2, bos=0)) == [[0, 10, 11]]


def test_windows_without_bos() -> None:
    """The first token of each window is given, not predicted; one left over alone predicts nothing."""
    assert lists(make_windows([10, 11, 12, 13, 14, 15, 16], window=4, bos=None)) == [[10, 11, 12, 13], [14, 15, 16]]
    assert lists(make_windows([10, 11, 12, 13, 14], window=4, bos=None)) == [[10, 11, 12, 13]]


def test_the_reference_protocol_is_17_windows_of_bos_and_1023() -> None:
    windows = make_windows(list(range(20_000)), num_tokens=17_391, bos=0)
    assert DEFAULT_WINDOW == 1024
    assert [window.numel() for window in windows] == [1024] * 17
    assert windows[0][:3].tolist() == [0, 0, 1] and windows[16][-1] == 17_390


@given(st.integers(1, 40), st.integers(2, 12), st.booleans())
def test_every_token_is_predicted_once(num_tokens: int, window: int, has_bos: bool) -> None:
    tokens = list(range(100, 100 + num_tokens))
    if not has_bos and num_tokens < 2:
        return
    windows = make_windows(tokens, window=window, bos=7 if has_bos else None)
    predicted = [token for piece in lists(windows) for token in piece[1:]]
    assert all(2 <= piece.numel() <= window for piece in windows)
    if has_bos:
        assert predicted == tokens and all(int(piece[0]) == 7 for piece in windows)
    else:
        assert predicted == [token for place, token in enumerate(tokens) if place % window]


@pytest.mark.parametrize(
    ("tokens", "arguments", "words"),
    [
        ([], {"bos": 1}, "nothing to predict"),
        ([5], {"bos": None}, "nothing to predict"),
        ([5, 6], {"bos": 1, "window": 1}, "at least 2 tokens"),
        ([5, 6], {"bos": 1, "window": -3}, "at least 2 tokens"),
        ([5, 6], {"bos": 1, "num_tokens": 3}, "has 2 tokens, fewer than the 3"),
        ([5, 6], {"bos": 1, "num_tokens": 0}, "must be positive"),
        ([5, 6], {"bos": None, "num_tokens": 1}, "nothing to predict"),
    ],
)
def test_a_text_that_is_too_short(tokens: list[int], arguments: dict[str, int | None], words: str) -> None:
    with pytest.raises(TextError, match=words):
        make_windows(tokens, **arguments)  # type: ignore[arg-type]


class Bigram:
    """A language model that is a table; it counts its calls."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.shapes.append(tuple(batch.token_ids.shape))
        return self.table[batch.token_ids]


def by_definition(table: Tensor, windows: list[Tensor]) -> float:
    losses = [
        -math.log(math.exp(table[a, b]) / sum(math.exp(table[a, c]) for c in range(VOCABULARY)))
        for window in lists(windows)
        for a, b in itertools.pairwise(window)
    ]
    return math.exp(sum(losses) / len(losses))


TOKENS = torch.randint(0, VOCABULARY, (100,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("bos", [2, None])
@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_number_is_that_of_the_definition(bos: int | None, batch: int) -> None:
    """Losses are averaged over tokens, not over windows: the short last window counts less."""
    windows = make_windows(TOKENS, window=8, bos=bos)
    assert windows[-1].numel() < 8
    model = Bigram()
    seen: list[tuple[int, int]] = []
    result = perplexity(model, windows, batch=batch, progress=lambda done, total: seen.append((done, total)))
    assert result.perplexity == pytest.approx(by_definition(model.table, windows), rel=1e-6)
    assert result.tokens == sum(window.numel() - 1 for window in windows)
    assert result.windows == len(windows)
    assert result.seconds >= 0
    assert seen[-1] == (len(windows), len(windows)) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert max(rows for rows, _ in model.shapes) <= batch
    assert sum(rows for rows, _ in model.shapes) == len(windows)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    windows = make_windows(TOKENS, window=30, bos=0)
    result = perplexity(lambda batch: torch.zeros(*batch.token_ids.shape, VOCABULARY), windows)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    windows = make_windows(TOKENS, window=8, bos=0)
    model = Bigram(dtype=torch.bfloat16)
    assert perplexity(model, windows).perplexity == pytest.approx(
        by_definition(model.table.to(torch.float32), windows), rel=1e-6
    )


def test_many_rows_are_summed_in_pieces() -> None:
    tokens = torch.randint(0, VOCABULARY, (5000,), generator=torch.Generator().manual_seed(4))
    model = Bigram()
    expected = math.exp(float(functional.cross_entropy(model.table[tokens[:-1]].double(), tokens[1:])))
    assert perplexity(model, [tokens]).perplexity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_model_gives_no_finite_number(value: float) -> None:
    def broken(batch: Batch) -> Tensor:
        return torch.full((*batch.token_ids.shape, VOCABULARY), value)

    assert not math.isfinite(perplexity(broken, make_windows(TOKENS, window=8, bos=0)).perplexity)


def test_a_hopeless_model_overflows_to_inf() -> None:
    def hopeless(batch: Batch) -> Tensor:
        scores = torch.zeros(*batch.token_ids.shape, VOCABULARY)
        scores[..., 0] = 1e6
        return scores

    assert perplexity(hopeless, [torch.tensor([1, 2, 3])]).perplexity == math.inf


def test_no_windows_are_refused() -> None:
    with pytest.raises(TextError, match="no window"):
        perplexity(Bigram(), [])
