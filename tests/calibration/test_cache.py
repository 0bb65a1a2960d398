"""The store of layer inputs: what comes back, what survives an interruption, and what is never used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.calibration.cache import ActivationStore
from microscale.errors import CalibrationError


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    return ActivationStore(None if request.param == "memory" else tmp_path / "deep" / "er", "job")


def batch(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 5, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(store: ActivationStore, layer_idx: int, batches: int = 3) -> None:
    for batch_idx in range(batches):
        store.put(layer_idx, batch_idx, batch(100 * layer_idx + batch_idx))
    store.finish_layer(layer_idx)


def files_of(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(f"*/{pattern}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 5, 8), (), (0, 4), (3,)])
def test_tensors_come_back_as_they_were(store: ActivationStore, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = batch(0, dtype, shape)
    store.put(0, 1, value)
    found = store.get(0, 1)
    assert found.dtype == dtype and found.shape == value.shape and torch.equal(found, value)


def test_views_and_gradients(store: ActivationStore) -> None:
    value = batch(0).requires_grad_().transpose(0, 2)[1:]
    value[0, 0, 0].data.fill_(math.nan)
    store.put(0, 0, value)
    found = store.get(0, 0)
    assert not found.requires_grad and found.untyped_storage().nbytes() == value.numel() * 4
    assert torch.equal(found.nan_to_num(7.0), value.detach().nan_to_num(7.0))


def test_the_order_of_work(store: ActivationStore) -> None:
    assert store.last_complete_layer() is None
    store.put(0, 0, batch(0))
    assert store.last_complete_layer() is None  # not finished
    fill(store, 0)
    assert store.last_complete_layer() == 0 and store.num_batches(0) == 3
    store.put_state(0, {"mlp.weight/codes": batch(1), "bias": batch(2)})
    store.put(1, 0, batch(9))
    assert store.last_complete_layer() == 0
    fill(store, 1)
    store.drop(0)
    assert store.last_complete_layer() == 1 and store.num_batches(0) == 0
    assert torch.equal(store.get(1, 2), batch(102))
    state = store.state(0)
    assert list(state) == ["mlp.weight/codes", "bias"] and torch.equal(state["bias"], batch(2))
    store.put(1, 1, batch(3))  # changed after all: no longer complete
    assert store.last_complete_layer() is None
    store.clear()
    assert store.last_complete_layer() is None and store.num_batches(1) == 0


def test_what_is_not_there(store: ActivationStore) -> None:
    with pytest.raises(CalibrationError, match="holds no 4"):
        store.get(2, 4)
    with pytest.raises(CalibrationError, match="result of layer 3 is not stored"):
        store.state(3)
    with pytest.raises(CalibrationError, match="known of all layers is not stored"):
        store.facts()
    store.drop(17)


def test_facts_are_complete_at_once(store: ActivationStore) -> None:
    store.put_facts({"is_tuple": True, "kinds": ["full", None]})
    assert store.facts() == {"is_tuple": True, "kinds": ["full", None]}
    store.clear()
    with pytest.raises(CalibrationError, match="known of all layers is not stored"):
        store.facts()


def test_an_interrupted_job_goes_on(tmp_path: Path) -> None:
    first = ActivationStore(tmp_path, "job")
    first.put_facts({"is_tuple": False})
    fill(first, 0)
    first.put_state(0, {"w": batch(7)})
    fill(first, 1)
    first.drop(0)
    first.put(2, 0, batch(8))  # interrupted here
    second = ActivationStore(tmp_path, "job")
    assert second.last_complete_layer() == 1 and second.facts() == {"is_tuple": False}
    assert torch.equal(second.get(1, 2), batch(102)) and torch.equal(second.state(0)["w"], batch(7))
    with pytest.raises(CalibrationError, match="holds no 0 of this job"):
        second.get(2, 0)
    fill(second, 2)
    assert ActivationStore(tmp_path, "job").last_complete_layer() == 2


def test_another_job_in_the_same_directory_is_not_seen_nor_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    one, other = ActivationStore(tmp_path, "one"), ActivationStore(tmp_path, "other")
    fill(one, 3)
    assert other.last_complete_layer() is None
    fill(other, 1)
    other.clear()
    assert ActivationStore(tmp_path, "one").last_complete_layer() == 3
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_foreign_folder_under_our_name_is_not_used(tmp_path: Path) -> None:
    one, other = ActivationStore(tmp_path, "one"), ActivationStore(tmp_path, "other")
    fill(one, 0)
    assert one.path is not None and other.path is not None
    (one.path / "inputs-0000").rename(other.path / "inputs-0000")
    fresh = ActivationStore(tmp_path, "other")
    assert fresh.last_complete_layer() is None
    with pytest.raises(CalibrationError, match="holds no 0 of this job"):
        fresh.get(0, 0)
    fill(fresh, 0, batches=1)
    assert fresh.num_batches(0) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_shape(path: Path) -> None:
    found = json.loads(path.read_text())
    found["manifest"]["tensors"]["0"]["shape"] = [8, 5, 2]
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("0.bin", flip),
        ("1.bin", Path.unlink),
        ("2.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("manifest.json", Path.unlink),
        ("manifest.json", flip),
        ("manifest.json", change_shape),
        ("manifest.json", lambda path: path.write_text(path.read_text()[:40])),
        ("manifest.json", lambda path: path.write_text("[]")),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
)
def test_damage_is_seen(name: str, damage: Any, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "job")
    fill(store, 0)
    fill(store, 1)
    damage(files_of(tmp_path, f"inputs-0001/{name}")[0])
    again = ActivationStore(tmp_path, "job")
    assert again.last_complete_layer() == 0
    fill(again, 1)
    assert ActivationStore(tmp_path, "job").last_complete_layer() == 1


def test_a_damaged_tensor_is_never_returned(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "job")
    fill(store, 0)
    flip(files_of(tmp_path, "inputs-0000/1.bin")[0])
    with pytest.raises(CalibrationError, match=r"1\.bin is damaged"):
        store.get(0, 1)
    assert torch.equal(store.get(0, 0), batch(0))


def test_a_damaged_state_takes_the_later_layers_with_it(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "job")
    fill(store, 0)
    store.put_state(0, {"w": batch(7)})
    fill(store, 1)
    flip(files_of(tmp_path, "state-0000/0.bin")[0])
    again = ActivationStore(tmp_path, "job")
    assert again.last_complete_layer() == 0
    with pytest.raises(CalibrationError, match="result of layer 0 is not stored, or is damaged"):
        again.state(0)


def test_a_place_that_cannot_hold_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CalibrationError, match=r"file cannot hold activations: "):
        ActivationStore(tmp_path / "file", "job")


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore(tmp_path, "job")
    fill(store, 0)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(CalibrationError, match=r"inputs-0001 \(No space left on device\); free some space"):
            fill(store, 1)
    again = ActivationStore(tmp_path, "job")
    assert again.last_complete_layer() == 0 and torch.equal(again.get(0, 2), batch(2))
