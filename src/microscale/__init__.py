"""microscale: language models in microscaling (MX) formats.

>>> import torch, microscale
>>> packed = microscale.quantize_tensor(torch.tensor([[1.0, 2.5, -0.3, 6.0]]), "mxfp4")
>>> microscale.dequantize_tensor(packed).tolist()
[[1.0, 2.0, -0.5, 6.0]]

Whole models: :func:`quantize`, :func:`save`, :func:`load`. Jobs, with the words of the command line: ``allocate``,
``analyze``, ``bench``, ``compare``, ``evaluate``, ``explain``, ``generate``, ``inspect``, ``methods``, ``study``,
``tasks``. Formats: :mod:`microscale.formats`, so the command ``formats`` has no function of that name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microscale.version import __version__

if TYPE_CHECKING:
    import torch

    from microscale.formats import NAMED_FORMATS, Format, format_name, parse_format
    from microscale.jobs.allocate import AllocateResult
    from microscale.jobs.analyze import AnalyzeResult
    from microscale.jobs.bench import BenchResult
    from microscale.jobs.compare import CompareResult
    from microscale.jobs.evaluate import EvaluateResult
    from microscale.jobs.generate import GenerateResult
    from microscale.jobs.methods import MethodsResult
    from microscale.jobs.study import StudyResult
    from microscale.jobs.tasks import FoundTask
    from microscale.kernels import dequantize as dequantize_tensor
    from microscale.kernels import fake_quantize
    from microscale.kernels import quantize as quantize_tensor
    from microscale.planning.explain import Explanation
    from microscale.planning.inspection import Inspection
    from microscale.recipes.recipe import Recipe
    from microscale.tensor import QuantizedTensor

    allocate: Callable[..., AllocateResult]
    analyze: Callable[..., AnalyzeResult]
    bench: Callable[..., BenchResult]
    compare: Callable[..., CompareResult]
    evaluate: Callable[..., EvaluateResult]
    explain: Callable[..., Explanation]
    generate: Callable[..., GenerateResult]
    inspect: Callable[..., Inspection]
    methods: Callable[..., MethodsResult]
    study: Callable[..., StudyResult]
    tasks: Callable[..., tuple[FoundTask, ...]]

__all__ = [
    "NAMED_FORMATS",
    "Format",
    "QuantizedTensor",
    "__version__",
    "allocate",
    "analyze",
    "bench",
    "compare",
    "dequantize_tensor",
    "evaluate",
    "explain",
    "fake_quantize",
    "format_name",
    "generate",
    "inspect",
    "load",
    "load_tokenizer",
    "methods",
    "parse_format",
    "quantize",
    "quantize_attention",
    "quantize_tensor",
    "save",
    "study",
    "tasks",
]


_LAZY = {
    "NAMED_FORMATS": ("microscale.formats", "NAMED_FORMATS"),
    "Format": ("microscale.formats", "Format"),
    "format_name": ("microscale.formats", "format_name"),
    "parse_format": ("microscale.formats", "parse_format"),
    "dequantize_tensor": ("microscale.kernels", "dequantize"),
    "fake_quantize": ("microscale.kernels", "fake_quantize"),
    "quantize_tensor": ("microscale.kernels", "quantize"),
    "QuantizedTensor": ("microscale.tensor", "QuantizedTensor"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used, so that the command line starts at once.

    What is neither defined here nor in :data:`_LAZY` is a job, whose front :mod:`microscale.jobs.front` makes.
    """
    if name in _LAZY:
        module, attribute = _LAZY[name]
        value = getattr(importlib.import_module(module), attribute)
    elif name in __all__:
        job = getattr(importlib.import_module(f"microscale.jobs.{name}"), name)
        value = importlib.import_module("microscale.jobs.front").front(job)
    else:
        raise AttributeError(f"module 'microscale' has no attribute {name!r}")
    globals()[name] = value
    return value


def quantize(model: Any, format: str | Sequence[str] | Recipe | None = None, **options: Any) -> Any:
    """Quantize a language model; returns the model, whose linear layers now hold packed weights.

    The model comes back ready for the fastest kernels, its parameters frozen.

    ``model`` is a transformers model (changed in place), a directory or a hub name. ``format`` is a format's name or
    spec, or a whole :class:`~microscale.recipes.recipe.Recipe`. The other options are those of ``microscale quantize``,
    under the same words (:class:`~microscale.jobs.quantize_options.QuantizeOptions`):

    - ``activations``: format of the layers' inputs; ``attention`` and ``kv_cache`` round the rest, see
      :func:`quantize_attention`.
    - ``include``, ``exclude``: lists of globs or roles; the output head and embeddings stay as they are unless
      included. ``rules``: a list of ``GLOB=WEIGHTS[/ACTIVATIONS]``. ``recipe``: a YAML file with all of this.
    - ``method``: ``auto`` chooses among formats (``format`` lists them; None: the usual ones) for every layer, so that
      the weights take ``bits`` on average and the model suffers least; ``auto+gptq`` rounds by another method. With
      methods that have a budget of their own (``micromix``) ``bits`` is that budget. ``effort``: of method ``best``.
    - ``calibration``, for methods that learn from inputs (``microscale methods`` lists them): a text file, JSON lines,
      the name of a dataset, a list of texts, or token ids [samples, tokens] (tensor or array); ``samples`` windows of
      ``window`` tokens are drawn by ``seed``. ``calibration_field`` holds the text in JSON lines and datasets.
      ``tokenizer`` defaults to the one beside the model. ``feed`` ``original`` measures every decoder layer on what
      the unquantized model gives, not on what the quantized layers before it give. ``observer`` measures static
      activation ranges (default: ``mse``).
    - ``offload``: a directory where the inputs of the decoder layers and all finished layers are kept: the same call
      goes on there after an interruption. A model given as a directory is then read layer by layer, so that it may be
      larger than memory; methods that work on the whole model refuse.
    - ``output``: also write the checkpoint there, as the command does. ``layout`` (``auto``, ``compressed-tensors``,
      ``quark``, ``gpt-oss``, ``microscale``): activations follow the rules of that file layout, ``gpt-oss`` quantizes
      the experts alone; without ``output`` and ``layout`` the formats are executed exactly as asked.
    - ``part``: ``language``, ``vision``, ``audio``, ``connector`` or ``all`` of a model that also sees or hears.
      ``nan``: ``raise`` or ``poison``.
    - ``device``: where it is computed, ``cpu``, ``cuda``, ``cuda:1`` …; layers come there one by one.
    - ``progress``: called with (done, total, what is at hand); or a Reporter (:mod:`microscale.jobs.reporting`), which
      also hears what a job with calibration will take.

    What runs otherwise than asked, or changes nothing, is said as warnings of
    :class:`~microscale.errors.QuantizationNote`.

    Raises:
        MicroscaleError: every problem has a class of its own in :mod:`microscale.errors`.
    """
    from microscale.jobs.front import run_job
    from microscale.jobs.quantize import quantize as job
    from microscale.nn.inference import prepare_for_inference

    done = run_job(job, {"model": model, "format": format, **options}, depth=2).model
    prepare_for_inference(done)
    return done


def quantize_attention(model: Any, *, attention: str | None = None, kv_cache: str | None = None) -> Any:
    """Round the attention of a transformers model from now on; returns the model, which is changed in place.

    ``attention`` is the format of what enters its two products: queries and keys in blocks along the head,
    probabilities and values in blocks along the keys. ``kv_cache`` is that of keys and values as they are stored, in
    blocks along the head. None for both takes the roundings back. The model may be quantized or not; :func:`save`
    keeps the formats of a quantized one. Everything is simulated: rounded, then stored and computed with as floats.

    Raises:
        FormatError: no such format, or one that attention cannot be rounded to.
        ModelError: a family that does not call transformers' attention interface.
    """
    from microscale.jobs.attention import round_attention
    from microscale.nn.attention_setting import AttentionFormats

    return round_attention(model, AttentionFormats.parse(attention, kv_cache))


def load(path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """Load a model, quantized by microscale or another tool or not at all; packed weights stay packed.

    ``trust_remote_code``: run the code that the model's directory holds; without it such a model is refused.

    Raises:
        CheckpointError, ModelError: missing, damaged, or of a layout that is not read.
    """
    from microscale.integrations.loading import load_model
    from microscale.integrations.remote_code import trusting

    with trusting(trust_remote_code):
        return load_model(path, dtype=dtype)


def save(
    model: Any,
    path: str | Path,
    *,
    layout: str = "auto",
    tokenizer: Any = None,
    overwrite: bool = False,
    check: bool = True,
) -> str:
    """Write a quantized model to a new directory, atomically; returns the layout that was written.

    ``auto`` writes the layout of compressed-tensors where that expresses exactly what the model executes, else ours.
    The files beside the weights of the model's source (processors, templates, code) are copied. ``check``: transformers
    opens the directory before it takes its name.

    Raises:
        LayoutError: the layout cannot hold a layer.
        CheckpointWriteError: the directory exists, or the disk is full, or what was written cannot be loaded; nothing
            half-written is left.
    """
    from microscale.integrations.saving import save_model

    return save_model(model, path, layout=layout, tokenizer=tokenizer, overwrite=overwrite, check=check)


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: there is none.
    """
    from microscale.integrations.loading import load_tokenizer as load_from

    return load_from(path)


def _tell_options() -> None:
    """Give :func:`quantize` a signature with all of its options, for help and editors."""
    from microscale.jobs.front import signature_of
    from microscale.jobs.quantize_options import QuantizeOptions

    quantize.__signature__ = signature_of(QuantizeOptions, positional=("format",))  # type: ignore[attr-defined]


_tell_options()
