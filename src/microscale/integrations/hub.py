"""Where a model is: in a directory, or on the hub, which is asked once, and not for long.

Libraries try again for half a minute where there is no network. So a name that is in no cache is asked for here first,
by one request with a limit of time; HF_HUB_OFFLINE, HF_ENDPOINT, tokens and proxies count as they do there.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Generator
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from microscale.checkpoint.reader import CheckpointReader, read_json
from microscale.errors import CheckpointNotFoundError

LIMIT_S = 4.0
"""How long the hub may take to answer, its name to be found included."""
ABSENT = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}
"""What the hub says of a name that it does not have, or does not show."""


def check_local(path: str | Path) -> Path | None:
    """Return the path of a local model directory whose files are whole, None for a hub name that can be had.

    Raises:
        CheckpointNotFoundError: a path that looks local and does not exist, or a name that cannot be reached.
        CheckpointError: damaged files.
    """
    local = Path(path)
    if local.is_dir() and str(path):
        if any(local.glob("*.safetensors*")) or not any(local.glob("*.bin")):
            CheckpointReader(local)
        else:
            read_json(local / "config.json")
        return local
    check_not_missing(path)
    return None


def check_not_missing(path: str | Path) -> None:
    """Refuse what is neither a directory nor a hub name that can be had.

    Raises:
        CheckpointNotFoundError: a path that looks local and does not exist, or a name that cannot be reached.
    """
    local = Path(path)
    looks_local = local.exists() or str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if not str(path) or (looks_local and not local.is_dir()):
        raise CheckpointNotFoundError(
            f"{path} is not a model directory; give a directory with config.json, or a hub name"
        )
    if not local.is_dir():
        check_hub_name(str(path))


@functools.cache
def check_hub_name(name: str) -> None:
    """Refuse a hub name that is in no cache and that the hub does not have, or cannot be asked for.

    Raises:
        CheckpointNotFoundError: with what stands in the way.
    """
    here = f"{name} is no directory here"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise CheckpointNotFoundError(f"{here}, and no name that a hub could have (OWNER/NAME)") from None
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise CheckpointNotFoundError(f"{here} and not in the cache of the hub, and HF_HUB_OFFLINE forbids to ask it")
    found = _ask(f"/api/models/{name}")
    if isinstance(found, str):
        raise CheckpointNotFoundError(f"{here}, and {found}; check the network, or give a directory")
    if found in ABSENT:
        raise CheckpointNotFoundError(
            f"{here}, and {constants.ENDPOINT} has no model of this name, or shows it to its owners only (hf auth"
            " login)"
        )


@contextlib.contextmanager
def offline_where_unreachable() -> Generator[None, None, None]:
    """Let the libraries of the hub turn to their caches at once inside the block, where the hub cannot be reached.

    They would try again for half a minute for every file.
    """
    settings: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    if constants.HF_HUB_OFFLINE or not isinstance(_ask(""), str):
        yield
        return
    before = [one.HF_HUB_OFFLINE for one in settings]
    try:
        for one in settings:
            one.HF_HUB_OFFLINE = True
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.HF_HUB_OFFLINE = value


def _ask(path: str) -> int | str:
    """Return the status with which the hub answers, or why it does not; it is waited for in another thread."""
    found: list[int | str] = []
    thread = threading.Thread(target=lambda: found.append(_answer(path)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return found[0] if found else f"{constants.ENDPOINT} did not answer within {LIMIT_S:g} s"


def _answer(path: str) -> int | str:
    token = get_token()
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{constants.ENDPOINT}{path}", headers=headers, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=LIMIT_S).close()
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        # The library may trust another certificate: let it say more.
        is_there = isinstance(reason, ssl.SSLError)
        return HTTPStatus.OK if is_there else f"{constants.ENDPOINT} cannot be reached ({reason})"
    return HTTPStatus.OK
