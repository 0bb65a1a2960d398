"""What a long job keeps outside of memory: its finished decoder layers.

A job that is started again with the same model, recipe and text finds what an earlier run finished, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.calibration.cache import ActivationStore
from microscale.formats import parse_activation, parse_format, spec_text
from microscale.layer_spec import LayerSpec
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module
from microscale.recipes.calibration import Calibration, Feed
from microscale.recipes.plan import PlannedLayer
from microscale.recipes.recipe import Recipe
from microscale.transforms import parse_transform

ONLINE = "__online__"
"""In the state of a layer: which formats and transforms its modules have, as JSON in bytes."""


def open_store(
    directory: str | Path | None, identity: str, recipe: Recipe, calibration: Calibration | None
) -> ActivationStore:
    """Return the store of a job; ``identity`` names the model's weights and our version (None: all in memory).

    Raises:
        CalibrationError: the directory cannot be used.
    """
    text: dict[str, object] = {"identity": identity, "recipe": recipe.model_dump(mode="json")}
    if calibration is not None:
        windows = calibration.windows.to(device="cpu", dtype=torch.int64).contiguous()
        text["windows"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        text["shape"] = list(windows.shape)
        text["batch"], text["seed"] = calibration.batch, calibration.seed
        text["is_sequential"] = calibration.feed is Feed.QUANTIZED
        text["experts"] = calibration.experts.value
    return ActivationStore(directory, json.dumps(text, sort_keys=True))


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """Return all that a finished decoder layer consists of, to be given to :func:`restore_layer`."""
    online = {
        name: {
            "transforms": [str(transform) for transform in spec.transforms],
            "format": spec_text(spec.format),
            "activations": None if spec.activations is None else str(spec.activations),
        }
        for name, module in layer.named_modules()
        if isinstance(module, QuantizedLinear) and (spec := module.layer_spec(name))
    }
    state: dict[str, Tensor] = dict(layer.state_dict())
    state[ONLINE] = torch.tensor(list(json.dumps(online).encode()), dtype=torch.uint8)
    return state


def restore_layer(model: nn.Module, name: str, state: Mapping[str, Tensor], layers: Mapping[str, PlannedLayer]) -> None:
    """Make a decoder layer what it was when its state was taken; ``layers`` are the planned ones by full name."""
    online = json.loads(bytes(state[ONLINE].tolist()))
    for module_name, planned in layers.items():
        if not module_name.startswith(f"{name}."):
            continue
        inner = module_name.removeprefix(f"{name}.")
        side = state.get(f"{inner}.low_rank.down")
        own = online[inner]
        spec = LayerSpec(
            name=module_name,
            format=parse_format(own["format"]),
            shape=planned.shape,
            dtype=planned.dtype,
            activations=None if own["activations"] is None else parse_activation(own["activations"]),
            method=planned.method,
            kind=planned.kind,
            transforms=tuple(parse_transform(word) for word in own["transforms"]),
            low_rank=0 if side is None else side.shape[0],
            has_bias=f"{inner}.bias" in state,
        )
        replace_module(model, module_name, QuantizedLinear(spec, device="meta"))
    layer = model.get_submodule(name)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # Copies, for what comes from a file does not begin where torch would let it.
    found = {key: value.to(device, copy=True) for key, value in state.items() if key != ONLINE}
    layer.load_state_dict(found, assign=True)
