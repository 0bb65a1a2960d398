"""What Python and the extension must say alike: the members of their enums, and where the fields of records lie."""

from __future__ import annotations

import ctypes
from enum import Enum, IntEnum

import pytest

from microscale import formats
from microscale.kernels.cpu import enums, native
from microscale.kernels.cpu.descriptors import FormatStruct, NumberStruct
from microscale.kernels.cpu.products import ProductsStruct

if native.NATIVE is None:
    pytest.skip("the compiled CPU kernels are not installed", allow_module_level=True)
NATIVE = native.NATIVE

TWINS = {
    name: kind
    for name, kind in vars(enums).items()
    if isinstance(kind, type) and issubclass(kind, IntEnum) and kind is not IntEnum
}
RECORDS = {"Number": NumberStruct, "Format": FormatStruct, "Products": ProductsStruct}


def test_every_enum_has_its_twin() -> None:
    assert set(NATIVE.enums()) == set(TWINS)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_members_have_the_numbers_of_the_extension(name: str) -> None:
    assert {member.name: member.value for member in TWINS[name]} == NATIVE.enums()[name]


@pytest.mark.parametrize(
    ("ours", "twin"),
    [(formats.Rounding, enums.Rounding), (formats.Extension, enums.Extension)],
    ids=lambda kind: kind.__name__,
)
def test_policies_of_formats_have_the_names_of_the_extension(ours: type[Enum], twin: type[IntEnum]) -> None:
    assert [member.name for member in ours] == [member.name for member in twin]


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_fields_lie_where_the_extension_reads_them(name: str) -> None:
    record = RECORDS[name]
    assert {field: getattr(record, field).offset for field, *_ in record._fields_} == NATIVE.fields()[name]


def test_a_format_has_the_size_that_the_extension_reads() -> None:
    assert ctypes.sizeof(FormatStruct) == NATIVE.FORMAT_BYTES
