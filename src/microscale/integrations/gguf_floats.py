"""GGUF files of architectures whose names are none of ours: transformers makes floats of all their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from microscale.checkpoint.gguf_names import ARCHITECTURES
from microscale.errors import CheckpointError
from microscale.integrations.floats import without_quantization
from microscale.integrations.model_class import class_of
from microscale.integrations.quiet import quiet_transformers


def load_gguf_floats(path: Path, dtype: torch.dtype, config: Any, faults: tuple[type[Exception], ...]) -> Any:
    """Load a GGUF file by transformers, with float weights; ``faults`` are what transformers raises.

    Raises:
        CheckpointError: transformers does not read it.
    """
    options: dict[str, Any] = {}
    settings: Any = getattr(transformers, "GgufConfig", None)
    if settings is not None:  # newer versions keep weights of some types packed in a way of their own without it
        options["quantization_config"] = settings(gguf_file=path.name, dequantize=True)
    try:
        with quiet_transformers():
            kind = class_of(config)
            model = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    except faults as error:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{path} cannot be read: microscale reads {known}, and transformers says: {error}"
        ) from error
    without_quantization(model.config)
    model.hf_quantizer, model.is_quantized = None, False
    return model.to(dtype).eval()
