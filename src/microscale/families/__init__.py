"""What a model is made of: one record for each architecture family, and what it says about a model at hand."""

from microscale.families.batch import Batch, run_model
from microscale.families.decoders import DECODER_FAMILIES, DecoderFamily
from microscale.families.look_up import PARTS, block_names, describe, is_inside, vision_roots
from microscale.families.modules import is_linear, is_transposed, linear_names
from microscale.families.records import FAMILIES
from microscale.families.structure import (
    BlockStructure,
    Fold,
    FoldKind,
    LinearGroup,
    ModelStructure,
    NormKind,
    NormReaders,
    Rows,
    Signs,
)

__all__ = [
    "DECODER_FAMILIES",
    "FAMILIES",
    "PARTS",
    "Batch",
    "BlockStructure",
    "DecoderFamily",
    "Fold",
    "FoldKind",
    "LinearGroup",
    "ModelStructure",
    "NormKind",
    "NormReaders",
    "Rows",
    "Signs",
    "block_names",
    "describe",
    "is_inside",
    "is_linear",
    "is_transposed",
    "linear_names",
    "run_model",
    "vision_roots",
]
