"""The options of ``quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from microscale.jobs.option import WORD, Option, Options, Place
from microscale.jobs.shared_options import (
    AttentionOptions,
    CalibrationOptions,
    Device,
    OriginalModel,
    Tokenizer,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from microscale.algorithms.pipeline import Method
    from microscale.formats import Format, Written, WrittenInputs
    from microscale.recipes.recipe import Recipe

    FormatOrRecipe = str | Sequence[str] | Written[Format] | Recipe
    """A format's name or spec, for method ``auto`` a list of them, or a whole recipe."""
    InputsWord = str | WrittenInputs
    MethodWord = str | Method
else:
    FormatOrRecipe = InputsWord = MethodWord = Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecipeOptions(Options):
    """The words that a recipe is made of, or a recipe; what is None has the default of a recipe."""

    format: Annotated[
        FormatOrRecipe | None,
        Option(
            help="Format of the weights: name or spec (method auto: a list).",
            short="-f",
            command_type=str | None,
            kind=WORD,
        ),
    ] = None
    activations: Annotated[
        InputsWord | None,
        Option(
            command_type=str | None, kind=WORD, help="Format of the layer inputs (default: not quantized).", short="-a"
        ),
    ] = None
    rounding: AttentionOptions = field(default_factory=AttentionOptions)
    include: Annotated[
        Sequence[str], Option(help="Glob of layers left out by default (lm_head, embedding; tied, one means both).")
    ] = ()
    exclude: Annotated[Sequence[str], Option(help="Glob of layers to leave alone (a --rule wins over it).")] = ()
    rules: Annotated[
        Sequence[str],
        Option(help="GLOB=WEIGHTS[/ACTIVATIONS] for some layers; later ones win; 'none' leaves alone.", flag="--rule"),
    ] = ()
    file: Annotated[Path | None, Option(help="YAML file with all of this instead.", word="recipe")] = None
    method: Annotated[
        MethodWord | None,
        Option(
            command_type=str | None,
            kind=WORD,
            help="Method or chain of steps, see `microscale methods` (default: rtn).",
        ),
    ] = None
    bits: Annotated[float | None, Option(help="Budget for each weight, of method auto, micromix or adaptive-2-4.")] = (
        None
    )
    effort: Annotated[str | None, Option(help="Of method best: fast (default, no gradients), good or max.")] = None
    part: Annotated[
        str | None, Option(help="Of a model that sees or hears: language (default), vision, audio, connector or all.")
    ] = None
    layout: Annotated[
        str | None, Option(help="auto (default), compressed-tensors, quark, gpt-oss (its experts alone) or microscale.")
    ] = None
    nan: Annotated[str | None, Option(help="Non-finite weights: raise (default) or poison.")] = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizeOptions(Options):
    """Which model is quantized by which recipe, on which text, and where the checkpoint goes (None: nowhere).

    Without a checkpoint the formats are executed exactly as asked where no layout is named.
    """

    model: OriginalModel
    output: Annotated[Path | None, Option(help="Directory to write.", short="-o", place=Place.REQUIRED)] = None
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    offload: Annotated[
        Path | None,
        Option(
            help="Directory for layer inputs and finished layers: the model is read layer by layer, and the same"
            " command goes on after an interruption."
        ),
    ] = None
    overwrite: Annotated[bool, Option(help="Replace the output directory.")] = False
    max_shard_size: Annotated[str, Option(help="Largest file, e.g. 5GB.")] = "5GB"
    check: Annotated[bool, Option(help="Open what was written with transformers before it takes its name.")] = True
    tokenizer: Tokenizer = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
