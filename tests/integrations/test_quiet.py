"""transformers is quiet inside, and as it was behind."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from microscale.integrations.quiet import quiet_transformers


def test_what_was_set_comes_back() -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet_transformers():
        assert logging.get_verbosity() == 40 and not logging.is_progress_bar_enabled()
        raise RuntimeError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
