"""The files that lie beside a model's weights: what reads text, images and sound, templates, code, a licence.

A directory that we write holds all of them, byte for byte, so that whatever worked with the source works with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from microscale.checkpoint.float_reader import MODELOPT_CONFIG
from microscale.checkpoint.reader import CONFIG_NAME, read_json
from microscale.errors import CheckpointError

WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".pkl",
    ".npz",
)
"""How the names of files with weights end, in any library's form."""

NOT_OURS = (
    CONFIG_NAME,
    "README.md",
    ".gitattributes",
    MODELOPT_CONFIG,
    "quantize_config.json",
    "quant_config.json",
)
"""What speaks of the source and not of what is written."""


def source_directory(model: Any) -> Path | None:
    """Return the directory that a model was read from, where it is still there: local or in the hub's cache."""
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    path = Path(name)
    if not path.is_dir():
        found = try_to_load_from_cache(name, CONFIG_NAME) if name.count("/") <= 1 and not path.exists() else None
        path = Path(found).parent if isinstance(found, str) else path
    try:
        family = read_json(path / CONFIG_NAME).get("model_type")
    except CheckpointError:
        return None
    return path if family == getattr(model.config, "model_type", None) else None


def files_beside(source: Path) -> Iterator[Path]:
    """Yield the files of a model's directory that hold no weights, by their path below it.

    Hidden folders are left out, and so are links that lead out of the directory (of the hub's cache: out of its files).
    """
    whole = source.resolve()
    homes = (whole, whole.parent.parent / "blobs")
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in inner.parts[:-1])
        if is_hidden or not path.is_file() or path.name in NOT_OURS or path.name.endswith(WEIGHTS):
            continue
        if any(path.resolve().is_relative_to(home) for home in homes):
            yield inner


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy the files beside a model's weights; what the target has already stays. Returns the names of those copied."""
    copied: list[str] = []
    for inner in files_beside(source):
        place = target / inner
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / inner, place)
            copied.append(inner.as_posix())
    return copied
