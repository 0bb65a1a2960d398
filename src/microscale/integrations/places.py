"""Where the tensors of a file stand in a model, and which of them have no place there.

transformers renames and joins tensors while it loads them, and leaves out in silence what a class says that it ignores
(layers that predict several tokens, towers of another modality). Names are compared here, so that nothing is lost
without a word: what has no place is copied, as it is, into what we write.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from microscale.checkpoint.float_reader import open_floats
from microscale.checkpoint.reader import CheckpointReader
from microscale.errors import counted
from microscale.layer_spec import LayerSpec
from microscale.nn.sizes import Size

ATTRIBUTE = "microscale_leftover"
"""Under which name a model keeps what of its file has no place in it."""


def places_of(names: Iterable[str], model: Any, places: Mapping[str, Any]) -> dict[str, str | None]:
    """Return where in a model the tensors of its file go, by name; None: transformers has no place for it.

    ``places`` are the names of the model's tensors.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    found: dict[str, str | None] = {}
    for key in sorted(names, key=dot_natural_key):  # some rules hang on the order
        place, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(places))
        if place not in places and key in places:
            place, _ = rename_source_key(key, [], [], model.base_model_prefix, dict(places))
        found[key] = place if place in places else None
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """The tensors of a checkpoint that its model has no place for."""

    path: Path
    names: tuple[str, ...]
    size: Size

    def __str__(self) -> str:
        return f"{counted(len(self.names), 'tensor')} ({self.size.num_bytes:,} bytes), e.g. {self.names[0]!r}"

    def load(self) -> dict[str, Tensor]:
        """Read them.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        reader = open_floats(self.path)
        return {name: reader.load(name) for name in self.names}

    @property
    def linears(self) -> list[str]:
        """The names of what must be linear layers among them, for readers that have a place for them."""
        return sorted(name.removesuffix(".weight") for name in self.names if name.endswith("proj.weight"))


def find_leftover(reader: CheckpointReader, names: Iterable[str], model: nn.Module) -> Leftover | None:
    """Return what of a checkpoint, among ``names``, has no place in the model that was made of it.

    Tables that the model computes anew (frequencies of rotary positions, masks) are no loss.
    """
    places = model.state_dict(keep_vars=True)
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | {"inv_freq", "masked_bias"}
    lost = [name for name, place in places_of(names, model, places).items() if place is None]
    lost = [name for name in lost if name.rpartition(".")[2] not in computed]
    if not lost:
        return None
    infos = [reader.infos[name] for name in lost]
    size = Size(
        num_weights=sum(math.prod(info.shape) for info in infos), num_bytes=sum(info.num_bytes for info in infos)
    )
    return Leftover(path=reader.path, names=tuple(lost), size=size)


def note_leftover(model: nn.Module, leftover: Leftover | None) -> None:
    """Remember with a model what of its file has no place in it, and say so."""
    model.__dict__[ATTRIBUTE] = leftover
    if leftover is not None:
        warnings.warn(
            f"{type(model).__name__} has no place for {leftover} of {leftover.path}: they take no part in what it"
            " computes, and are copied as they are into what is written",
            stacklevel=3,
        )


def keep_all(model: Any, local: Path | None, known: Iterable[str] = ()) -> Any:
    """Note what of its directory has no place in a model; returns the model. None: it came from elsewhere.

    ``known`` are tensors that are used in another way.
    """
    if local is not None and any(local.glob("*.safetensors")):
        reader = open_floats(local)
        note_leftover(model, find_leftover(reader, set(reader.infos).difference(known), model))
    return model


def leftover_of(model: nn.Module) -> Leftover | None:
    """Return what of its file has no place in a model, where that is known."""
    return model.__dict__.get(ATTRIBUTE)


def settle_tying(config: Any, packed: dict[str, LayerSpec], state: Mapping[str, Any]) -> None:
    """Tie a head that a file leaves out to its packed embedding; a packed head that it holds is tied to nothing."""
    heads = [name for name in packed if name.rpartition(".")[2] == "lm_head"]
    embeddings = [name for name, layer in packed.items() if layer.kind == "embedding"]
    if embeddings and not heads and config.tie_word_embeddings and "lm_head.weight" not in state:
        source = packed[embeddings[0]]
        packed["lm_head"] = dataclasses.replace(source, name="lm_head", kind="linear", tied_to=source.name)
    elif heads or embeddings:
        config.tie_word_embeddings = False
