"""Genotypes: what a search chose, in the published text form, as JSON, and by the names of the papers."""

import ast
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from neuroexapt.errors import UserError

Edge = tuple[str, int]
EDGES_PER_NODE = 2


class ChosenCell(NamedTuple):
    """A cell as a graph: ``(source, target, operation)`` of each edge, the states' names, what the output
    joins.
    """

    edges: tuple[tuple[int, int, str], ...]
    state_names: tuple[str, ...]
    concat: tuple[int, ...]


class AnyGenotype(Protocol):
    """What every genotype can tell; ``str`` of it is its published notation."""

    @property
    def cells(self) -> dict[str, ChosenCell]:
        """Its cells by type."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which ``genotype_from_dict`` reads back."""


def state_names(nodes: int) -> tuple[str, ...]:
    """Of the states of a cell with ``nodes`` nodes, in the notation of DARTS."""
    return ("c_{k-2}", "c_{k-1}", *(str(node) for node in range(nodes)))


@dataclass(frozen=True)
class Genotype:
    """A pair of cells in the notation of DARTS.

    ``normal`` and ``reduce`` list two ``(operation, source state)`` pairs for each node. States 0 and 1 are
    the outputs of the two cells before, node i is state i + 2. ``*_concat`` are the states whose
    concatenation is the cell's output. ``str(genotype)`` is the published text, which ``from_text`` reads
    back.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for cell in ("normal", "reduce"):
            edges, concat = getattr(self, cell), getattr(self, f"{cell}_concat")
            object.__setattr__(self, cell, _checked_edges(edges, cell))
            object.__setattr__(self, f"{cell}_concat", _checked_concat(concat, len(edges) // 2, cell))

    def edges(self, cell: str) -> tuple[tuple[int, int, str], ...]:
        """``(source, target, operation)`` of each edge of ``cell`` (``"normal"`` or ``"reduce"``)."""
        return tuple(
            (source, 2 + i // EDGES_PER_NODE, op) for i, (op, source) in enumerate(getattr(self, cell))
        )

    @property
    def cells(self) -> dict[str, ChosenCell]:
        return {cell: self._chosen_cell(cell) for cell in ("normal", "reduce")}

    def _chosen_cell(self, cell: str) -> ChosenCell:
        edges = self.edges(cell)
        return ChosenCell(edges, state_names(len(edges) // EDGES_PER_NODE), getattr(self, f"{cell}_concat"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "normal": [list(edge) for edge in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(edge) for edge in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_dict(cls, fields: Any) -> "Genotype":
        expected = ("normal", "normal_concat", "reduce", "reduce_concat")
        if not isinstance(fields, dict) or sorted(fields) != sorted(expected):
            raise UserError(f"a genotype is an object with exactly the fields {', '.join(expected)}")
        return cls(**fields)

    def __str__(self) -> str:
        return (
            f"Genotype(normal={list(self.normal)}, normal_concat={list(self.normal_concat)}, "
            f"reduce={list(self.reduce)}, reduce_concat={list(self.reduce_concat)})"
        )

    @classmethod
    def from_text(cls, text: str) -> "Genotype":
        """Read ``Genotype(normal=[('sep_conv_3x3', 1), …], normal_concat=range(2, 6), …)``."""
        try:
            call = ast.parse(text.strip(), mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError
            fields = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        except (SyntaxError, TypeError, ValueError) as error:
            raise UserError(
                "the genotype is neither JSON nor of the form Genotype(normal=[...], ...)"
            ) from error
        return cls.from_dict(fields)


@dataclass(frozen=True)
class CellGenotype:
    """One cell in the notation of NAS-Bench-201: ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``.

    Every node adds one operation from each state before it, down to state 0, the cell's input; the last node
    is the output. ``operations[n]`` are those of node n + 1 in the order of their sources.
    """

    operations: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for node, operations in enumerate(self.operations, 1):
            if len(operations) != node:
                raise UserError(f"node {node} takes an operation from each of the {node} states before it")

    @property
    def edges(self) -> tuple[tuple[int, int, str], ...]:
        """``(source, target, operation)`` of each edge, in the order of the rows of α."""
        return tuple(
            (source, target, op)
            for target, operations in enumerate(self.operations, 1)
            for source, op in enumerate(operations)
        )

    @property
    def cells(self) -> dict[str, ChosenCell]:
        last = len(self.operations)
        return {"cell": ChosenCell(self.edges, tuple(map(str, range(last + 1))), (last,))}

    def to_dict(self) -> dict[str, Any]:
        return {"arch": str(self)}

    @classmethod
    def from_dict(cls, fields: Any) -> "CellGenotype":
        if not isinstance(fields, dict) or list(fields) != ["arch"] or not isinstance(fields["arch"], str):
            raise UserError('a genotype of one cell is an object like {"arch": "|op~0|+|op~0|op~1|"}')
        return cls.from_text(fields["arch"])

    def __str__(self) -> str:
        nodes = (
            "".join(f"|{op}~{source}" for source, op in enumerate(operations)) + "|"
            for operations in self.operations
        )
        return "+".join(nodes)

    @classmethod
    def from_text(cls, text: str) -> "CellGenotype":
        """Read ``str`` of a genotype."""
        nodes = []
        for number, node in enumerate(text.strip().split("+"), 1):
            entries = [entry.rpartition("~") for entry in node.removeprefix("|").removesuffix("|").split("|")]
            sources = [source for _, _, source in entries]
            if sources != [str(source) for source in range(number)] or not all(op for op, _, _ in entries):
                raise UserError(
                    f"the genotype {text.strip()!r} is not of the form |op~0|+|op~0|op~1|+…: node {number} "
                    f"must name an operation for each state from 0 to {number - 1}"
                )
            nodes.append(tuple(op for op, _, _ in entries))
        return cls(tuple(nodes))


@dataclass(frozen=True)
class BlockGenotype:
    """A chain of blocks, by their operations; ``str`` of it is JSON."""

    blocks: tuple[str, ...]

    @property
    def cells(self) -> dict[str, ChosenCell]:
        count = len(self.blocks)
        edges = tuple((block, block + 1, op) for block, op in enumerate(self.blocks))
        return {"block": ChosenCell(edges, tuple(map(str, range(count + 1))), (count,))}

    def to_dict(self) -> dict[str, Any]:
        return {"blocks": list(self.blocks)}

    @classmethod
    def from_dict(cls, fields: Any) -> "BlockGenotype":
        blocks = fields["blocks"]
        if not isinstance(blocks, list) or not blocks or not all(isinstance(block, str) for block in blocks):
            raise UserError('a genotype of blocks is an object like {"blocks": ["mb_k3_e3", "skip_connect"]}')
        return cls(tuple(blocks))

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


@dataclass(frozen=True)
class RecommenderGenotype:
    """The cell of a recommender, whose edges may be ``none``, and its head; ``str`` of it is JSON."""

    cell: CellGenotype
    head: str

    def __post_init__(self) -> None:
        if len(self.cell.operations) not in {target for _, target, _ in self.edges}:
            raise UserError(f"nothing leads to the last node of {self.cell}; choose operations that do")

    @property
    def edges(self) -> tuple[tuple[int, int, str], ...]:
        """``(source, target, operation)`` of the edges that something passes: those from the input on."""
        reached, edges = {0}, []
        for source, target, op in self.cell.edges:
            if op != "none" and source in reached:
                reached.add(target)
                edges.append((source, target, op))
        return tuple(edges)

    @property
    def cells(self) -> dict[str, ChosenCell]:
        return {**self.cell.cells, "head": ChosenCell(((0, 1, self.head),), ("states", "query"), (1,))}

    def to_dict(self) -> dict[str, Any]:
        return {**self.cell.to_dict(), "head": self.head}

    @classmethod
    def from_dict(cls, fields: Any) -> "RecommenderGenotype":
        if not isinstance(fields["head"], str):
            raise UserError(
                'a genotype of a recommender is an object like {"arch": "|op~0|", "head": "last"}'
            )
        cell = CellGenotype.from_dict({name: value for name, value in fields.items() if name != "head"})
        return cls(cell, fields["head"])

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


def genotype_from_dict(fields: Any) -> Genotype | CellGenotype | BlockGenotype | RecommenderGenotype:
    """The genotype whose ``to_dict`` is ``fields``."""
    if isinstance(fields, dict) and "head" in fields:
        return RecommenderGenotype.from_dict(fields)
    if isinstance(fields, dict) and "blocks" in fields:
        return BlockGenotype.from_dict(fields)
    kind = CellGenotype if isinstance(fields, dict) and "arch" in fields else Genotype
    return kind.from_dict(fields)


def genotype_from_text(text: str) -> Genotype | CellGenotype | BlockGenotype | RecommenderGenotype:
    """Read ``str`` of a genotype, or its ``to_dict`` as JSON."""
    text = text.strip()
    if text.startswith("|"):
        return CellGenotype.from_text(text)
    if not text.startswith("{"):
        return Genotype.from_text(text)
    try:
        return genotype_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"the genotype is not valid JSON: {error}") from error


def _literal(node: ast.expr) -> Any:
    """``ast.literal_eval`` that also reads the published ``range(2, 6)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        return list(range(*(ast.literal_eval(argument) for argument in node.args)))
    return ast.literal_eval(node)


def _checked_edges(edges: Iterable[Sequence[Any]], cell: str) -> tuple[Edge, ...]:
    try:
        pairs = tuple((op, source) for op, source in edges)
    except (TypeError, ValueError) as error:
        raise UserError(f"genotype, {cell} cell: expected (operation, source state) pairs") from error
    if not pairs or len(pairs) % 2:
        raise UserError(f"genotype, {cell} cell: every node takes two edges, {len(pairs)} edges were given")
    for i, (op, source) in enumerate(pairs):
        if not isinstance(op, str) or not isinstance(source, int):
            raise UserError(f"genotype, {cell} cell: {(op, source)} is not an (operation, source state) pair")
        if not 0 <= source < 2 + i // 2:
            raise UserError(
                f"genotype, {cell} cell: node {i // 2} takes {op} from state {source}, which does not exist "
                f"there; states 0 to {1 + i // 2} do"
            )
    return pairs


def _checked_concat(concat: Iterable[int], nodes: int, cell: str) -> tuple[int, ...]:
    valid = range(2, 2 + nodes)
    states = tuple(concat) if isinstance(concat, (list, tuple, range)) else ()
    known = all(isinstance(state, int) and state in valid for state in states)
    if not states or not known or len(set(states)) != len(states):
        raise UserError(
            f"genotype, {cell} cell: the output joins states {concat}; list distinct states of "
            f"{valid.start} to {valid.stop - 1}"
        )
    return states


def _published(
    normal: str, reduce: str, normal_concat: Iterable[int], reduce_concat: Iterable[int]
) -> Genotype:
    """Genotype from compact text: ``op:source`` words, two to a node."""

    def parse(cell: str) -> tuple[Edge, ...]:
        return tuple((op, int(source)) for op, source in (word.split(":") for word in cell.split()))

    return Genotype(parse(normal), tuple(normal_concat), parse(reduce), tuple(reduce_concat))


# Zoph et al., CVPR 2018; Real et al., AAAI 2019; Liu et al., ICLR 2019 (first and second order);
# Xu et al., ICLR 2020 (CIFAR-10 and ImageNet); Chen et al., ICCV 2019.
GENOTYPES: dict[str, Genotype] = {
    "NASNet": _published(
        "sep_conv_5x5:1 sep_conv_3x3:0 sep_conv_5x5:0 sep_conv_3x3:0 avg_pool_3x3:1 skip_connect:0 "
        "avg_pool_3x3:0 avg_pool_3x3:0 sep_conv_3x3:1 skip_connect:1",
        "sep_conv_5x5:1 sep_conv_7x7:0 max_pool_3x3:1 sep_conv_7x7:0 avg_pool_3x3:1 sep_conv_5x5:0 "
        "skip_connect:3 avg_pool_3x3:2 sep_conv_3x3:2 max_pool_3x3:1",
        range(2, 7),
        (4, 5, 6),
    ),
    "AmoebaNet": _published(
        "avg_pool_3x3:0 max_pool_3x3:1 sep_conv_3x3:0 sep_conv_5x5:2 sep_conv_3x3:0 avg_pool_3x3:3 "
        "sep_conv_3x3:1 skip_connect:1 skip_connect:0 avg_pool_3x3:1",
        "avg_pool_3x3:0 sep_conv_3x3:1 max_pool_3x3:0 sep_conv_7x7:2 sep_conv_7x7:0 avg_pool_3x3:1 "
        "max_pool_3x3:0 max_pool_3x3:1 conv_7x1_1x7:0 sep_conv_3x3:5",
        (4, 5, 6),
        (3, 4, 6),
    ),
    "DARTS_V1": _published(
        "sep_conv_3x3:1 sep_conv_3x3:0 skip_connect:0 sep_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 "
        "sep_conv_3x3:0 skip_connect:2",
        "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:0 max_pool_3x3:0 skip_connect:2 "
        "skip_connect:2 avg_pool_3x3:0",
        range(2, 6),
        range(2, 6),
    ),
    "DARTS_V2": _published(
        "sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:1 skip_connect:0 "
        "skip_connect:0 dil_conv_3x3:2",
        "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 max_pool_3x3:0 skip_connect:2 "
        "skip_connect:2 max_pool_3x3:1",
        range(2, 6),
        range(2, 6),
    ),
    "PC_DARTS_cifar": _published(
        "sep_conv_3x3:1 skip_connect:0 sep_conv_3x3:0 dil_conv_3x3:1 sep_conv_5x5:0 sep_conv_3x3:1 "
        "avg_pool_3x3:0 dil_conv_3x3:1",
        "sep_conv_5x5:1 max_pool_3x3:0 sep_conv_5x5:1 sep_conv_5x5:2 sep_conv_3x3:0 sep_conv_3x3:3 "
        "sep_conv_3x3:1 sep_conv_3x3:2",
        range(2, 6),
        range(2, 6),
    ),
    "PC_DARTS_image": _published(
        "skip_connect:1 sep_conv_3x3:0 sep_conv_3x3:0 skip_connect:1 sep_conv_3x3:1 sep_conv_3x3:3 "
        "sep_conv_3x3:1 dil_conv_5x5:4",
        "sep_conv_3x3:0 skip_connect:1 dil_conv_5x5:2 max_pool_3x3:1 sep_conv_3x3:2 sep_conv_3x3:1 "
        "sep_conv_5x5:0 sep_conv_3x3:3",
        range(2, 6),
        range(2, 6),
    ),
    "PDARTS": _published(
        "skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 sep_conv_3x3:1 sep_conv_3x3:3 "
        "sep_conv_3x3:0 dil_conv_5x5:4",
        "avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 max_pool_3x3:0 dil_conv_3x3:1 "
        "dil_conv_3x3:1 dil_conv_5x5:3",
        range(2, 6),
        range(2, 6),
    ),
}
NASNet, AmoebaNet, DARTS_V1, DARTS_V2, PC_DARTS_cifar, PC_DARTS_image, PDARTS = GENOTYPES.values()


RECOMMENDERS: dict[str, RecommenderGenotype] = {
    "SASRec": RecommenderGenotype(
        CellGenotype.from_text("|attn_ln_2h~0|+|none~0|ffn_swiglu~1|+|none~0|none~1|skip_connect~2|"), "last"
    ),
    "HSTU": RecommenderGenotype(
        CellGenotype.from_text("|hstu_2h~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|"), "last"
    ),
}
"""Published recommenders as cells of the space ``seqrec``: Kang and McAuley 2018, Zhai et al. 2024."""


def load_genotype(name_or_file: str) -> Genotype | CellGenotype | BlockGenotype | RecommenderGenotype:
    """A genotype by its published name (in any case, with ``-`` or ``_``), from a file, or by its text."""
    if name_or_file.lstrip().startswith(("{", "|", "Genotype(")):
        return genotype_from_text(name_or_file)
    wanted = name_or_file.lower().replace("-", "_")
    aliases = {
        "darts": "darts_v2",
        "pc_darts": "pc_darts_cifar",
        "pcdarts": "pc_darts_cifar",
        "p_darts": "pdarts",
    }
    known: dict[str, Genotype | RecommenderGenotype] = {**GENOTYPES, **RECOMMENDERS}
    for name, genotype in known.items():
        if name.lower() == aliases.get(wanted, wanted):
            return genotype
    path = Path(name_or_file)
    if path.is_dir():
        path = path / "genotype.json"
    if not path.is_file():
        raise UserError(
            f"no genotype {name_or_file!r}: it is neither a file, nor the folder of a run that found one, "
            f"nor one of {', '.join(known)}"
        )
    try:
        return genotype_from_text(path.read_text())
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
