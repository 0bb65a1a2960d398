"""Parts of models that see or hear: every module belongs to exactly one of them, whatever the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from family_models import family_model
from microscale.errors import ModelError
from microscale.families.look_up import describe
from microscale.families.modules import is_linear
from microscale.families.parts import PARTS, check_part, is_inside, is_of_part, part_of, part_roots

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 96,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT = TOWER | {"image_size": 16, "patch_size": 4}


def meta_model(family: str, **entries: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **entries)
    visual: Any = transformers.AutoModelForImageTextToText
    auto: Any = transformers.AutoModel
    with torch.device("meta"):
        return (visual if type(config) in visual._model_mapping else auto).from_config(config)


def llava() -> Any:
    text = TEXT | {"model_type": "llama"}
    return meta_model("llava", text_config=text, vision_config=SIGHT | {"model_type": "clip_vision_model"})


def audio() -> Any:
    heard = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    heard |= {"encoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 20}
    return meta_model("qwen2_audio", text_config=TEXT | {"model_type": "qwen2"}, audio_config=heard)


def mistral3() -> Any:
    sight = SIGHT | {"model_type": "pixtral", "head_dim": 16}
    return meta_model("mistral3", text_config=TEXT | {"model_type": "mistral"}, vision_config=sight)


def internvl() -> Any:
    sight = SIGHT | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]}
    return meta_model("internvl", text_config=TEXT | {"model_type": "qwen2"}, vision_config=sight)


ROOTS = [
    (llava, {"vision": ("model.vision_tower",), "connector": ("model.multi_modal_projector",)}),
    (audio, {"audio": ("audio_tower",), "connector": ("multi_modal_projector",)}),
    (mistral3, {"vision": ("model.vision_tower",), "connector": ("model.multi_modal_projector",)}),
    (internvl, {"vision": ("model.vision_tower",), "connector": ("model.multi_modal_projector",)}),
    (
        lambda: family_model("qwen2_5_vl"),
        {"vision": ("model.visual",), "connector": ("model.visual.merger",)},
    ),
]


@pytest.mark.parametrize(("make", "roots"), ROOTS)
def test_the_parts_are_found_by_structure(make: Any, roots: dict[str, tuple[str, ...]]) -> None:
    model = make()
    assert part_roots(model) == roots
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    by_part = {part: [name for name in linears if is_of_part(name, part, roots)] for part in PARTS}
    assert sum(len(by_part[part]) for part in PARTS if part != "all") == len(linears) == len(by_part["all"])
    assert all(part_of(name, roots) == "language" for name in linears if name.endswith("lm_head"))
    present = [part for part in PARTS if by_part[part]]
    assert set(present) == {"language", "all", *roots}
    for part in present:
        check_part(model, part)
        assert all(is_of_part(block.name, part, roots) for block in describe(model, part).blocks)


def test_a_model_of_text_is_language() -> None:
    model = family_model("llama")
    assert part_roots(model) == {} and part_roots(nn.Linear(1, 1)) == {}
    with pytest.raises(ModelError, match=r"no audio part; its parts: language$"):
        check_part(model, "audio")
    with pytest.raises(ModelError, match="'eyes' of a model is unknown"):
        check_part(model, "eyes")


def test_modules_inside_others() -> None:
    assert is_inside("a.b", ["a"]) and is_inside("a.b", ["x", "a.b"]) and is_inside("a.b.c", ["a.b"])
    assert not is_inside("ab", ["a"]) and not is_inside("a", ["a.b"]) and not is_inside("a", [])
