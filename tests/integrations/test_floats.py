"""What runs packed and what is read as floats, by the config of a directory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from command_line import succeed
from microscale.errors import QuantizationNote
from microscale.integrations.floats import is_packed, tell_of_first_rounding, without_quantization
from small_models import edit_config, save_two_layers


def test_what_runs_packed(tmp_path: Path) -> None:
    source = save_two_layers(tmp_path / "source")
    assert not is_packed(source)
    for layout in ("microscale", "compressed-tensors", "quark"):
        succeed("quantize", source, "-f", "mxfp4", "--layout", layout, "-o", tmp_path / layout)
        assert is_packed(tmp_path / layout)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"format": "int-quantized", "targets": ["Linear"], "weights": weights}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    edit_config(tmp_path / "compressed-tensors", quantization_config=said)
    assert not is_packed(tmp_path / "compressed-tensors")


def test_a_config_and_its_parts_lose_what_they_say() -> None:
    text = SimpleNamespace(quantization_config={"a": 1})
    config = SimpleNamespace(quantization_config={}, sub_configs={"text_config": 0, "other": 0}, text_config=text)
    without_quantization(config)
    assert not hasattr(config, "quantization_config") and not hasattr(text, "quantization_config")


@pytest.mark.parametrize(("count", "said"), [(1, "1 weight of DIR are packed"), (0, "DIR is read as floats")])
def test_the_first_rounding_is_named(count: int, said: str) -> None:
    with pytest.warns(QuantizationNote, match=said):
        tell_of_first_rounding("DIR", count)
