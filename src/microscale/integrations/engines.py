"""Who runs a model: the decoder runtime or transformers, behind one small interface; and loading for either.

An engine takes one sequence: ``prefill`` and ``step`` append tokens and give logits, ``reset`` begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from microscale.checkpoint.native import online_infos
from microscale.checkpoint.reader import CheckpointReader
from microscale.checkpoint.registry import read_stored_layers
from microscale.families.batch import Batch
from microscale.families.running import run_model
from microscale.formats.dtypes import dtype_name
from microscale.integrations.decoding import make_decoder, why_not_decoder
from microscale.integrations.hub import check_local
from microscale.integrations.loading import is_gguf, load_model
from microscale.layerwise.devices import wait_for
from microscale.nn.decoder import Decoder

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "penalty_alpha": (),
    "dola_layers": (),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
"""Settings of a generation config that change the tokens, with the values (beside None) under which they do not."""


class Runtime(Enum):
    """Who runs a model."""

    DECODER = "decoder"
    """Our plan of prepared calls (:mod:`microscale.nn.decoder`)."""
    TRANSFORMERS = "transformers"
    """The modules of the model, called by transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderEngine:
    """A model in the decoder runtime; the transformers model it was made of is not needed any more."""

    decoder: Decoder
    config: Any
    generation_config: Any
    runtime: Runtime = Runtime.DECODER
    why_not_decoder: str | None = None

    def reset(self) -> None:
        """Begin a new sequence."""
        self.decoder.reset()

    def prefill(self, tokens: list[int]) -> Float[Tensor, "vocabulary"]:
        """Append tokens; returns the logits after the last one."""
        return self.decoder.prefill(tokens)

    def step(self, token: int) -> Float[Tensor, "vocabulary"]:
        """Append one token; returns the logits after it."""
        return self.decoder.step(token)


class TransformersEngine:
    """A model as transformers runs it, with the reason why the decoder runtime does not."""

    runtime = Runtime.TRANSFORMERS

    def __init__(self, model: Any, why_not_decoder: str) -> None:
        self.model = model
        self.config = model.config
        self.generation_config = model.generation_config
        self.why_not_decoder: str | None = why_not_decoder
        self._cache: Any = None

    def reset(self) -> None:
        """Begin a new sequence."""
        self._cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Float[Tensor, "vocabulary"]:
        """Append tokens; returns the logits after the last one."""
        if self._cache is None:
            self.reset()
        batch = Batch(token_ids=torch.tensor([tokens], device=self.model.device))
        output = run_model(self.model, batch, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        wait_for(logits.device)
        return logits

    def step(self, token: int) -> Float[Tensor, "vocabulary"]:
        """Append one token; returns the logits after it."""
        return self.prefill([token])


Engine = DecoderEngine | TransformersEngine


def make_engine(
    model: Any, *, positions: int, compute_dtype: torch.dtype | None = None, cache_dtype: torch.dtype = torch.float32
) -> Engine:
    """Choose the runtime of a model: the decoder where it computes what transformers would, else transformers.

    ``positions`` is the room of the decoder's cache. ``compute_dtype`` is the float type of the computation (default:
    the model's own); for transformers the model is cast to it, in place.
    """
    dtype = compute_dtype or model.dtype
    reason = why_not_decoded(model, dtype)
    if reason is not None:
        return TransformersEngine(model.to(dtype) if model.dtype != dtype else model, reason)
    decoder = make_decoder(model, positions=positions, cache_dtype=cache_dtype)
    return DecoderEngine(decoder=decoder, config=model.config, generation_config=model.generation_config)


def why_not_decoded(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> str | None:
    """Return why text is not generated in the decoder runtime but by transformers, or None where it is.

    ``dtype`` is the float type of the computation, ``device`` where the model will be (default: where it is).
    """
    if dtype != torch.float32:
        return f"it computes in float32, asked for is {dtype_name(dtype)}"
    return why_not_decoder(model, device) or _generation_refusal(getattr(model, "generation_config", None))


def _generation_refusal(generation_config: Any) -> str | None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if value is not None and value not in neutral:
            return f"the generation config sets {name} = {value}, which only transformers carries out"
    return None


def load_for_decoding(path: str | Path, dtype: torch.dtype) -> Any:
    """Load a model to be computed in ``dtype``; what the file holds in bfloat16 stays so where float32 is asked for.

    The decoder runtime reads bfloat16 weights as the float32 numbers that they are: the same result in half the
    memory. :func:`make_engine` with ``compute_dtype`` casts the model where transformers runs it.

    Raises:
        CheckpointError, ModelError: as :func:`microscale.integrations.loading.load_model`.
    """
    is_narrow = dtype == torch.float32 and _plain_dtypes(path) == {torch.bfloat16}
    return load_model(path, dtype=torch.bfloat16 if is_narrow else dtype)


def _plain_dtypes(path: str | Path) -> set[torch.dtype]:
    """Return the float types of the unquantized tensors in the files of a local directory; nothing for all else."""
    local = None if is_gguf(path) else check_local(path)
    if local is None or not any(local.glob("*.safetensors*")):
        return set()
    reader = CheckpointReader(local)
    consumed: set[str] = set()
    if reader.quantization_config is not None:
        layout, layers = read_stored_layers(reader.config, reader.infos, reader.dtype)
        consumed = {name for layer in layers.values() for name in (*layout.tensor_names(layer), *online_infos(layer))}
    found = {info.dtype for name, info in reader.infos.items() if name not in consumed}
    return {dtype for dtype in found if dtype.is_floating_point}
