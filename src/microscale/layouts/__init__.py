"""Where the bits lie: dense bit streams and the parts of a stored tensor."""

from microscale.layouts.bits import pack_bits, row_bytes, unpack_bits
from microscale.layouts.registry import LAYOUTS, Layout, add_layout, find_layout, remove_layout
from microscale.layouts.row_major import PartSpec, matrix_shape, part_specs

__all__ = [
    "LAYOUTS",
    "Layout",
    "PartSpec",
    "add_layout",
    "find_layout",
    "matrix_shape",
    "pack_bits",
    "part_specs",
    "remove_layout",
    "row_bytes",
    "unpack_bits",
]
