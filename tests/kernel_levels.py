"""The instruction-set levels that the tests of the kernels go over."""

from __future__ import annotations

import os

from microscale.kernels.cpu import native

LEVELS = [native.level_name()] if os.environ.get(native.LEVEL_VARIABLE) else list(native.levels())
"""Every level of this machine and build, or the one that the environment forces: `make sanitize` takes them in turn."""
