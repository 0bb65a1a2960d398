"""A model that is to be quantized or measured, as a user gives it: in memory, or by the place where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from microscale.errors import CheckpointError, ModelError
from microscale.integrations.adapters import base_of, is_adapter
from microscale.integrations.hub import check_not_missing
from microscale.integrations.layerwise import LayerFile, files_identity, outline_model, weights_identity
from microscale.integrations.loading import is_gguf, load_original, load_tokenizer


class Original:
    """A model of transformers, or one by its directory or hub name; nothing is read before it is asked for.

    Raises:
        ModelError: neither.
        CheckpointNotFoundError: a path that looks local and does not exist.
    """

    def __init__(self, given: Any, *, tokenizer: Any = None) -> None:
        is_model = isinstance(given, nn.Module) and hasattr(given, "config")
        if not isinstance(given, str | Path) and not is_model:
            raise ModelError(
                "a transformers model is quantized, or one by its directory or hub name; got"
                f" {type(given).__name__}. Single tensors: microscale.quantize_tensor"
            )
        self.path = given if isinstance(given, str | Path) else None
        self._given: Any = given
        self._tokenizer = tokenizer
        model: Any = given if is_model else nn.Module()
        lost = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if lost is not None:
            raise ModelError(
                f"{lost} has no numbers here: it lies on meta, as parts of a model do that device_map keeps on disk."
                " Load the model whole, or give its directory, with --offload where it is larger than memory"
            )
        if self.path is not None and not is_gguf(self.path):
            check_not_missing(self.path)

    def __str__(self) -> str:
        return str(getattr(self._given, "name_or_path", "") if self.path is None else self.path)

    def tokenizer(self) -> Any:
        """Return the tokenizer that was given, or the one beside the model; None where none can be loaded."""
        if self._tokenizer is None and str(self):
            try:
                self._tokenizer = load_tokenizer(base_of(str(self)) if is_adapter(str(self)) else str(self))
            except (ModelError, CheckpointError):
                return None
        return self._tokenizer

    def outline(self) -> Any | None:
        """Return the model without its weights, or the model in memory; None where only loading tells what is wrong.

        Raises:
            CheckpointError: damaged files.
        """
        return self._given if self.path is None else outline_model(self.path)

    def whole(self) -> Any:
        """Return the model with all its weights.

        Raises:
            CheckpointError, ModelError: see :func:`microscale.integrations.loading.load_original`.
        """
        return self._given if self.path is None else load_original(self.path)

    def layers(self, *, part: str) -> LayerFile | None:
        """Return what reads the decoder layers of a file one by one, None for a model in memory.

        Raises:
            CheckpointError, ModelError: see :class:`microscale.integrations.layerwise.LayerFile`.
        """
        return None if self.path is None else LayerFile(self.path, part=part)

    def identity(self) -> str:
        """Return what tells the model from another: tables and times of files, or a digest of all numbers."""
        return weights_identity(self._given) if self.path is None else files_identity(self.path)
