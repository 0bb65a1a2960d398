"""Importing this module registers microscale with transformers.

After ``import microscale.hf``, ``AutoModelForCausalLM.from_pretrained`` loads checkpoints of our layout and
``save_pretrained`` writes the same bytes back.
"""

from microscale.integrations.hf_quantizer import MicroscaleConfig, MicroscaleQuantizer, register

register()

__all__ = ["MicroscaleConfig", "MicroscaleQuantizer"]
