"""Recipe: which layer gets which format, validated, from Python, the command line or a YAML file.

::

    format: mxfp4               # weights of every linear layer
    activations: mxfp8          # optional; their inputs
    attention: mxfp8            # optional; what enters the products of attention
    kv_cache: mxfp8             # optional; keys and values as they are stored
    method: rtn                 # a method or a chain of steps, see docs/reference/methods.md
    effort: fast                # of method best: fast, good or max
    include: [lm_head]          # also quantize what is left out by default (lm_head, embeddings; tied: both)
    exclude: ["*.down_proj"]    # leave these alone
    rules:                      # win over the lines above, later ones over earlier ones
      - match: "*.o_proj"
        weights: mxfp8          # or none
        activations: none
        method: gptq            # for these layers alone
    layout: auto                # auto, compressed-tensors, quark, gpt-oss, microscale
    nan: raise                  # or poison
    part: language              # of a model that sees, too: language, vision, audio, connector or all

A pattern is a glob (``*``, ``?``, ``[…]``) that matches a module's full name or the end of it after a dot:
``down_proj`` and ``mlp.*`` both match ``model.layers.0.mlp.down_proj``. Or it is a role (:mod:`roles`):
``attention.qkv``, ``attention.out``, ``mlp.gate_up``, ``mlp.down``, ``embedding``, ``lm_head``; ``norm`` can only be
left alone, and a rule that matches ``kv_cache`` says the same as the line ``kv_cache``. Attention and the cache are
simulated: rounded, stored and computed with as floats.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import ValidationError, model_validator

from microscale.errors import FormatError, RecipeError, check_kind, check_path, nearest
from microscale.formats import NONE, Format, parse_weights_and_inputs
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, parse_attention
from microscale.recipes.fields import (
    RTN,
    AttentionFields,
    InputsField,
    MethodField,
    Record,
    WeightsField,
    first_error,
    problem_text,
)
from microscale.transforms import AtRunTime

KV_CACHE = "kv_cache"
"""The role that a rule may name in place of a pattern of layers: keys and values as they are stored."""
NORM = "norm"
"""The role of norms, which stay as they are: a rule may say so."""

NanWord = Literal["raise", "poison"]
PartWord = Literal["language", "vision", "audio", "connector", "all"]
LayoutWord = Literal["auto", "compressed-tensors", "quark", "gpt-oss", "microscale"]


class RecipeRecord(Record):
    """A part of a recipe."""

    refusal = RecipeError
    needed = "a recipe needs a format, a rule what it matches"


class RecipeRule(RecipeRecord):
    """A pattern with the formats of the layers it matches; what is None stays as before the rule.

    Raises:
        RecipeError, FormatError: a field that is not valid, with what is possible.
    """

    match: str
    weights: WeightsField | None = None
    activations: InputsField | None = None
    method: MethodField | None = None

    @model_validator(mode="after")
    def _cache_has_one_format(self) -> RecipeRule:
        if self.match == KV_CACHE:
            words = {str(given) for given in (self.weights, self.activations) if given is not None}
            if self.method is not None or len(words) != 1:
                raise ValueError("rule for 'kv_cache' names one format and no method, e.g. kv_cache=mxfp8")
            self.rounding()
        return self

    @model_validator(mode="after")
    def _norms_stay(self) -> RecipeRule:
        if self.match == NORM and (not self.leaves_weights or self.method is not None):
            raise ValueError(f"norms are not stored in a block format; a rule for {NORM!r} reads {NORM}={NONE}")
        return self

    @model_validator(mode="after")
    def _none_is_all(self) -> RecipeRule:
        if self.leaves_weights and self.activations is not None and self.activations.record is not None:
            raise ValueError(
                f"rule for {self.match!r} quantizes activations ({self.activations}) of layers whose weights it leaves"
                " alone; activations are rounded only where weights are quantized, e.g. in bf16/32:e8m0"
            )
        return self

    @property
    def leaves_weights(self) -> bool:
        """Whether the rule says that weights stay as they are."""
        return self.weights is not None and self.weights.record is None

    def rounding(self) -> Format | None:
        """Return the one format that a rule for the cache names."""
        given = self.weights or self.activations
        return None if given is None else parse_attention(given.record)


class LayerFields(RecipeRecord):
    """The first lines of a recipe; a base of its own, for a file has its lines in the order of the classes."""

    format: WeightsField
    activations: InputsField | None = None


class Recipe(AttentionFields, LayerFields):
    """The whole quantization of a model as data.

    Raises:
        RecipeError, FormatError: a field that is not valid, with what is possible.
    """

    method: MethodField = RTN
    effort: Literal["fast", "good", "max"] = "fast"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[RecipeRule, ...] = ()
    layout: LayoutWord | None = None
    nan: NanWord = "raise"
    part: PartWord = "language"

    @classmethod
    def known_keys(cls, location: Sequence[int | str]) -> list[str]:
        """Return the keys that are known where a key stands."""
        return list(RecipeRule.model_fields if location[:1] == ("rules",) else cls.model_fields)

    @property
    def at_run_time(self) -> AtRunTime:
        """What its chains may leave to do at run time: nothing, where a layout of another tool was asked for."""
        is_foreign = self.layout is not None and self.layout not in ("auto", "microscale")
        return AtRunTime.FOLDED if is_foreign else AtRunTime.ONLINE

    @property
    def layer_rules(self) -> tuple[RecipeRule, ...]:
        """The rules for layers."""
        return tuple(rule for rule in self.rules if rule.match not in (KV_CACHE, NORM))

    @property
    def attention_formats(self) -> AttentionFormats | None:
        """What attention is rounded to; None where nothing is. The last rule for the cache wins over its line."""
        found = {side: given.record for side, given in self.rounding.items()}
        for rule in self.rules:
            if rule.match == KV_CACHE:
                found[KV_CACHE] = rule.rounding()
        formats = AttentionFormats.parse(found.get("attention"), found.get(KV_CACHE))
        return None if formats == NOT_ROUNDED else formats


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a module name or the end of it after a dot."""
    if fnmatch.fnmatchcase(name, pattern):
        return True
    pieces = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(pieces[start:]), pattern) for start in range(1, len(pieces)))


def make_recipe(**fields: Any) -> Recipe:
    """Build a recipe from Python values.

    Raises:
        RecipeError, FormatError: a field that is not valid, with what is possible.
    """
    return Recipe(**fields)


def parse_rule(text: str) -> RecipeRule:
    """Parse ``GLOB=WEIGHTS[/ACTIVATIONS]``, e.g. ``*.down_proj=mxfp8`` or ``*.o_proj=e2m1/16:e4m3/mxfp8``.

    Raises:
        RecipeError: no ``=``, or no reading of the right side as formats.
    """
    check_kind(text, str, "a rule", "a text such as '*.down_proj=mxfp8'", error=RecipeError)
    pattern, equals, right = text.partition("=")
    if not equals or not pattern or not right:
        raise RecipeError(f"rule {text!r} must read GLOB=WEIGHTS or GLOB=WEIGHTS/ACTIVATIONS, e.g. '*.down_proj=mxfp8'")
    try:
        weights, activations = parse_weights_and_inputs(right)
    except FormatError as error:
        raise RecipeError(f"rule {text!r}: the right side must be WEIGHTS or WEIGHTS/ACTIVATIONS\n{error}") from None
    return RecipeRule(match=pattern, weights=weights, activations=activations)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: the file is absent, not YAML, or not a recipe; the message names the line.
    """
    check_path(path, "the path of a recipe", "a text or a Path", error=RecipeError)
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        beside = file.parent.iterdir() if isinstance(error, FileNotFoundError) and file.parent.is_dir() else ()
        hint = nearest(file.name, (each.name for each in beside))
        raise RecipeError(f"recipe {file} cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {file} is not valid YAML: {error}") from None
    for line, problem in key_problems(node):
        raise RecipeError(f"recipe {file}, line {line}: {problem}")
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {file}, line 1: a recipe is a mapping that begins with 'format: NAME'")
    try:
        return Recipe.read(content)
    except ValidationError as error:
        line = line_of(node, first_error(error)["loc"])
        raise RecipeError(f"recipe {file}, line {line}: {problem_text(error, Recipe)}") from None


def key_problems(root: Any) -> list[tuple[int, str]]:
    """Return (line, problem) of every key that is no word or stands twice in its mapping, which YAML would let pass."""
    problems: list[tuple[int, str]] = []
    queue, visited = [root], set[int]()
    while queue:
        node = queue.pop(0)
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            queue.extend(cast("list[Any]", node.value))
        elif isinstance(node, yaml.MappingNode):
            words: set[str] = set()
            for key, value in cast("list[tuple[Any, Any]]", node.value):
                line = int(key.start_mark.line) + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    problems.append((line, "a key of a recipe is a word"))
                elif key.value in words:
                    problems.append((line, f"{key.value!r} stands here twice"))
                words.add(str(key.value))
                queue.append(value)
    return sorted(problems)


def line_of(node: Any, location: Sequence[int | str]) -> int:
    """Return the line of the deepest part of a location that the YAML text has."""
    line = int(node.start_mark.line) + 1
    for piece in location:
        child: Any = None
        if isinstance(node, yaml.MappingNode):
            for key, value in cast("list[tuple[Any, Any]]", node.value):
                if key.value == piece:
                    child, line = value, int(key.start_mark.line) + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(piece, int):
            child = cast("list[Any]", node.value)[piece]
            line = int(child.start_mark.line) + 1
        if child is None:
            break
        node = child
    return line
