"""Importing this module registers microscale with transformers.

After ``import microscale.hf``, ``AutoModelForCausalLM.from_pretrained`` loads checkpoints of our layout and
``save_pretrained`` writes the same bytes back. :func:`enable_lora` lets PEFT attach LoRA adapters to quantized layers.
"""

from microscale.integrations.hf_quantizer import MicroscaleConfig, MicroscaleQuantizer, register
from microscale.integrations.lora import enable_lora

register()

__all__ = ["MicroscaleConfig", "MicroscaleQuantizer", "enable_lora"]
