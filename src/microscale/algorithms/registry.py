"""Every step and every named chain: a new method is a file of its own and its line in the table of steps.

Chains and words of efforts are data; what a step needs of others it says by the properties of its contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from microscale.algorithms.autoround import AutoRound
from microscale.algorithms.awq import Awq
from microscale.algorithms.balance import Balance
from microscale.algorithms.batquant import BatQuant
from microscale.algorithms.block_rotation import BlockRotation
from microscale.algorithms.contract import RoundStep, Step
from microscale.algorithms.distill import Distill
from microscale.algorithms.flatquant import FlatQuant
from microscale.algorithms.gptq import Gptq
from microscale.algorithms.hadamard import Hadamard
from microscale.algorithms.low_rank import LowRankStep
from microscale.algorithms.macro_block import MacroBlock
from microscale.algorithms.micromix import MicroMix
from microscale.algorithms.mxplus import MxPlus
from microscale.algorithms.omniquant import OmniQuant
from microscale.algorithms.permute import Permute
from microscale.algorithms.quarot import QuaRot
from microscale.algorithms.refine import Refine
from microscale.algorithms.rtn import Rtn
from microscale.algorithms.scale_rule import ScaleRuleStep
from microscale.algorithms.smoothquant import SmoothQuant
from microscale.algorithms.spinquant import SpinQuant

REGISTERED: dict[str, type[Step]] = {
    step.name: step
    for step in (
        ScaleRuleStep,
        MxPlus,
        QuaRot,
        BlockRotation,
        SpinQuant,
        Distill,
        SmoothQuant,
        Balance,
        Awq,
        MacroBlock,
        Permute,
        Hadamard,
        MicroMix,
        OmniQuant,
        FlatQuant,
        BatQuant,
        AutoRound,
        Rtn,
        Gptq,
        Refine,
        LowRankStep,
    )
}
STEPS: Mapping[str, type[Step]] = MappingProxyType(REGISTERED)
"""Every step by its word, in the order in which they are listed."""

PLAIN: RoundStep = Rtn()
"""What rounds where a chain does not say how."""

BEST = "best"
"""The word that stands for other steps by effort and format."""

AUTO = "auto"
"""The word in the place of a method that stands for an allocation of formats; it is no method itself."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rtn": "rtn",
        "rtn-search": "rtn:search=true",
        "rtn-weighted": "rtn:weighted=true",
        "threshold": "rule+rtn",
        "prescale": "rule:weights=prescale(0.75),activations=prescale(0.75)+rtn",
        "smoothquant": "smoothquant+rtn",
        "awq": "awq+rtn:weighted=true",
        "gptq": "gptq",
        "hadamard": "hadamard+rtn",
        "mr-gptq": "rule+hadamard+gptq",
        "permute": "permute+rtn",
        "mxplus": "mxplus+rtn",
        "micromix": "micromix+rtn",
        "adaptive-2-4": "micromix:wider=(int4/32:fp16:asym,mxfp8)+rtn",
        "lowrank": "rtn+lowrank",
        "macroblock": "rule:weights=threshold(7),activations=threshold(7)+macroblock+rtn",
        "quarot": "quarot+hadamard:size=128,roles=down+gptq",
        "spinquant": "spinquant+hadamard:size=128,roles=down+gptq",
        "omniquant": "omniquant+rtn",
        "flatquant": "flatquant+rtn",
        "batquant": "batquant+gptq",
        "autoround": "autoround+rtn",
        "qad": "rule+distill+rtn",
    }
)
"""Named chains."""

EFFORTS: Mapping[str, str] = MappingProxyType(
    {
        "fast": "rule+balance+hadamard+gptq",
        "good": "rule+balance+hadamard+gptq+refine",
        "max": "rule+balance+hadamard+gptq+refine+refine:epochs=8,rate=0.003",
    }
)
"""The chain of :data:`BEST` at each effort: each goes on from what the one below it found."""

FINE_EFFORTS: Mapping[str, str] = MappingProxyType(
    {effort: chain.replace("rule+balance+hadamard", "balance:size=1") for effort, chain in EFFORTS.items()}
)
"""Where :data:`BEST` differs for formats whose scales are no powers of two: there a rotation of blocks does harm."""

FOLDED_EFFORTS: Mapping[str, str] = MappingProxyType(
    {
        effort: chain.replace("rule+balance+hadamard", "rule:activations=keep+blockrot+balance:size=1")
        for effort, chain in EFFORTS.items()
    }
)
"""The chain of :data:`BEST` for file layouts that hold weights and scales alone: all that it finds goes into weights.

The rule of the inputs' scales stays, for such a layout has one of its own.
"""


def is_method(word: str) -> bool:
    """Whether a chain may begin with a word."""
    return word == BEST or word in STEPS or word in METHODS
