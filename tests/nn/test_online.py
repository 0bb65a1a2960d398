"""What works online in a quantized layer: the same numbers, casts, saving and loading, and damaged files."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from method_problems import random
from microscale.errors import CheckpointError, MicroscaleError
from microscale.formats import parse_activation
from microscale.integrations.saving import mark_quantized
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.kernels.transform import apply_transforms, transform_weight
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module
from microscale.transforms import (
    Transform,
    block_transform,
    hadamard_transform,
    kronecker_transform,
    permute_transform,
    scale_transform,
)
from small_models import edit_tensors, logits, read_tensors, same_bits, save_random_model

COLS = 64
CHAIN: tuple[Transform, ...] = (
    scale_transform(random(COLS).abs() + 0.5),
    permute_transform(torch.randperm(COLS, generator=torch.Generator().manual_seed(1))),
    hadamard_transform(COLS, 32),
    block_transform(torch.eye(32) + 0.1 * random(2, 32, 32), COLS),
    block_transform(torch.eye(16) + 0.1 * random(1, 16, 16), COLS),
    kronecker_transform(torch.eye(4) + 0.1 * random(4, 4), torch.eye(16) + 0.1 * random(16, 16)),
)


def online_linear(weight: torch.Tensor, activations: str | None = "mxfp8", rank: int = 4) -> QuantizedLinear:
    turned = weight.to(torch.float32)
    for transform in CHAIN:
        turned = transform_weight(turned, transform)
    return QuantizedLinear.from_tensor(
        quantize(turned.to(weight.dtype), "mxfp4"),
        activations=None if activations is None else parse_activation(activations),
        method="learned",
        transforms=CHAIN,
        low_rank=(random(rank, COLS, seed=5) * 0.1, random(weight.shape[0], rank, seed=6) * 0.1),
    )


@pytest.mark.parametrize("activations", [None, "mxfp8"])
def test_the_layer_is_its_definition(activations: str | None) -> None:
    layer = online_linear(random(24, COLS, seed=2), activations)
    inputs = random(3, 5, COLS, seed=3)
    turned = apply_transforms(inputs, CHAIN)
    rounded = turned if activations is None else fake_quantize(turned, activations)
    side = turned @ random(4, COLS, seed=5).T * 0.1 @ random(24, 4, seed=6).T * 0.1
    expected = rounded @ dequantize(layer.tensor).T + side
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)
    parts = [part for transform in CHAIN for part in transform.parts.values()]
    assert layer.num_bytes == layer.tensor.num_bytes + sum(4 * part.numel() for part in parts) + 4 * 4 * (COLS + 24)


def test_casts_and_copies_keep_what_is_online() -> None:
    layer = online_linear(random(24, COLS, seed=2))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert all(same_bits(buffer, before[name]) for name, buffer in cast.named_buffers())
    assert cast(random(2, COLS).to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a checkpoint in our layout with every kind of transform, and the model in it."""
    folder = tmp_path_factory.mktemp("online")
    model = microscale.quantize(save_random_model(folder / "plain"), "mxfp4")
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and module.in_features == COLS:
            replace_module(model, name, online_linear(random(module.out_features, COLS, seed=9).to(torch.bfloat16)))
    mark_quantized(model)
    microscale.save(model, folder / "saved")
    return folder / "saved", model


def test_a_checkpoint_brings_back_the_same_numbers(saved: tuple[Path, Any]) -> None:
    path, model = saved
    loaded = microscale.load(path)
    assert same_bits(logits(loaded), logits(model))
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear) and layer.transforms is not None and layer.low_rank is not None
    assert [str(spec) for spec in layer.transforms.specs] == [str(transform.spec) for transform in CHAIN]
    for found, expected in zip(layer.transforms.transforms, CHAIN, strict=True):
        assert all(same_bits(part, expected.parts[name]) for name, part in found.parts.items())


@pytest.mark.parametrize("layout", ["compressed-tensors", "quark"])
def test_other_layouts_have_no_place_for_it(saved: tuple[Path, Any], layout: str, tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match="online transforms"):
        microscale.save(saved[1], tmp_path / "other", layout=layout)


_Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[str, Any]] = {
    "order names a column twice": (f"{_Q}.transforms.1_order", torch.zeros_like),
    "order points outside": (f"{_Q}.transforms.1_order", lambda part: part + 1000),
    "a part is missing": (f"{_Q}.transforms.3_matrix", lambda part: None),
    "a part has another shape": (f"{_Q}.transforms.3_matrix", lambda part: part[:1].clone()),
    "a part has another dtype": (f"{_Q}.transforms.0_scale", lambda part: part.to(torch.bfloat16)),
    "a scale is NaN": (f"{_Q}.transforms.0_scale", lambda part: torch.full_like(part, torch.nan)),
    "a matrix is infinite": (f"{_Q}.transforms.5_left", lambda part: torch.full_like(part, torch.inf)),
    "the side path has another rank": (f"{_Q}.low_rank.down", lambda part: part[:2].clone()),
    "the side path is NaN": (f"{_Q}.low_rank.up", lambda part: torch.full_like(part, torch.nan)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parts_are_refused(saved: tuple[Path, Any], tmp_path: Path, case: str) -> None:
    path = tmp_path / "copy"
    shutil.copytree(saved[0], path)
    name, change = DAMAGE[case]
    edit_tensors(path, **{name.replace(".", "__"): change(read_tensors(path)[name])})
    with pytest.raises(CheckpointError, match=r"q_proj"):
        microscale.load(path)
