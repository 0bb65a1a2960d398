"""Options that several jobs share, each written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from microscale.jobs.option import MODEL, TOKENIZER, WORD, Option, Options, Place

if TYPE_CHECKING:
    from torch import Tensor

    from microscale.calibration.chats import Chat
    from microscale.formats import WrittenWeights

    RoundedWord = str | WrittenWeights
    Source = str | Path | Sequence[str | Chat] | Tensor
    """What is calibrated on: a text file, JSON lines or a dataset by name; texts or chats; token ids."""
else:
    Source = RoundedWord = Any

Seed = Annotated[int, Option(help="Seed of everything random.", minimum=0, maximum=2**63 - 1)]
TrustRemoteCode = Annotated[
    bool, Option(help="Run the code that a model's directory holds; without it such a model is refused.")
]
Device = Annotated[
    str | None, Option(help="Where it is computed: cpu, cuda, cuda:1 … (default: where a loaded model lies, else cpu).")
]
DtypeWord = Annotated[str, Option(help="Float type of the computation.")]
CHECKPOINT_HELP = "Checkpoint directory (quantized or not), or hub name."
CheckpointModel = Annotated[Any, Option(help=CHECKPOINT_HELP, place=Place.ARGUMENT, command_type=str, kind=MODEL)]
"""A model as it is scored or generates, quantized or not: where it lies, in Python also the model itself."""
OriginalModel = Annotated[
    Any,
    Option(
        help="Directory or hub name of a transformers causal language model.", place=Place.ARGUMENT, command_type=str
    ),
]
"""An unquantized model: where it lies, in Python also the model itself."""
Tokenizer = Annotated[
    Any,
    Option(help="What reads the text (default: the tokenizer beside the model).", place=Place.PYTHON, kind=TOKENIZER),
]
TaskData = Annotated[Path | None, Option(help="Folder with the tasks' files; without it they come from the hub.")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionOptions(Options):
    """What attention is rounded to, simulated in floats; None says nothing of a side."""

    attention: Annotated[
        RoundedWord | None,
        Option(
            help="Round what enters the products of attention to this format, simulated in floats"
            " (none: leave it; default: as the recipe or the checkpoint says).",
            command_type=str | None,
            kind=WORD,
        ),
    ] = None
    kv_cache: Annotated[
        RoundedWord | None,
        Option(help="Round keys and values as they are stored, likewise.", command_type=str | None, kind=WORD),
    ] = None

    @property
    def words(self) -> tuple[RoundedWord | None, RoundedWord | None]:
        """Both sides, as :meth:`microscale.nn.AttentionFormats.parse` takes them."""
        return self.attention, self.kv_cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextOptions(Options):
    """What a model is measured on (``source``; None: nothing), and how much of it."""

    source: Annotated[
        Source | None,
        Option(
            help="Text file, JSON lines or dataset name to calibrate on.", word="calibration", command_type=str | None
        ),
    ] = None
    field: Annotated[
        str, Option(help="Field of JSON lines or of a dataset that holds the text.", word="calibration_field")
    ] = "text"
    samples: Annotated[int, Option(help="Windows of calibration text.", minimum=1)] = 128
    window: Annotated[int, Option(help="Tokens in a window, BOS included.", minimum=2)] = 2048
    seed: Seed = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationOptions(TextOptions):
    """What a quantized model is calibrated on, and how.

    ``observer`` is what a user named for static ranges; None: the default, where there are any.
    """

    feed: Annotated[
        str, Option(help="What a layer is measured on: quantized (layers before it, default) or original.")
    ] = "quantized"
    experts: Annotated[
        str,
        Option(
            help="Which tokens an expert is measured on: routed (those it is sent, default) or all.",
            word="calibrate_experts",
        ),
    ] = "routed"
    observer: Annotated[
        str | None, Option(help="Of static activation ranges: minmax, percentile(99.9), mse (default), kl …")
    ] = None
