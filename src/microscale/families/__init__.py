"""What a model is made of: one record for each architecture family."""

from microscale.families.decoders import DECODER_FAMILIES, DecoderFamily

__all__ = ["DECODER_FAMILIES", "DecoderFamily"]
