"""Load a model without its decoder layers, and each of them alone: for models that are larger than memory.

transformers builds the whole model each time, but gets tensors on ``meta`` for all that is not wanted, so that only
the wanted ones are read; what it does with names, stacked experts and dtypes stays its own matter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from microscale.checkpoint.float_reader import FloatReader, open_floats
from microscale.checkpoint.reader import CheckpointReader
from microscale.errors import ModelError, QuantizationNote
from microscale.families.look_up import describe
from microscale.integrations.adapters import is_adapter
from microscale.integrations.cache_scales import note_stored
from microscale.integrations.floats import is_packed, without_quantization
from microscale.integrations.hub import check_local
from microscale.integrations.loading import (
    LIBRARY_ERRORS,
    build_model,
    is_gguf,
    read_generation_config,
    read_model_config,
)
from microscale.integrations.model_class import class_at
from microscale.integrations.pending import AbsentTensor, PendingTensor
from microscale.integrations.places import find_leftover, note_leftover, places_of


class LayerFile:
    """The checkpoint of a model whose decoder layers are read singly.

    It is a :class:`~microscale.layerwise.loader.LayerSource`.

    ``part`` chooses the layers as :func:`microscale.families.look_up.describe` does; all other weights belong to
    :meth:`model`.

    Raises:
        CheckpointError: missing or damaged files.
        ModelError: no local directory of safetensors files, quantized already, or without a list of equal layers.
    """

    def __init__(self, path: str | Path, *, part: str = "language") -> None:
        local = check_local(path)
        if local is None:
            raise ModelError(f"{path} is no local directory; layers are read one by one from files: download it first")
        if is_packed(local):
            raise ModelError(f"{path} holds packed weights, which are not read one by one: leave --offload out")
        self._reader = open_floats(local)
        if isinstance(self._reader, FloatReader):
            for sentence in self._reader.told:
                warnings.warn(sentence, QuantizationNote, stacklevel=3)
        self._config = read_model_config(local)
        without_quantization(self._config)
        self._dropped: set[str] = set()
        empty = self._build(())
        self.names = tuple(block.name for block in describe(empty, part).blocks)
        self._owners = self._owners_in(empty)

    def model(self) -> Any:
        """Return the model with all weights but those of the layers, which lie on ``meta``."""
        kept = [key for key, owner in self._owners.items() if owner is None]
        model = self._build(kept)
        model.config.name_or_path = model.name_or_path = str(self._reader.path)
        read_generation_config(model, self._reader.path)
        known = note_stored(model, self._reader)
        note_leftover(model, find_leftover(self._reader, self._dropped.difference(known), model))
        return model

    def read(self, name: str) -> nn.Module:
        """Return a decoder layer with its weights, as transformers builds it.

        Raises:
            CheckpointError: a tensor cannot be read.
            ModelError: a weight of it is not in the checkpoint.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said when the model was built
            model = self._build([key for key, owner in self._owners.items() if owner == name])
        layer: nn.Module = model.get_submodule(name)
        absent = [key for key, tensor in layer.state_dict().items() if tensor.is_meta]
        if absent:
            raise ModelError(f"{name}.{absent[0]} cannot be found in {self._reader.path}; load the model as a whole")
        return layer

    def _build(self, wanted: Collection[str]) -> Any:
        """Return the model with some tensors of the checkpoint, and all others on ``meta``."""
        chosen = set(wanted)
        state: dict[str, PendingTensor | AbsentTensor] = {}
        for name, info in self._reader.infos.items():
            if name in chosen:
                state[name] = PendingTensor(dtype=info.dtype, load=functools.partial(self._reader.load, name))
            elif name not in self._dropped:
                state[name] = AbsentTensor(dtype=info.dtype, shape=info.shape)
        return build_model(self._reader.path, self._config, state)

    def _owners_in(self, model: Any) -> dict[str, str | None]:
        """Return, for every tensor of the checkpoint, the decoder layer that it belongs to, or None."""
        owners: dict[str, str | None] = {}
        for key, place in places_of(self._reader.infos, model, model.state_dict()).items():
            if place is None:
                self._dropped.add(key)
                continue
            owners[key] = next((name for name in self.names if place.startswith(f"{name}.")), None)
        return owners


def outline_model(path: str | Path) -> Any | None:
    """Return a model of a directory or hub name with all its modules and no weights (they lie on ``meta``).

    None where transformers cannot build it so: loading it tells why.

    Raises:
        CheckpointError: no such directory, or damaged files.
    """
    if is_gguf(path) or is_adapter(path):
        return None
    check_local(path)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = read_model_config(path)
            without_quantization(config)
            return class_at(path)._from_config(config).eval()
    except (*LIBRARY_ERRORS, ModelError):
        return None


def files_identity(path: str | Path) -> str:
    """Return what tells one checkpoint from another without reading it whole: config, tensor tables, sizes, times."""
    reader = CheckpointReader(path)
    digest = hashlib.sha256(json.dumps(reader.config, sort_keys=True).encode())
    for name, info in sorted(reader.infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape};".encode())
    for file in sorted(reader.path.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns};".encode())
    return f"{reader.path.resolve()} {digest.hexdigest()}"


def weights_identity(model: nn.Module) -> str:
    """Return what tells a model in memory from another: a digest of all its numbers."""
    digest = hashlib.blake2b(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
