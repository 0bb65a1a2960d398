"""The model card of what we write: what it is, how it was made, what opens it and what opens it wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microscale.checkpoint.compressed_tensors import CompressedTensorsLayout
from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.checkpoint.native import NativeLayout
from microscale.formats import format_name
from microscale.layer_spec import LayerSpec
from microscale.version import __version__

_OURS = """\
```python
import microscale.hf  # first: without it transformers fills the packed layers with random numbers and only warns
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

or `microscale.load("PATH")`, `microscale eval PATH`, `microscale generate PATH`. The layout is microscale's own
(docs/reference/checkpoint.md there): stock transformers opens it WRONGLY unless `microscale.hf` was imported; vLLM does
not open it.
"""
_OTHERS = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")  # needs {library}
```

or `microscale.load("PATH")`, `microscale eval PATH`, `microscale generate PATH`. Stock transformers expands the weights
to bfloat16; microscale keeps them packed.
"""
_BFLOAT16_ALONE = """
Stock transformers runs it in bfloat16 alone, which config.json says: with `dtype=torch.float32` or float16 the first
forward pass fails inside of compressed-tensors ("expected m1 and m2 to have the same dtype"). microscale runs it in
any.
"""
_KEPT_PACKED = """
With `kernels` and `triton` installed, transformers keeps the experts packed on a GPU.
"""
_LIBRARIES = {
    "compressed-tensors": "pip install compressed-tensors",
    "quark": "pip install amd-quark",
    "gpt-oss": "pip install accelerate",
}


def model_card(model: Any, layers: Mapping[str, LayerSpec], layout: str, about: Sequence[str] = ()) -> str:
    """Return the text of README.md for a quantized model; ``about`` are more lines on how it was made."""
    origin = str(getattr(model, "name_or_path", "") or "")
    is_local = not origin or Path(origin).exists()
    base = Path(origin).name if is_local else origin
    schemes = Counter(
        (
            format_name(layer.format),
            "kept" if layer.activations is None else str(layer.activations),
            layer.method,
        )
        for layer in layers.values()
    )
    head = ["library_name: transformers", "tags:", "- microscale", *(f"- {word}" for word in _tags(schemes))]
    if base and not is_local:
        head = [f"base_model: {base}", "base_model_relation: quantized", *head]
    rows = [f"| {count} | {words[0]} | {words[1]} | {words[2]} |" for words, count in schemes.items()]
    opens = _OURS if layout == NativeLayout.name else _OTHERS.format(library=_LIBRARIES.get(layout, layout))
    opens += {CompressedTensorsLayout.name: _BFLOAT16_ALONE, GptOssLayout.name: _KEPT_PACKED}.get(layout, "")
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {base or type(model).__name__}, quantized",
            "",
            f"{type(model).__name__}, quantized by microscale {__version__}. File layout: {layout}.",
            "",
            "| layers | weights | inputs | method |",
            "|---:|---|---|---|",
            *rows,
            "",
            *(f"- {line}" for line in about),
            *([""] if about else []),
            "What this costs in accuracy is not recorded here: measure it on your own text with",
            "`microscale eval PATH --text TEXT --reference ORIGINAL`.",
            "",
            "## How to load it",
            "",
            opens,
        ]
    )


def _tags(schemes: Mapping[tuple[str, str, str], int]) -> list[str]:
    return sorted({word.partition(":")[0].partition("/")[0] for word, _, _ in schemes})
