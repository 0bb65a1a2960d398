"""Is what was written readable: the new directory is opened before it takes its name.

transformers opens it as a user would, without weights (they lie on ``meta``), and the names and shapes of all tensors
are compared. What it would not load is an error while the model is still there, not a surprise on another machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Collection
from pathlib import Path

from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.checkpoint.reader import CheckpointReader
from microscale.errors import CheckpointWriteError, MicroscaleError, counted
from microscale.integrations.hf_quantizer import register
from microscale.integrations.model_class import class_at
from microscale.integrations.places import places_of

LIBRARIES = {"compressed-tensors": ("accelerate", "compressed_tensors"), "quark": ("accelerate", "quark")}
"""What transformers needs to open a layout; without it the directory is not opened."""

FAULTS = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ImportError,
    ArithmeticError,
    MicroscaleError,
)
"""What comes of opening a directory that is not whole."""


class UnreadableError(CheckpointWriteError):
    """What was written could not be loaded again; it was taken away."""


def check_readable(directory: Path, layout: str, leftover: Collection[str] = ()) -> None:
    """Open a written directory, with all tensors on ``meta``; ``leftover`` are tensors that no class has a place for.

    Raises:
        UnreadableError: transformers fails, would leave tensors random or out, or finds others shapes than it wants.
    """
    if any(importlib.util.find_spec(name) is None for name in LIBRARIES.get(layout, ("accelerate",))):
        return
    register()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # bars of libraries
            warnings.simplefilter("ignore")
            kind = class_at(directory)
            expanded = {"quantization_config": Mxfp4Config(dequantize=True)} if layout == GptOssLayout.name else {}
            model, info = kind.from_pretrained(
                directory, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **expanded
            )
        missing, wrong = sorted(info["missing_keys"]), sorted(str(each[0]) for each in info["mismatched_keys"])
        names = set(CheckpointReader(directory).infos)
        unread = sorted(set(map(str, info["unexpected_keys"])) & names - set(leftover))
        places = places_of(names - set(leftover), model, model.state_dict()) if layout == "microscale" else {}
        unread += sorted(name for name, place in places.items() if place is None and name not in unread)
    except FAULTS as error:
        raise UnreadableError(f"layout {layout}: transformers cannot open what was written: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    found = {"finds no tensor for": missing, "finds another shape for": wrong, "would leave out": unread}
    said = [f"{what} {counted(len(names), 'name')}, e.g. {names[0]!r}" for what, names in found.items() if names]
    if said:
        raise UnreadableError(f"layout {layout}: transformers opens what was written, but {' and '.join(said)}")
