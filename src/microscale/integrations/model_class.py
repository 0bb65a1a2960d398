"""Which class of transformers a checkpoint belongs to: the one that its config names, then one that its config suits.

The auto classes of transformers choose by the config's type alone and take the class of text where there are two, so
that a model that sees would lose its eyes without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from microscale.errors import ModelError
from microscale.integrations.remote_code import is_trusted

TEXT, SIGHT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
OTHERS = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM", "AutoModel")
"""Auto classes that are asked in turn, where a config names no class."""


def class_of(config: Any, path: str | Path | None = None) -> Any:
    """Return the class of a config's model: the one that ``architectures`` names, or that of the first auto class.

    Code of the model's own (at ``path``, or where the config came from) has its class where it is trusted.

    Raises:
        ModelError: there is none.
    """
    for name in getattr(config, "architectures", None) or ():
        found: Any = getattr(transformers, str(name), None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and isinstance(config, cast(Any, found).config_class or transformers.PretrainedConfig):
            return found
    sees = "vision_config" in getattr(config, "sub_configs", ())
    for name in (*((SIGHT, TEXT) if sees else (TEXT, SIGHT)), *OTHERS):
        mapping: Any = getattr(getattr(transformers, name, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    own = _own_class(config, path)
    if own is not None:
        return own
    raise ModelError(
        f"transformers {transformers.__version__} has no class for models of the type"
        f" {getattr(config, 'model_type', type(config).__name__)!r}; a newer version may have it"
    )


def class_at(path: str | Path) -> Any:
    """Return the class of the model in a directory or of a hub name.

    Raises:
        ModelError: there is none.
    """
    return class_of(cast(Any, AutoConfig).from_pretrained(path, trust_remote_code=is_trusted()), path)


def _own_class(config: Any, path: str | Path | None) -> Any | None:
    """Return the class that lies in a model's directory, where there is one and its code may run."""
    classes = getattr(config, "auto_map", None) or {}
    place = path or getattr(config, "_name_or_path", None)
    if not is_trusted() or not place:
        return None
    for name in (TEXT, SIGHT, *OTHERS):
        if name in classes:
            return get_class_from_dynamic_module(classes[name], str(place))
    return None
