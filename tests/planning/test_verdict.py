"""What an analysis comes to: the narrowest format within the target, or the most exact one, and the next command."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from microscale.planning.analysis import CurvePoint
from microscale.planning.candidates import parse_candidates
from microscale.planning.verdict import judge

CANDIDATES = parse_candidates("mxfp4,nvfp4/none,mxfp8,none")
BITS = {"mxfp4": 4.25, "nvfp4/none": 4.5, "mxfp8": 8.25, "none": 16.0}


def found(*errors: float, inputs: Any = None) -> Any:
    curve = [
        CurvePoint(candidate=name, bits=bits, output_error=error)
        for (name, bits), error in zip(BITS.items(), errors, strict=True)
    ]
    return SimpleNamespace(curve=curve, layers=[SimpleNamespace(inputs=inputs)])


@pytest.mark.parametrize(
    ("errors", "target", "words", "command"),
    [
        (
            (0.02, 0.009, 0.001, 0.0),
            20.0,
            "nvfp4/none (4.50 bits) is the narrowest format tried within 20 dB: it loses 0.9 %",
            "microscale quantize 'my model' -f nvfp4 --method best --calibration a.txt -o OUT",
        ),
        (
            (0.02, 0.02, 0.001, 0.0),
            20.0,
            "mxfp8 (8.25 bits) is the narrowest format tried within 20 dB: it loses 0.1 %",
            "microscale quantize 'my model' -f mxfp8 -a mxfp8 -o OUT",
        ),
        (
            (0.02, 0.03, 0.03, 0.0),
            40.0,
            "no format tried is within 40 dB; mxfp4 (4.25 bits) is the most exact: it loses 2 %",
            "microscale quantize 'my model' -f mxfp4 -a mxfp4 --method best --calibration a.txt -o OUT",
        ),
    ],
)
def test_the_choice(errors: tuple[float, ...], target: float, words: str, command: str) -> None:
    verdict = judge(found(*errors), CANDIDATES, target)
    assert verdict is not None and verdict.sentence.startswith(words)
    assert verdict.command("my model", "a.txt") == command


def test_channels_are_told() -> None:
    inputs = SimpleNamespace(massive=[SimpleNamespace(channel=3), SimpleNamespace(channel=3)], outlier_channels=(3, 5))
    verdict = judge(found(0.001, 0.0, 0.0, 0.0, inputs=inputs), CANDIDATES, 20.0)
    assert verdict is not None and verdict.sentence.endswith(
        "; 1 massive channel, outlier channels in 1 of 1 layer input, which a method tames."
    )


def test_nothing_to_choose() -> None:
    assert judge(found(0.0, 0.0, 0.0, 0.0), parse_candidates("none"), 20.0) is None
