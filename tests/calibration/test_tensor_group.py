"""Groups of named tensors, in memory and in a folder: what counts, what survives, and what is never returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microscale.calibration.tensor_group import MANIFEST, FolderGroup, MemoryGroup, TensorGroup, digest, raw_bytes
from microscale.errors import CalibrationError
from small_models import same_bits


@pytest.fixture(params=["memory", "folder"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> TensorGroup:
    return MemoryGroup("the group") if request.param == "memory" else FolderGroup(tmp_path / "a" / "b", "job")


SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])


@pytest.mark.parametrize(
    "tensor",
    [
        SPECIAL,
        SPECIAL.to(torch.bfloat16),
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 5, dtype=torch.float16),
        torch.zeros(2, 0, dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.arange(12).reshape(3, 4).T,
        torch.arange(6.0)[::2],
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_every_bit_comes_back(group: TensorGroup, tensor: Tensor) -> None:
    group.put("x", tensor)
    found = group.get("x")
    assert found.shape == tensor.shape and same_bits(found.reshape(-1), tensor.reshape(-1))


def test_a_group_counts_once_it_is_finished(group: TensorGroup) -> None:
    assert not group.is_finished() and group.names() == [] and group.note() is None
    group.put("b", torch.ones(2))
    group.put("a", torch.zeros(1))
    assert not group.is_finished() and group.names() == ["b", "a"], "in the order in which they came"
    group.finish({"step": [1, None, "x"]})
    assert group.is_finished() and group.note() == {"step": [1, None, "x"]}
    group.put("b", torch.full((3,), 2.0))
    assert not group.is_finished() and group.names() == ["b", "a"]
    assert group.get("b").tolist() == [2.0, 2.0, 2.0]
    group.finish()
    assert group.is_finished() and group.note() is None
    group.drop()
    assert not group.is_finished() and group.names() == []
    group.drop()  # nothing there is no error


def test_an_empty_group_can_be_complete(group: TensorGroup) -> None:
    group.finish("nothing to say")
    assert group.is_finished() and group.names() == [] and group.note() == "nothing to say"


def test_what_is_not_there(group: TensorGroup) -> None:
    with pytest.raises(CalibrationError, match="holds no x"):
        group.get("x")


def test_memory_keeps_a_part_and_not_what_it_is_cut_from() -> None:
    group = MemoryGroup("g")
    large = torch.zeros(1000, requires_grad=True)
    group.put("part", large[:3])
    whole = torch.ones(4)
    group.put("whole", whole)
    assert group.get("part").untyped_storage().nbytes() == 12 and not group.get("part").requires_grad
    assert group.get("whole").data_ptr() == whole.data_ptr(), "a whole tensor is not copied"
    with pytest.raises(CalibrationError, match=r"^g holds no other$"):
        group.get("other")


def made(path: Path, job: str = "job") -> FolderGroup:
    group = FolderGroup(path, job)
    group.put("x", torch.arange(6.0).reshape(2, 3))
    group.put("y", SPECIAL)
    group.finish(["note"])
    return group


def test_a_folder_is_found_again(tmp_path: Path) -> None:
    made(tmp_path)
    again = FolderGroup(tmp_path, "job")
    assert again.is_finished() and again.names() == ["x", "y"] and again.note() == ["note"]
    assert same_bits(again.get("y"), SPECIAL) and again.get("x").shape == (2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "x.bin", "y.bin"], "nothing half written"


def test_an_unfinished_folder_is_empty_to_the_next(tmp_path: Path) -> None:
    made(tmp_path).put("x", torch.zeros(1))
    again = FolderGroup(tmp_path, "job")
    assert not again.is_finished() and again.names() == []
    with pytest.raises(CalibrationError, match="holds no x of this job"):
        again.get("x")


def test_another_job_does_not_count(tmp_path: Path) -> None:
    made(tmp_path)
    assert not FolderGroup(tmp_path, "another").is_finished()


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a damage: the manifest is changed, its digest is not."""

    def damage(path: Path) -> None:
        content = json.loads((path / MANIFEST).read_text())
        change(content["manifest"])
        (path / MANIFEST).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        changed(lambda manifest: manifest["tensors"]["x"].update(shape=[3, 2])),
        changed(lambda manifest: manifest["tensors"]["x"].update(dtype="int32")),
        changed(lambda manifest: manifest.update(note="other")),
        changed(lambda manifest: manifest.update(version=2)),
        changed(lambda manifest: manifest["tensors"].pop("y")),
        lambda path: (path / MANIFEST).write_text("{}"),
        lambda path: (path / MANIFEST).write_text("null"),
        lambda path: (path / MANIFEST).write_text("[" * 100_000),
        lambda path: (path / MANIFEST).write_bytes(b"\xff"),
        lambda path: (path / MANIFEST).unlink(),
    ],
)
def test_a_manifest_that_proves_nothing(damage: Callable[[Path], None], tmp_path: Path) -> None:
    made(tmp_path)
    damage(tmp_path)
    again = FolderGroup(tmp_path, "job")
    assert not again.is_finished() and again.names() == [] and again.note() is None
    assert made(tmp_path).is_finished(), "the job can be done again in its place"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.unlink(), "cannot be read (No such file or directory); start the job again"),
        (lambda file: file.write_bytes(b""), "is damaged: its digest is not the manifest's; start the job again"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\x00"), "is damaged"),
        (lambda file: file.write_bytes(b"\x01" + file.read_bytes()[1:]), "is damaged"),
    ],
)
def test_a_damaged_file_is_never_returned(damage: Callable[[Path], object], problem: str, tmp_path: Path) -> None:
    made(tmp_path)
    damage(tmp_path / "x.bin")
    again = FolderGroup(tmp_path, "job")
    with pytest.raises(CalibrationError) as caught:
        again.get("x")
    assert str(caught.value).startswith(f"{tmp_path / 'x.bin'} ") and problem in str(caught.value)
    assert same_bits(again.get("y"), SPECIAL) and not again.is_finished()


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    group = FolderGroup(tmp_path, "job")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        for write in (lambda: group.put("x", torch.zeros(9)), group.finish):
            with pytest.raises(CalibrationError) as caught:
                write()
            words = f"cannot write to {tmp_path} (No space left on device); free some space or choose another folder"
            assert str(caught.value).startswith(words)
    assert not FolderGroup(tmp_path, "job").is_finished(), "what was to be replaced is not taken for the new"


def test_a_folder_that_cannot_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = made(tmp_path)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(CalibrationError, match=r"cannot write to .* \(Permission denied\)"):
            group.drop()
    assert group.is_finished() and FolderGroup(tmp_path, "job").is_finished(), "it is as it was"


def test_bytes_are_row_major_and_little_endian() -> None:
    assert raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T).tolist() == [1, 0, 3, 0, 2, 0, 4, 0]
    assert raw_bytes(torch.tensor([-0.0, 1.0])).tolist() == [0, 0, 0, 0x80, 0, 0, 0x80, 0x3F]
    assert raw_bytes(torch.zeros(0, 3)).shape == (0,) and raw_bytes(torch.tensor(7, dtype=torch.uint8)).tolist() == [7]


def test_the_digest_is_blake2b_of_16_bytes() -> None:
    assert digest(np.zeros(0, np.uint8)) == "cae66941d9efbd404e4d88758ea67670"
    assert digest(np.frombuffer(b"abc", np.uint8)) == "cf4ab791c62b8d2b2109c90275287816"
