"""token_ids: a text in pieces gives the ids of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale.integrations import tokenizing
from microscale.integrations.tokenizing import token_ids
from small_models import LLAMA_6M, REPO_ROOT, byte_tokenizer

PROSE = (REPO_ROOT / "docs" / "reference" / "formats.md").read_text("utf-8")
TEXTS = {
    "prose": PROSE,
    "many bytes for a character": "日本語のテキスト、🦙 und Grüße. " * 120,
    "one long word": "a" * 1000 + "=" * 3000 + "b c " * 500,
    "blanks": (" " * 700 + "\n" * 900 + "word ") * 3,
    "short": "two words",
    "empty": "",
}


@pytest.fixture(params=["bytes", "llama-6m"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "bytes" else microscale.load_tokenizer(LLAMA_6M)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("piece", [200, 1000, 4096])
def test_pieces_give_what_the_whole_gives(
    tokenizer: Any, name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE_CHARS", piece)
    monkeypatch.setattr(tokenizing, "OVERLAP_CHARS", 128)
    whole = tokenizer(TEXTS[name], add_special_tokens=False, verbose=False)["input_ids"]
    assert token_ids(tokenizer, TEXTS[name]).tolist() == whole


def test_a_text_is_not_tokenized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PIECE_CHARS", 1000)
    monkeypatch.setattr(tokenizing, "OVERLAP_CHARS", 500)
    real, lengths = microscale.load_tokenizer(LLAMA_6M), list[int]()

    class Watched:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return real(text, **options)

    ids = token_ids(Watched(), PROSE)
    assert max(lengths) <= 1500 and len(lengths) >= len(PROSE) // 1000 and ids.dtype == torch.int32


@pytest.mark.slow
def test_the_calibration_text(shared_dir: Path) -> None:
    tokenizer = microscale.load_tokenizer(shared_dir / "models" / "llama-30m")
    text = (shared_dir / "texts" / "calibration.txt").read_text("utf-8")
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert token_ids(tokenizer, text).tolist() == whole
