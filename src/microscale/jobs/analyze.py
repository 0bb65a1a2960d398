"""Describe a model's numbers: weights and inputs of every layer, the error of each format, and what suits, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microscale.calibration.cache import ActivationStore
from microscale.checkpoint.writer import check_text_target, write_text_file
from microscale.errors import CalibrationError, ModelError, counted
from microscale.integrations.layerwise import LayerFile
from microscale.integrations.loading import load_original
from microscale.integrations.originals import Original
from microscale.jobs.analyze_page import MassiveText, analysis_page, massive_values
from microscale.jobs.calibration import checked_source, read_windows
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import AnalyzeOptions
from microscale.layerwise.devices import chosen_device
from microscale.layerwise.loader import LayerSource
from microscale.nn.experts import unstack_experts
from microscale.planning.analysis import ModelAnalysis, analyze_model
from microscale.planning.candidates import Candidate, parse_candidates
from microscale.planning.verdict import Verdict, judge
from microscale.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeResult:
    """What was found in a model; ``massive`` tells its massive values in words.

    ``verdict`` is what it comes to (None where nothing was compared), ``command`` what to run next.
    """

    candidates: tuple[Candidate, ...]
    analysis: ModelAnalysis
    massive: tuple[MassiveText, ...]
    verdict: Verdict | None
    command: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return all numbers in one object."""
        found = self.analysis
        return {
            "tokens": found.num_tokens,
            "formats": [candidate.text for candidate in self.candidates],
            "layers": [dataclasses.asdict(layer) for layer in found.layers],
            "curve": [dataclasses.asdict(point) for point in found.curve],
            "recommendations": [dataclasses.asdict(one) for one in found.recommendations],
            "verdict": None if self.verdict is None else self.verdict.sentence,
            "command": self.command,
            "histograms": [dataclasses.asdict(one) for one in found.histograms],
            "seconds": self.seconds,
        }


def analyze(options: AnalyzeOptions, reporter: Reporter = SILENT) -> AnalyzeResult:
    """Describe weights and inputs of every layer and the error of each format, and recommend formats with reasons.

    The layers of a local directory of safetensors files are read one at a time.

    Raises:
        CalibrationError: nothing to look at the inputs of layers with.
        FormatError, TextError, ModelError, CheckpointError: what the options name cannot be used.
        DependencyError: a page without jinja2.
    """
    if options.output is not None:
        check_text_target(options.output)
    device = chosen_device(options.device)
    started = time.perf_counter()
    candidates = parse_candidates(options.formats)
    text = dataclasses.replace(options.calibration, source=checked_source(options.calibration.source))
    if text.source is None:
        raise CalibrationError("analysis looks at the inputs of layers: give --calibration FILE")
    original, layers = _opened(options.model)
    tokenizer = Original(options.model).tokenizer()
    given = read_windows(text, tokenizer, original)
    with (
        _gradient_store() if options.gradients else contextlib.nullcontext() as store,
        reporter.stage("analyzing") as advance,
    ):
        found = analyze_model(
            original,
            candidates,
            given,
            source=layers,
            gradients=store,
            target_db=options.target,
            progress=advance,
            device=device,
        )
    verdict = judge(found, candidates, options.target)
    source = text.source if isinstance(text.source, str | Path) else "TEXT"
    result = AnalyzeResult(
        candidates=candidates,
        analysis=found,
        verdict=verdict,
        command="" if verdict is None else verdict.command(options.model, str(source)),
        massive=tuple(massive_values(found, given.windows.shape[0], _token_text(tokenizer, given.windows))),
        seconds=time.perf_counter() - started,
    )
    if options.output is not None:
        write_text_file(options.output, _page(options, result))
    return result


def _page(options: AnalyzeOptions, result: AnalyzeResult) -> str:
    found = result.analysis
    facts = {
        "model": str(options.model),
        "text": f"{options.calibration.source}, {counted(found.num_tokens, 'token')}",
        "layers": str(len(found.layers)),
        "target": f"{options.target:g} dB",
        "verdict": "" if result.verdict is None else result.verdict.sentence,
        "next": result.command,
        "microscale": __version__,
        "time": f"{result.seconds:.1f} s",
    }
    title = f"{Path(options.model).name}: analysis of numbers"
    return analysis_page(title, found, facts, result.candidates, result.massive)


def _opened(model: str) -> tuple[Any, LayerSource | None]:
    """Return a model without its decoder layers and what reads those one by one, or else the whole model."""
    if any(Path(model).glob("*.safetensors*")):
        with contextlib.suppress(ModelError):  # the whole model says what is wrong, if anything is
            layers = LayerFile(model)
            layers.read(layers.names[0])
            original = layers.model()
            unstack_experts(original)
            return original, layers
    original = load_original(model)
    unstack_experts(original)
    return original, None


@contextlib.contextmanager
def _gradient_store() -> Generator[ActivationStore, None, None]:
    """Keep the inputs of all layers on disk inside the block."""
    with tempfile.TemporaryDirectory(prefix="microscale-") as folder:
        yield ActivationStore(folder, "gradients")


def _token_text(tokenizer: Any, windows: Any) -> Callable[[int, int], str]:
    def text(window: int, place: int) -> str:
        return str(tokenizer.decode([int(windows[window, place])]))

    return text
