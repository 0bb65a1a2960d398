"""The whole model: which layer gets which format and method. The only room that changes a model."""

from microscale.recipes.apply import (
    Progress,
    QuantizationReport,
    check_job,
    ignore_progress,
    quantize_model,
    quantize_module,
    set_activations,
)
from microscale.recipes.calibration import Calibration
from microscale.recipes.folding import (
    centre_residual,
    fold_scale,
    fuse_norms,
    rotate_residual,
    rotate_value,
    shared_scale,
    untie_head,
)
from microscale.recipes.offload import open_store
from microscale.recipes.plan import Plan, PlannedLayer, make_plan, quantizable_modules
from microscale.recipes.ranges import DEFAULT_OBSERVER, RangeReport, calibrate_ranges, has_static_ranges
from microscale.recipes.recipe import Recipe, Rule, load_recipe, make_recipe, matches, parse_rule
from microscale.recipes.writing import recipe_text

__all__ = [
    "DEFAULT_OBSERVER",
    "Calibration",
    "Plan",
    "PlannedLayer",
    "Progress",
    "QuantizationReport",
    "RangeReport",
    "Recipe",
    "Rule",
    "calibrate_ranges",
    "centre_residual",
    "check_job",
    "fold_scale",
    "fuse_norms",
    "has_static_ranges",
    "ignore_progress",
    "load_recipe",
    "make_plan",
    "make_recipe",
    "matches",
    "open_store",
    "parse_rule",
    "quantizable_modules",
    "quantize_model",
    "quantize_module",
    "recipe_text",
    "rotate_residual",
    "rotate_value",
    "set_activations",
    "shared_scale",
    "untie_head",
]
