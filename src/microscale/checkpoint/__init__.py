"""Files: validating reader, atomic writer, our layout and those of other tools. Knows no modules."""

from microscale.checkpoint.compressed_tensors import ACTIVATION_EQUIVALENTS
from microscale.checkpoint.reader import CheckpointReader, read_json
from microscale.checkpoint.registry import (
    READABLE_METHODS,
    WRITABLE_LAYOUTS,
    choose_layout,
    describe,
    layout_named,
    read_stored_layers,
)
from microscale.checkpoint.schema import FileLayout, TensorInfo
from microscale.checkpoint.writer import check_target, check_text_target, write_directory, write_json, write_text_file

__all__ = [
    "ACTIVATION_EQUIVALENTS",
    "READABLE_METHODS",
    "WRITABLE_LAYOUTS",
    "CheckpointReader",
    "FileLayout",
    "TensorInfo",
    "check_target",
    "check_text_target",
    "choose_layout",
    "describe",
    "layout_named",
    "read_json",
    "read_stored_layers",
    "write_directory",
    "write_json",
    "write_text_file",
]
