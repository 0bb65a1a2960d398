"""What of a checkpoint that is quantized already is read as floats, and what runs packed."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from microscale.checkpoint import compressed_tensors
from microscale.checkpoint.float_reader import quantization_of
from microscale.checkpoint.reader import CheckpointReader
from microscale.checkpoint.registry import READABLE_METHODS
from microscale.errors import QuantizationNote, counted
from microscale.integrations.pending import PendingTensor


def is_packed(local: Path) -> bool:
    """Whether a directory holds packed weights that run as they are: in our layout, or one that we read.

    Raises:
        CheckpointError: damaged files, or a quantization that is not read.
    """
    if not any(local.glob("*.safetensors")):
        return False
    reader = CheckpointReader(local)
    config = quantization_of(reader)
    if config is None or config["quant_method"] not in READABLE_METHODS:
        return False
    return config["quant_method"] != "compressed-tensors" or compressed_tensors.is_read(config)


def without_quantization(config: Any) -> None:
    """Take what a config, or that of a part, says of a quantization away from it."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None and getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def pending_state(reader: CheckpointReader) -> dict[str, PendingTensor]:
    """Return a state dict whose tensors are read, or made, when transformers takes them."""
    return {
        name: PendingTensor(dtype=info.dtype, load=functools.partial(reader.load, name))
        for name, info in reader.infos.items()
    }


def tell_of_first_rounding(path: str | Path, count: int) -> None:
    """Say that ``count`` weights of a directory were packed, or (0) that those of a GGUF file mostly are."""
    if count:
        what = f"{counted(count, 'weight')} of {path} are packed: read as floats"
    else:
        what = f"{path} is read as floats, whatever its weights were rounded to"
    warnings.warn(f"{what}. What their first rounding lost stays lost", QuantizationNote, stacklevel=4)
