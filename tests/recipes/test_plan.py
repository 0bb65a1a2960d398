"""From model and recipe to a plan: defaults, precedence, layouts, and what is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import microscale
from microscale.errors import LayoutError, ModelError, RecipeError
from microscale.formats import format_name
from microscale.kernels import quantize
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from microscale.recipes.apply import quantize_model
from microscale.recipes.plan import make_plan, quantizable_modules
from microscale.recipes.recipe import make_recipe, parse_rule
from recipe_words import make_rule
from small_models import POSITIONS, VOCABULARY, same_bits


@pytest.mark.parametrize(
    ("role", "endings"),
    [
        ("attention.qkv", {"q_proj", "k_proj", "v_proj"}),
        ("attention.out", {"o_proj"}),
        ("mlp.gate_up", {"gate_proj", "up_proj"}),
        ("mlp.down", {"down_proj"}),
    ],
)
def test_a_role_means_its_layers(load: Callable[..., Any], role: str, endings: set[str]) -> None:
    plan = make_plan(load(), make_recipe(format="mxfp4", rules=(parse_rule(f"{role}=mxfp8"),)))
    wide = {layer.name.rpartition(".")[2] for layer in plan.layers if str(layer.requested_weights) == "mxfp8"}
    assert wide == endings
    left = make_plan(load(), make_recipe(format="mxfp4", exclude=(role,))).layers
    assert not {layer.name.rpartition(".")[2] for layer in left} & endings and left


def test_roles_of_what_is_left_alone_by_default(load: Callable[..., Any]) -> None:
    model = load("gpt_neox", tie_word_embeddings=False)
    plan = make_plan(model, make_recipe(format="mxfp4", include=("lm_head", "embedding")))
    chosen = {model.get_submodule(layer.name) for layer in plan.layers}
    assert model.get_output_embeddings() in chosen and model.get_input_embeddings() in chosen
    make_plan(model, make_recipe(format="mxfp4", rules=(parse_rule("norm=none"),)))
    with pytest.raises(RecipeError, match="norm=none"):
        parse_rule("norm=mxfp8")


def test_layers_that_learn_together_have_one_chain(load: Callable[..., Any]) -> None:
    rules = (parse_rule("*mlp*=nvfp4"),)
    together = make_plan(load(), make_recipe(format="mxfp4", method="best", effort="good", rules=rules))
    assert len({layer.method for layer in together.layers}) == 1 and "refine" in together.layers[0].method
    apart = make_plan(load(), make_recipe(format="mxfp4", method="best", rules=rules))
    assert len({layer.method for layer in apart.layers}) == 2


def planned(
    model: Any, format: str = "mxfp4", *, rules: list[str] | None = None, **fields: Any
) -> dict[str, tuple[str, str]]:
    """Return layer -> (weights, activations) of a plan."""
    parsed = tuple(parse_rule(rule) for rule in rules or [])
    plan = make_plan(model, make_recipe(format=format, rules=parsed, **fields))
    return {layer.name: (format_name(layer.format), str(layer.activations)) for layer in plan.layers}


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_every_linear_layer_but_the_head(load: Callable[..., Any]) -> None:
    for tied in (True, False):
        model = load(tie_word_embeddings=tied)
        found = planned(model)
        assert {name.rsplit(".", 1)[-1] for name in found} == set(LINEARS) and len(found) == 14
        plan = make_plan(model, make_recipe(format="mxfp4"))
        assert plan.unquantized == ("lm_head",)
        assert plan.layout is None and plan.notes == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"include": ("lm_head",)}, {"lm_head"}),
        ({"include": ("embed_tokens",)}, {"model.embed_tokens"}),
        ({"include": ("*",)}, {"lm_head", "model.embed_tokens"}),
        ({"include": ("lm_head",), "exclude": ("lm_*",)}, set()),
        ({"rules": ["lm_head=mxfp8"]}, {"lm_head"}),
        ({"rules": ["*=mxfp8"]}, {"lm_head", "model.embed_tokens"}),
        ({"rules": ["*=mxfp8", "embed_tokens=none"]}, {"lm_head"}),
        ({"include": ("lm_head",), "rules": ["lm_head=none"]}, set()),
    ],
)
def test_heads_and_embeddings_are_asked_for(
    fields: dict[str, Any], expected: set[str], load: Callable[..., Any]
) -> None:
    found = planned(load(), **fields)
    assert {name for name in found if "layers" not in name} == expected


def test_embeddings_have_no_activations(load: Callable[..., Any]) -> None:
    found = planned(load(), include=("*",), activations="mxfp8")
    assert found["model.embed_tokens"] == ("mxfp4", "None")
    assert found["lm_head"] == ("mxfp4", "mxfp8_e4m3")


def test_precedence(load: Callable[..., Any]) -> None:
    """format and activations < exclude < rules in order; a rule without activations keeps those before it."""
    found = planned(
        load(),
        activations="mxfp8",
        exclude=("gate_proj", "up_proj"),
        rules=[
            "*_proj=mxfp6_e2m3",
            "down_proj=mxfp8/mxfp6_e3m2",
            "layers.0.mlp.down_proj=nvfp4",
            "o_proj=mxfp4_plus/none",
            "k_proj=mxfp8",
            "k_proj=none",
            "v_proj=none",
            "layers.1.*.v_proj=mxint8",
        ],
    )
    assert found["model.layers.0.self_attn.q_proj"] == ("mxfp6_e2m3", "mxfp8_e4m3")
    assert found["model.layers.0.mlp.gate_proj"] == ("mxfp6_e2m3", "mxfp8_e4m3")  # a rule wins over exclude
    assert found["model.layers.0.mlp.down_proj"] == ("nvfp4", "mxfp6_e3m2")
    assert found["model.layers.1.mlp.down_proj"] == ("mxfp8_e4m3", "mxfp6_e3m2")
    assert found["model.layers.1.self_attn.o_proj"] == ("mxfp4_plus", "None")
    assert "model.layers.1.self_attn.k_proj" not in found
    assert "model.layers.0.self_attn.v_proj" not in found
    assert found["model.layers.1.self_attn.v_proj"] == ("mxint8", "mxfp8_e4m3")


def test_a_rule_that_names_activations_only_does_not_undo_an_exclusion(load: Callable[..., Any]) -> None:
    recipe = make_recipe(
        format="mxfp4",
        exclude=("up_proj",),
        rules=(make_rule(match="mlp.*", activations="mxfp8"), make_rule(match="lm_head")),
    )
    names = {layer.name: str(layer.activations) for layer in make_plan(load(), recipe).layers}
    assert not any("up_proj" in name or "lm_head" in name for name in names)
    assert names["model.layers.0.mlp.down_proj"] == "mxfp8_e4m3"


def test_format_none_leaves_the_choice_to_the_rules(load: Callable[..., Any]) -> None:
    assert set(planned(load(), "none", rules=["layers.1.mlp.up_proj=mxfp4"])) == {"model.layers.1.mlp.up_proj"}
    with pytest.raises(RecipeError, match="leaves every layer unquantized"):
        planned(load(), "none")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"include": ("head",)}, "'head' matches no layer"),
        ({"exclude": ("down_prj",)}, "down_proj"),
        ({"rules": ["h.0.attn=mxfp8"]}, "layers of this model end in"),
        ({"exclude": ("*",)}, "leaves every layer unquantized"),
        ({"exclude": ("norm",)}, "'norm' matches no layer"),
    ],
)
def test_patterns_that_reach_nothing(fields: dict[str, Any], words: str, load: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=words.replace("*", r"\*")):
        planned(load(), **fields)


def test_what_is_no_model_to_quantize(load: Callable[..., Any]) -> None:
    model = load()
    quantize_model(model, make_recipe(format="mxfp4"))
    with pytest.raises(ModelError, match="quantized already"):
        make_plan(model, make_recipe(format="mxfp8"))
    with pytest.raises(ModelError, match="no linear layers"):
        make_plan(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Embedding(3, 3)), make_recipe(format="mxfp4"))


def test_plain_torch_models_are_quantized_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 3, bias=False))
    before = [module.weight.detach().clone() for module in (model[1], model[3])]  # type: ignore[union-attr]
    report = quantize_model(model, make_recipe(format="mxfp4"))
    assert isinstance(model[0], nn.Embedding)
    for module, weight in zip((model[1], model[3]), before, strict=True):
        assert isinstance(module, QuantizedLinear)
        assert same_bits(module.weight, microscale.dequantize_tensor(quantize(weight, "mxfp4")))
    assert report.num_weights == 48 * 32 + 3 * 48
    assert report.num_bytes == 48 * 32 // 2 + 48 + 3 * 32 + 3 * 2  # rows of 48 are stored as two blocks
    assert report.bits_per_weight == 8 * report.num_bytes / report.num_weights
    assert model(torch.tensor([1, 2])).shape == (2, 3)


KINDS = {
    "llama": 14,
    "qwen3": 14,
    "gemma3_text": 14,
    "opt": 12,
    "gpt_neox": 8,
    "gpt2": 8,
    "mixtral": 8,
}


@pytest.mark.parametrize("family", KINDS)
def test_families(family: str, load: Callable[..., Any]) -> None:
    model = load(family)
    found = planned(model)
    assert len(found) == KINDS[family]
    head = model.get_output_embeddings()
    assert all(model.get_submodule(name) is not head for name in found)


def test_a_conv1d_is_planned_as_the_linear_layer_that_it_is(load: Callable[..., Any]) -> None:
    model = load("gpt2")
    plan = make_plan(model, make_recipe(format="mxfp4"))
    shapes = {layer.name.split(".", 3)[-1]: (layer.kind, layer.shape) for layer in plan.layers if ".0." in layer.name}
    assert shapes == {
        "attn.c_attn": ("conv1d", (192, 64)),
        "attn.c_proj": ("conv1d", (64, 64)),
        "mlp.c_fc": ("conv1d", (256, 64)),
        "mlp.c_proj": ("conv1d", (64, 256)),
    }


def test_embeddings_that_compute_something_else_are_left_alone(load: Callable[..., Any]) -> None:
    """OPT shifts its positions, a table with max_norm rescales its rows: a plain look-up would be another model."""
    opt, llama = load("opt"), load()
    llama.model.embed_tokens.max_norm = 1.0
    assert "model.embed_tokens" not in quantizable_modules(llama)
    with pytest.raises(RecipeError, match=r"'embedding' means model.embed_tokens, .*: Embedding rescales .*max_norm"):
        planned(llama, include=("embedding",))
    assert "model.decoder.embed_positions" not in quantizable_modules(opt)
    notes = make_plan(opt, make_recipe(format="mxfp4", include=("embedding",))).notes
    assert any(note.startswith("model.decoder.embed_positions stays as it is: OPTLearned") for note in notes)
    assert "model.decoder.embed_tokens" in planned(opt, include=("embed_tokens",))


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "gpt2", "mixtral", "llama"])
def test_including_all_gives_the_same_model_up_to_rounding(family: str, load: Callable[..., Any]) -> None:
    """In an 8-bit integer format with small blocks every layer that is replaced still does what it did."""
    tokens = torch.arange(24)[None] % VOCABULARY
    changes = {"num_experts_per_tok": 4} if family == "mixtral" else {}  # no choice that rounding could turn over
    original = load(family, **changes)
    with torch.inference_mode():
        expected = original.float()(input_ids=tokens).logits
        quantized = microscale.quantize(load(family, **changes).float(), "int8/8:fp32", include=["*"])
        found = quantized(input_ids=tokens).logits
    assert sum(isinstance(module, PackedModule) for module in quantized.modules()) > KINDS[family]
    share = 0.07 if family == "gemma3_text" else 0.06  # its tied embedding is rounded too
    assert float((found - expected).abs().max()) < share * float(expected.abs().max())
    assert tokens.shape[1] < POSITIONS


def test_layouts(load: Callable[..., Any]) -> None:
    def plan(**fields: Any) -> Any:
        return make_plan(load(), make_recipe(**fields))

    assert plan(format="mxfp4", layout="auto").layout == "compressed-tensors"
    assert plan(format="mxfp4_plus", layout="auto").layout == "microscale"
    asked = plan(format="mxfp4", activations="mxfp8", layout="auto")
    assert str(asked.layers[0].activations) == "mxfp8_e4m3:even(1)"
    assert str(asked.layers[0].requested_activations) == "mxfp8"
    assert len(asked.notes) == 1 and "mxfp8_e4m3:even(1)" in asked.notes[0]
    for layout in ("microscale", None):
        exact = plan(format="mxfp4", activations="mxfp8", layout=layout)
        assert str(exact.layers[0].activations) == "mxfp8_e4m3" and exact.notes == () and exact.layout == layout
    mixed = plan(format="mxfp4", activations="mxfp8", rules=(parse_rule("o_proj=mxint8"),), layout="auto")
    assert mixed.layout == "microscale" and str(mixed.layers[0].activations) == "mxfp8_e4m3"
    with pytest.raises(LayoutError, match="o_proj"):
        plan(format="mxfp4", rules=(parse_rule("o_proj=mxint8"),), layout="compressed-tensors")
    assert plan(format="mxfp6_e2m3", layout="quark").layout == "quark"
    with pytest.raises(LayoutError, match="quark"):
        plan(format="nvfp4", layout="quark")


@pytest.mark.parametrize("method", ["rtn", "hadamard"])
def test_a_refusal_counts_layers(method: str, load: Callable[..., Any]) -> None:
    """Each layer counts once, whatever stands against it: its format, its activations and its method."""
    recipe = make_recipe(format="mxfp4_plus", activations="nvfp4", method=method, layout="compressed-tensors")
    with pytest.raises(LayoutError) as caught:
        make_plan(load(), recipe)
    assert f"and {14 - 3} more layers" in str(caught.value)
    rules = tuple(parse_rule(f"{name}=mxint8") for name in ("q_proj", "k_proj"))
    with pytest.raises(LayoutError, match=r"and 1 more layer\n"):
        make_plan(load(), make_recipe(format="mxfp4", rules=rules, layout="compressed-tensors"))


def test_the_model_of_the_tests_is_a_transformers_model(load: Callable[..., Any]) -> None:
    assert isinstance(load(), transformers.PreTrainedModel)


def test_recipes_can_be_given_to_the_top_level(tmp_path: Path, load: Callable[..., Any]) -> None:
    recipe = make_recipe(format="mxfp4", rules=(parse_rule("o_proj=mxfp8"),))
    one = microscale.quantize(load(), recipe)
    other = microscale.quantize(load(), "mxfp4", rules=["o_proj=mxfp8"])
    for name, module in one.named_modules():
        if isinstance(module, PackedModule):
            assert same_bits(module.weight, other.get_submodule(name).weight)


def test_a_plan_says_once_which_steps_change_nothing(load: Callable[..., Any]) -> None:
    recipe = make_recipe(format="nvfp4", activations="nvfp4", method="prescale", rules=(parse_rule("o_proj=mxfp4"),))
    (note,) = make_plan(load(), recipe).notes
    assert note.startswith("step rule changes nothing for nvfp4: its block scales are no powers of two")
    assert make_plan(load(), make_recipe(format="mxfp4", method="prescale")).notes == ()
