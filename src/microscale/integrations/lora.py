"""LoRA over packed weights: PEFT attaches its adapters to our layers.

PEFT asks a list of functions which layer takes an adapter's place; :func:`enable_lora` puts ours in front of the last.
The packed weight stays as it is, and inputs are rounded as the layer does it; the adapter reads the inputs before the
rounding. Source: arXiv 2106.09685; arXiv 2305.14314 (over packed weights).
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from microscale.errors import DependencyError, ModelError
from microscale.nn.linear import QuantizedLinear

MARK = "_microscale_before"
"""Under which name the function that stands for PEFT's own keeps that one."""


def enable_lora() -> None:
    """Let ``peft.get_peft_model`` and ``peft.PeftModel.from_pretrained`` attach LoRA to quantized layers.

    Calling it again changes nothing.

    Raises:
        DependencyError: PEFT is not installed.
    """
    try:
        model: Any = importlib.import_module("peft.tuners.lora.model")
    except ImportError:
        raise DependencyError("peft", extra="lora", purpose="LoRA adapters on quantized layers") from None
    before = model.dispatch_default
    if hasattr(before, MARK):
        return

    def dispatch(target: Any, adapter_name: str, config: Any = None, **options: Any) -> Any:
        found = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(found, QuantizedLinear):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                return _layer_class()(target, adapter_name, config=config, **options)
        return before(target, adapter_name, config=config, **options)

    setattr(dispatch, MARK, before)
    model.dispatch_default = dispatch


def _layer_class() -> type[Any]:
    """Return PEFT's layer with what a packed weight cannot do refused in our words."""
    own: Any = importlib.import_module("peft.tuners.lora.layer")
    if hasattr(own, "_MicroscaleLinear"):
        return own._MicroscaleLinear

    class QuantizedLoraLinear(own.Linear):
        """An adapter beside a packed weight."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refuse: a packed weight is rounded once.

            Raises:
                ModelError: always, with the way to merge.
            """
            raise ModelError(
                "an adapter cannot be merged into packed weights: save it (model.save_pretrained), and give its"
                " directory to `microscale quantize`, which merges it into the float weights of its base"
            )

        def unmerge(self) -> None:
            """Do nothing: nothing was merged."""

    own._MicroscaleLinear = QuantizedLoraLinear
    return QuantizedLoraLinear
