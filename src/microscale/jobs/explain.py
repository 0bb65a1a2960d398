"""Explain what runs each layer of a model, and why: one that is loaded, or one whose headers alone are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from microscale.errors import ModelError, OptionError
from microscale.formats.dtypes import parse_dtype
from microscale.integrations.engines import Runtime, why_not_decoded
from microscale.integrations.outline import outline_checkpoint
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import ExplainOptions
from microscale.planning.explain import Explanation, explain_model


def explain(options: ExplainOptions, reporter: Reporter = SILENT) -> Explanation:
    """Return for every layer the formats asked for and executed, backend, kernel, layout, level, and all refusals.

    Nothing is run and no weight is read. A checkpoint is explained as :func:`microscale.load` would leave it on the
    device. What is described is a forward call of the model, as evaluation makes it; ``why_not_decoder`` says whether
    :func:`microscale.generate` makes such calls too, or runs the model in the decoder runtime (None).

    Raises:
        CheckpointError, ModelError: no model, or a name of which no config can be reached.
        OptionError: a device that torch does not know.
        DtypeError: a dtype that is none.
    """
    del reporter  # it takes no time
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    device = None if options.device is None else _device(options.device)
    model = options.model
    decoding_dtype = dtype or torch.float32
    if isinstance(model, str | Path):
        model, device = outline_checkpoint(model, dtype=dtype), device or torch.device("cpu")
    elif not isinstance(model, nn.Module):
        raise ModelError(f"a model is explained, or one by its directory or hub name; got {type(model).__name__}")
    else:
        decoding_dtype = getattr(model, "dtype", decoding_dtype)  # generate runs a loaded model in its own
    found = explain_model(model, device=device, dtype=dtype, engine=Runtime.TRANSFORMERS.value)
    return dataclasses.replace(found, why_not_decoder=why_not_decoded(model, decoding_dtype, device))


def _device(word: str) -> torch.device:
    try:
        return torch.device(word)
    except RuntimeError:
        raise OptionError(f"device is cpu, cuda, cuda:1 and so on, got {word!r}") from None
