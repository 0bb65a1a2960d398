"""Structures of real models: each linear named once, groups that read one input, the order of execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from family_models import CONFIGS, family_model, run
from microscale.errors import ModelError
from microscale.families.look_up import block_names, describe
from microscale.families.modules import is_linear, linear_names
from microscale.families.structure import BlockStructure, Fold, NormKind
from microscale.nn.experts import unstack_experts

NAMES = list(CONFIGS)


def parts_of(name: str) -> list[str]:
    return ["language", "vision", "all"] if name == "qwen2_5_vl" else ["language"]


CASES = [(name, part) for name in NAMES for part in parts_of(name)]
EXPERT_FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
CASES_APART = [*CASES, *((f"{name}/apart", "language") for name in EXPERT_FAMILIES)]


def build(name: str) -> Any:
    """Return a model; ``NAME/apart`` has its experts taken apart."""
    family, _, state = name.partition("/")
    model = family_model(family)
    if state:
        assert unstack_experts(model)
    return model


def watch(model: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Run the model once; return the linears in order of execution, and the first input of each."""
    order: list[str] = []
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in inputs:
                order.append(name)
                inputs[name] = args[0].detach().clone()

        return note

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules() if is_linear(module)
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return order, inputs


@pytest.mark.parametrize(("name", "part"), CASES_APART)
def test_every_linear_of_a_block_is_named_once(name: str, part: str) -> None:
    model = build(name)
    structure = describe(model, part)
    assert structure.is_known and structure.part == part
    assert structure.family == model.config.model_type
    for block in structure.blocks:
        named = [linear for group in block.groups for linear in group.linears]
        assert sorted(named) == sorted(linear_names(model.get_submodule(block.name)))


@pytest.mark.parametrize(("name", "part"), CASES_APART)
def test_groups_read_one_input_and_stand_in_order_of_execution(name: str, part: str) -> None:
    model = build(name)
    structure = describe(model, part)
    order, inputs = watch(model)
    executed: list[str] = []
    for block in structure.blocks:
        for group in block.groups:
            names = [f"{block.name}.{linear}" for linear in group.linears]
            executed.append(names[0])
            places = [order.index(each) for each in names]
            assert places == sorted(places)
            for other in names[1:]:
                assert torch.equal(inputs[other].flatten(0, -2), inputs[names[0]].flatten(0, -2))
    assert executed == [linear for linear in order if linear in executed]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_no_two_groups_of_a_block_read_the_same(name: str, part: str) -> None:
    model = build(name)
    _, inputs = watch(model)
    for block in describe(model, part).blocks:
        firsts = [inputs[f"{block.name}.{group.linears[0]}"].flatten(0, -2) for group in block.groups]
        for place, one in enumerate(firsts):
            assert not any(one.shape == other.shape and torch.equal(one, other) for other in firsts[:place])


@pytest.mark.parametrize(("name", "part"), CASES_APART)
def test_every_other_name_is_there(name: str, part: str) -> None:
    model = build(name)
    structure = describe(model, part)
    matrices = {matrix for matrix, _ in model.named_parameters(remove_duplicate=False)}
    modules = {module for module, _ in model.named_modules()}
    assert set(structure.embeddings) <= modules and set(structure.entries) <= matrices
    assert structure.final_norm in {*modules, None} and structure.head in {*modules, None}
    for block in structure.blocks:
        inner = {f"{block.name}.{matrix}" for matrix in block.writers}
        inner |= {f"{block.name}.{matrix}" for norm in block.norms for matrix in norm.readers}
        assert inner <= matrices and block.writers
        for fold in folds(block):
            model.get_submodule(f"{block.name}.{fold.name}")


def folds(block: BlockStructure) -> list[Fold]:
    return [group.fold for group in block.groups if group.fold is not None]


EXPECTED_FOLDS = {
    "opt": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm", "mlp.down": "linear"},
    "opt-after": {"attention.out": "value", "mlp.down": "linear"},
    "opt-gelu": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm"},
    "olmo2": {"attention.out": "value", "mlp.down": "linear"},
    "starcoder2": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm"},
    "phi": {"attention.qkv": "norm", "attention.out": "value"},
    "gpt2": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm"},
    "gpt_neox": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm"},
    "gpt_neox-serial": {"attention.qkv": "norm", "attention.out": "value", "mlp.up": "norm"},
}
GATED = {"attention.qkv": "norm", "attention.out": "value", "mlp.gate_up": "norm", "mlp.down": "linear"}
ATTENTION = {"attention.qkv": "norm", "attention.out": "value"}
SHARED = ATTENTION | {"moe.shared.gate_up": "norm", "moe.shared.down": "linear"}


@pytest.mark.parametrize(("name", "part"), CASES)
def test_folds(name: str, part: str) -> None:
    for block in describe(family_model(name), part).blocks:
        found = {group.role: group.fold.kind.value for group in block.groups if group.fold is not None}
        expected = EXPECTED_FOLDS.get(name, GATED)
        if "mlp.experts.down_proj" in block.writers:  # the layers whose experts are still stacked
            expected = SHARED if name == "qwen2_moe" else ATTENTION
        assert found == expected


def test_rows_of_fused_projections() -> None:
    def rows(name: str, role: str) -> tuple[int, ...]:
        block = describe(family_model(name)).blocks[0]
        fold = next(group.fold for group in block.groups if group.role == role)
        assert fold is not None and fold.rows is not None
        return fold.rows.indices

    assert rows("llama", "attention.out") == tuple(range(16))  # 2 heads of 8
    assert rows("phi3", "attention.out") == tuple(range(32 + 16, 64))  # behind 4 query heads and 2 key heads
    assert rows("phi3", "mlp.down") == tuple(range(48, 96))  # up stands behind gate
    assert rows("gpt2", "attention.out") == tuple(range(64, 96))
    of_each_head = [range(24 * head + 16, 24 * head + 24) for head in range(4)]
    assert rows("gpt_neox", "attention.out") == tuple(row for head in of_each_head for row in head)


def test_readers_of_a_norm_before_experts() -> None:
    for name, readers in {
        "mixtral": {"mlp.gate.weight", "mlp.experts.gate_up_proj"},
        "qwen3_moe": {"mlp.gate.weight", "mlp.experts.gate_up_proj"},
        "qwen2_moe": {
            "mlp.gate.weight",
            "mlp.experts.gate_up_proj",
            "mlp.shared_expert.gate_proj.weight",
            "mlp.shared_expert.up_proj.weight",
            "mlp.shared_expert_gate.weight",
        },
    }.items():
        norms = {norm.name: norm.readers for norm in describe(family_model(name)).blocks[0].norms}
        assert set(norms["post_attention_layernorm"]) == readers


def test_kinds_of_norms() -> None:
    kinds = {name: describe(family_model(name)).norm for name in ("llama", "gemma", "gemma2", "gemma3", "opt", "gpt2")}
    plus_one = NormKind.RMS_PLUS_ONE
    assert kinds == {
        "llama": NormKind.RMS,
        "gemma": plus_one,
        "gemma2": plus_one,
        "gemma3": plus_one,
        "opt": NormKind.LAYER,
        "gpt2": NormKind.LAYER,
    }


def test_rotation_obstacles() -> None:
    free = {name for name in NAMES if describe(family_model(name)).rotation_obstacle is None}
    assert set(NAMES) - free == {"gemma2", "gemma3", "olmo2", "opt-after"}
    vision = family_model("qwen2_5_vl")
    assert describe(vision, "vision").rotation_obstacle and describe(vision, "all").rotation_obstacle


def test_parts_of_a_model_with_vision() -> None:
    model = family_model("qwen2_5_vl")
    blocks = {part: [block.name for block in describe(model, part).blocks] for part in ("language", "vision", "all")}
    assert blocks["vision"] == ["model.visual.blocks.0", "model.visual.blocks.1"]
    assert blocks["language"] == ["model.language_model.layers.0", "model.language_model.layers.1"]
    assert blocks["all"] == blocks["vision"] + blocks["language"]


def test_all_of_a_text_model_is_its_language_part() -> None:
    model = family_model("llama")
    assert describe(model, "all").blocks == describe(model).blocks


def test_parts_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="no vision part"):
        describe(family_model("llama"), "vision")
    with pytest.raises(ModelError, match="possible: language, vision, audio, connector, all"):
        describe(family_model("llama"), "sound")


def test_a_norm_that_is_not_there() -> None:
    """StableLM with parallel sub-layers has one norm for both, which its record does not say."""
    structure = describe(family_model("stablelm", use_parallel_residual=True))
    assert not structure.is_known and structure.rotation_obstacle


def test_a_family_with_vision_and_a_record_of_its_language_alone() -> None:
    text = CONFIGS["gemma3"][1]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    config = transformers.AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    language = describe(model)
    assert language.is_known and {len(block.groups) for block in language.blocks} == {4}
    vision_part = describe(model, "vision")
    assert not vision_part.is_known and len(vision_part.blocks) == 1
    assert all(block.name.startswith("model.vision_tower.") for block in vision_part.blocks)
    assert {block.name for block in describe(model, "all").blocks} == {
        block.name for part in (language, vision_part) for block in part.blocks
    }


class Layer(nn.Module):
    """A layer of a family that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


class Unknown(nn.Module):
    """A model of a family that nobody knows: a large and a small stack, and lists that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.mixed = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(40))
        self.small = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.stack = nn.ModuleList(Layer() for _ in range(2))


def test_an_unknown_family_is_found_by_structure() -> None:
    structure = describe(Unknown())
    assert not structure.is_known and structure.family == "Unknown" and structure.rotation_obstacle
    assert [block.name for block in structure.blocks] == ["stack.0", "stack.1"]
    for block in structure.blocks:
        assert [group.linears for group in block.groups] == [("mix",), *((f"experts.{i}",) for i in range(3))]
        assert all(group.fold is None and group.role == "unknown" for group in block.groups)
    everything = [block.name for block in describe(Unknown(), "all").blocks]
    assert everything == ["small.0", "small.1", "stack.0", "stack.1"]
    with pytest.raises(ModelError, match="no vision part"):
        describe(Unknown(), "vision")
    with pytest.raises(ModelError, match="no list of layers"):
        describe(nn.Linear(2, 2))


def test_a_model_that_is_not_as_its_record_says_is_found_by_structure() -> None:
    model = family_model("llama")
    model.model.layers[1].self_attn.extra = nn.Linear(8, 8)
    structure = describe(model)
    assert not structure.is_known and len(structure.blocks) == 2 and structure.head == "lm_head"
    assert ("self_attn.extra",) in [group.linears for group in structure.blocks[1].groups]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llama", ("model.layers.0", "model.layers.1")),
        ("opt", ("model.decoder.layers.0", "model.decoder.layers.1")),
        ("gpt2", ("transformer.h.0", "transformer.h.1")),
        ("qwen2_5_vl", ("model.language_model.layers.0", "model.language_model.layers.1")),
    ],
)
def test_names_of_decoder_layers(name: str, names: tuple[str, ...]) -> None:
    assert block_names(family_model(name)) == names


def test_layers_have_names_where_their_parts_are_not_as_recorded() -> None:
    """Unlike a description, names need no look inside: a linear that became something else is no obstacle."""
    model = family_model("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    assert not describe(model).is_known and block_names(model) == ("model.layers.0", "model.layers.1")
    model.model.layers = nn.Sequential(*model.model.layers)
    assert block_names(model) == () and block_names(Unknown()) == ()


def test_a_model_without_its_embedding_is_found_by_structure() -> None:
    model = family_model("llama")
    del model.model.embed_tokens
    structure = describe(model)
    assert not structure.is_known and [block.name for block in structure.blocks] == ["model.layers.0", "model.layers.1"]
