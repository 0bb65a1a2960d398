"""Questions about a model or a file."""

from microscale.planning.allocated_layers import AllocatedLayer, allocated_layers, parse_fixed
from microscale.planning.allocation import Allocation, Choice, ChoiceGroup
from microscale.planning.allocator import (
    FrontPoint,
    Solution,
    allocation_recipe,
    check_budget,
    check_reachable,
    solve,
)
from microscale.planning.analysis import CurvePoint, ModelAnalysis, analyze_model
from microscale.planning.bench import Speed, Speeds, measure_speed, resident_bytes
from microscale.planning.budget import Budget, BudgetUnit, amount_text, parse_budget
from microscale.planning.candidates import Candidate, parse_candidate, parse_candidates
from microscale.planning.comparison import EVERYTHING, MODES, ComparisonResult, Step, compare_formats
from microscale.planning.executed import Executed, by_name, linear_words, summed
from microscale.planning.inspection import Inspection, LayerFacts, inspect_checkpoint
from microscale.planning.layer_facts import CandidateError, ClassHistogram, LayerAnalysis, Side
from microscale.planning.layer_table import LayerTable, measure_table
from microscale.planning.recommendation import DEFAULT_TARGET_DB, Recommendation
from microscale.planning.sensitivity import (
    MeasuringCost,
    Sensitivity,
    measure_sensitivity,
    measuring_cost,
    parse_sensitivity,
)
from microscale.planning.stand_ins import check_candidates, is_tied, layer_method, needs_text
from microscale.planning.tensor_facts import MassiveValue, TensorFacts

__all__ = [
    "DEFAULT_TARGET_DB",
    "EVERYTHING",
    "MODES",
    "AllocatedLayer",
    "Allocation",
    "Budget",
    "BudgetUnit",
    "Candidate",
    "CandidateError",
    "Choice",
    "ChoiceGroup",
    "ClassHistogram",
    "ComparisonResult",
    "CurvePoint",
    "Executed",
    "FrontPoint",
    "Inspection",
    "LayerAnalysis",
    "LayerFacts",
    "LayerTable",
    "MassiveValue",
    "MeasuringCost",
    "ModelAnalysis",
    "Recommendation",
    "Sensitivity",
    "Side",
    "Solution",
    "Speed",
    "Speeds",
    "Step",
    "TensorFacts",
    "allocated_layers",
    "allocation_recipe",
    "amount_text",
    "analyze_model",
    "by_name",
    "check_budget",
    "check_candidates",
    "check_reachable",
    "compare_formats",
    "inspect_checkpoint",
    "is_tied",
    "layer_method",
    "linear_words",
    "measure_sensitivity",
    "measure_speed",
    "measure_table",
    "measuring_cost",
    "needs_text",
    "parse_budget",
    "parse_candidate",
    "parse_candidates",
    "parse_fixed",
    "parse_sensitivity",
    "resident_bytes",
    "solve",
    "summed",
]
