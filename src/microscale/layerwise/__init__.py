"""The decoder layers of a model, run and measured one at a time: for calibration, methods that learn, and planning."""

from microscale.layerwise.blocks import (
    BlockCall,
    BlockRunner,
    FoundError,
    float32_model,
    removed_after,
    replaced_forward,
    to_float32,
)
from microscale.layerwise.loader import LayerLoader, LayerSource, float32_parameters
from microscale.layerwise.measuring import measure_inputs

__all__ = [
    "BlockCall",
    "BlockRunner",
    "FoundError",
    "LayerLoader",
    "LayerSource",
    "float32_model",
    "float32_parameters",
    "measure_inputs",
    "removed_after",
    "replaced_forward",
    "to_float32",
]
