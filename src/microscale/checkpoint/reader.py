"""CheckpointReader: a directory of safetensors read tensor by tensor, with errors that say what is wrong.

The headers are validated before anything is read: the files listed by the index exist, hold the tensors that it
promises, and no tensor stands in two files. Truncated and overlapping data are refused by safetensors itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microscale.checkpoint.file_bytes import read_tensor
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError, CheckpointNotFoundError, counted
from microscale.formats.dtypes import named_dtype

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointNotFoundError: the file is absent.
        CheckpointError: it is not valid JSON or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path} does not exist; give the directory of a Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def read_all(file: Path) -> dict[str, Tensor]:
    """Read all tensors of one safetensors file.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _data_offsets(file: Path) -> dict[str, int]:
    """Return where each tensor's bytes begin in a safetensors file whose header safetensors has accepted."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = cast("dict[str, Any]", json.loads(handle.read(length)))
    return {
        name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"
    }


class CheckpointReader:
    """The tensors and the config of one checkpoint directory; tensors are read only when asked for.

    Raises:
        CheckpointNotFoundError: no such directory, or no config.json or safetensors files in it.
        CheckpointError: a damaged file or an index that contradicts the files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointNotFoundError(f"{self.path} is not a directory; give the directory of a Hugging Face model")
        self.config = read_json(self.path / CONFIG_NAME)
        self._file_of: dict[str, Path] = {}
        self._offset_of: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._stored = self.infos  # what lies in the files, whatever a reader of another kind makes of it
        self.files = self._files()
        for file in self.files:
            self._read_header(file)
        self._check_index()

    def _files(self) -> list[Path]:
        index_path = self.path / INDEX_NAME
        if not index_path.exists():
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                raise CheckpointNotFoundError(
                    f"{self.path} holds no safetensors file; microscale reads {WEIGHTS_NAME}, or {INDEX_NAME} and its"
                    " shards"
                )
            return [self.path / WEIGHTS_NAME] if self.path / WEIGHTS_NAME in files else files
        weight_map = read_json(index_path).get("weight_map")
        found = cast("dict[str, Any]", weight_map) if isinstance(weight_map, dict) else {}
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise CheckpointError(f"{index_path} has no weight_map that names the shards; the checkpoint is damaged")
        names = sorted(set(cast("dict[str, str]", found).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index_path} points outside the checkpoint: {name!r}")
            if not (self.path / name).exists():
                raise CheckpointError(f"{self.path / name} is missing, but {INDEX_NAME} lists it; download it again")
        return [self.path / name for name in names]

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                    if name in self._file_of:
                        raise CheckpointError(
                            f"tensor {name!r} stands in both {self._file_of[name].name} and {file.name}"
                        )
                    view = handle.get_slice(name)
                    dtype = _DTYPES.get(str(view.get_dtype()))
                    if dtype is None:
                        raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {view.get_dtype()}")
                    self._file_of[name] = file
                    self.infos[name] = TensorInfo(dtype=dtype, shape=tuple(view.get_shape()))
            self._offset_of.update(_data_offsets(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({error}); it is truncated or damaged: copy it again"
            ) from None

    def _check_index(self) -> None:
        index_path = self.path / INDEX_NAME
        if not index_path.exists():
            return
        promised = cast("dict[str, str]", read_json(index_path)["weight_map"])
        absent = [name for name, file in promised.items() if self._file_of.get(name) != self.path / file]
        if absent:
            raise CheckpointError(
                f"{index_path} promises {counted(len(absent), 'tensor')} that are not there, e.g. {absent[0]!r}"
            )

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor into memory of its own, cast to ``dtype`` on the way where one is given.

        Raises:
            CheckpointError: there is no tensor of this name, or its data cannot be read.
        """
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; the checkpoint is incomplete")
        info = self._stored[name]
        try:
            return read_tensor(file, self._offset_of[name], info.dtype, info.shape, as_dtype=dtype)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error})") from None

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of config.json, or None for an unquantized checkpoint."""
        found = self.config.get("quantization_config")
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{self.path / CONFIG_NAME}: quantization_config must be an object, got {found!r}")
        return cast("dict[str, Any] | None", found)

    @property
    def dtype(self) -> torch.dtype:
        """The float type that config.json declares, first in its ``microscale`` object (bfloat16 without any)."""
        note = self.config.get("microscale")
        recorded = cast("dict[str, Any]", note).get("dtype") if isinstance(note, dict) else None
        name = str(recorded or self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        dtype = named_dtype(name)
        if dtype is None:
            raise CheckpointError(f"{self.path / CONFIG_NAME}: unknown dtype {name!r}")
        return dtype
