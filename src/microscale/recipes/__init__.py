"""The whole model: which layer gets which format and method. The only room that changes a model."""

from microscale.recipes.apply import (
    Progress,
    QuantizationReport,
    ignore_progress,
    quantize_model,
    quantize_module,
    replace_module,
    set_activations,
)
from microscale.recipes.plan import Plan, PlannedLayer, make_plan, quantizable_modules
from microscale.recipes.recipe import Recipe, Rule, load_recipe, make_recipe, matches, parse_rule
from microscale.recipes.study_file import Study, StudyFormat, StudyMethod, StudyModel, StudyTask, load_study

__all__ = [
    "Plan",
    "PlannedLayer",
    "Progress",
    "QuantizationReport",
    "Recipe",
    "Rule",
    "Study",
    "StudyFormat",
    "StudyMethod",
    "StudyModel",
    "StudyTask",
    "ignore_progress",
    "load_recipe",
    "load_study",
    "make_plan",
    "make_recipe",
    "matches",
    "parse_rule",
    "quantizable_modules",
    "quantize_model",
    "quantize_module",
    "replace_module",
    "set_activations",
]
