"""A name that the hub does not have, or that cannot be asked for, ends soon and in our words."""

from __future__ import annotations

import io
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import microscale
from microscale.errors import CheckpointNotFoundError
from microscale.integrations import hub

NAME = "nobody/no-such-model"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_hub_name.cache_clear()


def answering(problem: BaseException | None) -> Callable[..., Any]:
    def urlopen(request: urllib.request.Request, timeout: float) -> Any:
        assert request.full_url.endswith(f"/api/models/{NAME}") and timeout <= 5
        if problem is not None:
            raise problem
        return io.BytesIO()

    return urlopen


def refused(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("https://x", code, "no", Message(), None)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (refused(404), "has no model of this name"),
        (refused(401), "has no model of this name"),
        (urllib.error.URLError("Name or service not known"), r"cannot be reached \(Name or service not known\)"),
        (TimeoutError("timed out"), r"cannot be reached \(timed out\)"),
        (ConnectionResetError("reset"), "cannot be reached"),
    ],
)
def test_what_the_hub_says(problem: BaseException, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", answering(problem))
    for ask in (microscale.load, microscale.load_tokenizer, lambda name: microscale.quantize(name, "mxfp4")):
        with pytest.raises(CheckpointNotFoundError, match=f"{NAME} is no directory here, and .*{words}"):
            ask(NAME)


@pytest.mark.parametrize("problem", [None, refused(500), urllib.error.URLError(ssl.SSLError("certificate"))])
def test_the_library_says_more(problem: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", answering(problem))
    assert hub.check_local(NAME) is None


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "LIMIT_S", 0.05)
    monkeypatch.setattr(hub, "_answer", lambda path: time.sleep(2))
    began = time.monotonic()
    with pytest.raises(CheckpointNotFoundError, match=r"did not answer within 0\.05 s"):
        hub.check_local(NAME)
    assert time.monotonic() - began < 1.5


def test_offline_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", answering(AssertionError("asked")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE forbids"):
        hub.check_local(NAME)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert hub.check_local(NAME) is None


def test_libraries_turn_to_their_caches_where_the_hub_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, is_offline in (("gone", True), (200, False), (404, False)):
        monkeypatch.setattr(hub, "_ask", lambda path, answer=answer: answer)
        with hub.offline_where_unreachable():
            assert constants.HF_HUB_OFFLINE is is_offline
        assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(hub, "_ask", lambda path: "gone")
    with pytest.raises(KeyError), hub.offline_where_unreachable():
        raise KeyError
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", ["a name", "a--b", "x" * 200])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no name that a hub could have"):
        hub.check_local(name)
