"""Keep transformers from writing to the terminal while it loads."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Generator[None, None, None]:
    """Let only errors of transformers through inside, and no bars."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bar_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar_enabled:
            transformers_logging.enable_progress_bar()
