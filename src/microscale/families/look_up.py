"""Describe a model: its family's record, held against the modules that it really has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from microscale.errors import ModelError
from microscale.families.embeddings import is_table
from microscale.families.modules import is_linear, is_transposed, linear_names
from microscale.families.parts import check_part, is_of_part, part_roots
from microscale.families.records import FAMILIES, FamilyRecord, FoldRecord, TowerRecord, ValueRows
from microscale.families.structure import BlockStructure, Fold, FoldKind, LinearGroup, ModelStructure, NormReaders, Rows


def describe(model: nn.Module, part: str = "language") -> ModelStructure:
    """Return the blocks of a model and what is known about them.

    A family without a record, or a model whose layers are not as its record says, is described by structure: its blocks
    are those of the largest list of modules, each linear is a group of its own, in the order of definition,
    and there are no folds.

    Raises:
        ModelError: an unknown word for the part, a part that the model does not have, or no blocks in it.
    """
    check_part(model, part)
    family = _family_of(model)
    record = FAMILIES.get(family)
    towers = {"language", "vision"} if record is not None and record.vision is not None else {"language"}
    wanted = {"language", *part_roots(model)} - {"connector"} if part == "all" else {part}
    if not wanted <= towers:
        record = None  # it says nothing about a part of this model
    known = None if record is None else _known_model(model, family, record, part)
    return known or _found_model(model, family, part)


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the decoder layers where the family's record says them, else none.

    Unlike :func:`describe` it looks at no part of a layer, so that layers with some packed linears have names too.
    """
    record = FAMILIES.get(_family_of(model))
    modules = dict(model.named_modules())
    layers = None if record is None else modules.get(record.language.layers)
    if record is None or not isinstance(layers, nn.ModuleList):
        return ()
    return tuple(f"{record.language.layers}.{index}" for index in range(len(layers)))


def _family_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _known_model(model: nn.Module, family: str, record: FamilyRecord, part: str) -> ModelStructure | None:
    """Describe a model by its record; None where the record does not fit it."""
    towers = {"language": record.language, "vision": record.vision}
    chosen = [name for name in ("vision", "language") if part in (name, "all") and towers[name] is not None]
    found: list[ModelStructure] = []
    for name in chosen:
        tower = towers[name]
        assert tower is not None
        structure = _Tower(model, tower).describe(family, name)
        if structure is None:
            return None
        found.append(structure)
    whole = replace(found[-1], part=part, blocks=tuple(block for each in found for block in each.blocks))
    if len(found) > 1:
        obstacle = "it has several residual streams; choose one part of the model"
        return replace(whole, rotation_obstacle=obstacle)
    return whole


class _Tower:
    """A tower of a model beside its record."""

    def __init__(self, model: nn.Module, record: TowerRecord) -> None:
        self.model = model
        self.record = record
        config: Any = getattr(model, "config", None)
        self.config: Any = getattr(config, record.config) if record.config else config
        self.names = {name for name, _ in model.named_modules()}

    def describe(self, family: str, part: str) -> ModelStructure | None:
        """Return the structure of the tower, or None where its modules are not those of the record."""
        record = self.record
        parents = {entry.rpartition(".")[0] for entry in record.entries}
        if not {record.layers, *record.embeddings, *parents} <= self.names:
            return None
        blocks: list[BlockStructure] = []
        for index, layer in enumerate(cast(nn.ModuleList, self.model.get_submodule(record.layers))):
            block = self._block(f"{record.layers}.{index}", layer)
            if block is None:
                return None
            blocks.append(block)
        return ModelStructure(
            family=family,
            is_known=True,
            blocks=tuple(blocks),
            embeddings=record.embeddings,
            final_norm=record.final_norm if record.final_norm in self.names else None,
            head=record.head if record.head in self.names else None,
            part=part,
            norm=record.norm,
            entries=record.entries,
            rotation_obstacle=record.obstacle(self.config),
        )

    def _block(self, name: str, layer: nn.Module) -> BlockStructure | None:
        linears = linear_names(layer)
        matrices = {matrix for matrix, _ in layer.named_parameters()}
        pairs = _groups_of(self.record, linears)
        modules = {name for name, _ in layer.named_modules()}
        if not all(source in linears for group, _ in pairs for source in group.sources):
            return None
        if not all(fold is None or fold.name in modules for _, fold in pairs):
            return None
        if sorted(linear for group, _ in pairs for linear in group.linears) != sorted(linears):
            return None
        norms = self._norms(pairs, matrices)
        readers = {norm.name: norm.readers for norm in norms}
        groups = tuple(
            group if fold is None else replace(group, fold=self._fold(layer, group, fold, readers))
            for group, fold in pairs
        )
        writers = [f"{linear}.weight" for group in groups if _writes(group) for linear in group.linears]
        stacked = (matrix for matrix in self.record.stack_writers if matrix in matrices)
        return BlockStructure(name=name, groups=groups, norms=norms, writers=(*writers, *stacked))

    def _norms(
        self, pairs: Sequence[tuple[LinearGroup, FoldRecord | None]], matrices: set[str]
    ) -> tuple[NormReaders, ...]:
        """Return the norms of a block: their readers are the groups that fold into them, and the others named."""
        folds = [*pairs, *((None, group.fold) for group in self.record.groups)]
        readers: dict[str, list[str]] = {}
        for group, fold in folds:
            if fold is None or fold.kind is not FoldKind.NORM or not fold.holds(self.config):
                continue
            own = () if group is None else tuple(f"{linear}.weight" for linear in group.linears)
            names = readers.setdefault(fold.name, [])
            names.extend(name for name in (*own, *fold.others) if name in matrices and name not in names)
        return tuple(NormReaders(name=name, readers=tuple(found)) for name, found in readers.items())

    def _fold(
        self, layer: nn.Module, group: LinearGroup, fold: FoldRecord, readers: dict[str, tuple[str, ...]]
    ) -> Fold | None:
        producer = layer.get_submodule(fold.name)
        weight: Any = getattr(producer, "weight", None)
        if weight is None or not fold.holds(self.config):
            return None
        found = Fold(kind=fold.kind, name=fold.name, readers=readers.get(fold.name, ()), signs=fold.signs)
        if fold.kind is FoldKind.NORM:
            return replace(found, norm=self.record.norm)
        found = replace(found, readers=tuple(f"{linear}.weight" for linear in group.linears))
        width, num_rows = _widths(layer.get_submodule(group.linears[0]))[1], _widths(producer)[0]
        if fold.kind is FoldKind.LINEAR:
            return replace(found, rows=Rows(start=num_rows - width, heads=1, stride=width, width=width))
        query_heads, heads = _num_heads(self.config)
        head_dim = width // query_heads
        rows = Rows(start=num_rows - heads * head_dim, heads=heads, stride=head_dim, width=head_dim)
        if fold.value_rows is ValueRows.PER_HEAD:
            rows = Rows(start=2 * head_dim, heads=heads, stride=3 * head_dim, width=head_dim)
        return replace(found, rows=rows, shared_by=query_heads // heads)


def _writes(group: LinearGroup) -> bool:
    return group.role.endswith((".out", ".down"))


def _num_heads(config: Any) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads; vision towers say ``num_heads``."""
    queries = getattr(config, "num_attention_heads", None) or config.num_heads
    return int(queries), int(getattr(config, "num_key_value_heads", None) or queries)


def _widths(module: nn.Module) -> tuple[int, int]:
    """Return [out, in] of a linear layer."""
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if is_transposed(module) else (rows, cols)


def _groups_of(record: TowerRecord, linears: Sequence[str]) -> list[tuple[LinearGroup, FoldRecord | None]]:
    """Return the groups of the record whose linears a block has; those of experts follow each other by expert."""
    present = set(linears)
    found: list[tuple[LinearGroup, FoldRecord | None]] = []
    routed = [group for group in record.groups if "*" in group.linears[0]]
    for group in record.groups:
        if group not in routed and group.linears[0] in present:
            found.append((LinearGroup(role=group.role, linears=group.linears, sources=group.sources), group.fold))
    expert = 0
    while any(group.linears[0].replace("*", str(expert)) in present for group in routed):
        number = str(expert)
        for group in routed:
            names, sources = (
                tuple(name.replace("*", number) for name in each) for each in (group.linears, group.sources)
            )
            fold = group.fold
            if fold is not None:
                fold = replace(fold, name=fold.name.replace("*", number))
            found.append((LinearGroup(role=group.role, linears=names, sources=sources), fold))
        expert += 1
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """A list of modules with linears in them."""

    name: str
    layers: tuple[nn.Module, ...]

    @property
    def size(self) -> int:
        return sum(parameter.numel() for layer in self.layers for parameter in layer.parameters())


def _found_model(model: nn.Module, family: str, part: str) -> ModelStructure:
    """Describe a model by its structure alone."""
    roots = part_roots(model)
    stacks = [stack for stack in _stacks(model) if is_of_part(stack.name, part, roots)]
    chosen = stacks if part == "all" or not stacks else [max(stacks, key=lambda stack: stack.size)]
    layers = {f"{stack.name}.{index}": layer for stack in chosen for index, layer in enumerate(stack.layers)}
    if part == "connector":  # it has no stack: what holds its linear layers counts as a block
        layers = {name: model.get_submodule(name) for name in roots["connector"]}
        layers = {name: layer for name, layer in layers.items() if not is_linear(layer)}
    elif not layers:
        raise ModelError(f"{type(model).__name__} has no list of layers with linear layers in them")
    blocks = [
        BlockStructure(
            name=name, groups=tuple(LinearGroup(role="unknown", linears=(linear,)) for linear in linear_names(layer))
        )
        for name, layer in layers.items()
    ]
    return ModelStructure(
        family=family,
        is_known=False,
        blocks=tuple(blocks),
        embeddings=tuple(name for name, module in model.named_modules() if is_table(module)),
        final_norm=None,
        head=_head_name(model),
        part=part,
        rotation_obstacle=f"the family {family} has no record that says what its residual stream is",
    )


def _stacks(model: nn.Module) -> list[_Stack]:
    """Return the outermost lists of modules with linear layers, in the order of definition.

    The modules of a list need not be equal: hybrid models have attention in some layers and a state space in others.
    Each of them has linear layers then, as the parts of a network in line do not.
    """
    found: list[_Stack] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{stack.name}.") for stack in found):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            stack = _Stack(name=name, layers=tuple(module))
            is_equal = len({type(layer) for layer in stack.layers}) == 1
            if (any if is_equal else all)(linear_names(layer) for layer in stack.layers):
                found.append(stack)
    return found


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)
