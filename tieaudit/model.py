"""The nouns of the parameter graph: what a model holds, who uses it, who claims a tie.

All of them are frozen; a `Model` is never changed after loading. What is derived from a model (findings, plans,
proofs) is in `verdict.py` and `change.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tieaudit.dtypes import dtype
from tieaudit.storage import Storage
from tieaudit.view import AS_STORED, View

if TYPE_CHECKING:
    import networkx as nx

Origin = Literal["aliased", "absent", "declared", "measured", "proposed"]


Box = tuple[tuple[int, int], ...]
"""Begin and end on every axis; empty for all of a tensor."""


Attribute = int | float | str | tuple[int, ...]
"""What an attribute of an operation holds."""


def make_id(name: str, part: str = "", scope: str = "") -> str:
    """The id of a weight: its name in the main graph of a one-part model, else `part|scope|name`.

    `|` and `%` inside a field are percent-escaped, so that ids never collide.
    """
    fields = [text.replace("%", "%25").replace("|", "%7C") for text in (part, scope, name)]
    return "|".join(fields) if part or scope else fields[2]


@dataclass(frozen=True)
class Weight:
    """A tensor under a name. Absent weights (declared by a class, not stored) have no storage."""

    id: str
    name: str
    shape: tuple[int, ...]
    """Logical shape, as the file declares it."""
    dtype: str
    """Canonical name from `dtypes.TABLE`."""
    storage: Storage | None
    """Where the canonical bytes are: row-major, little-endian, sub-byte types packed low nibble first."""
    part: str = ""
    """File of a model in several parts (its stem), else empty."""
    scope: str = ""
    """Path of the subgraph that owns it, else empty."""
    parameter: bool | None = None
    """True: learned; False: buffer, mask, index or shape constant; None: cannot be told."""
    because: str = ""
    """Why `parameter` is what it is."""
    held_as: Literal["tensor", "initializer", "constant_node", "sparse_initializer"] = "tensor"
    overridable: bool = False
    """A graph input too: a caller may replace the value, so it is never merged."""
    graph_output: bool = False
    """Its name is an output of its graph and must stay."""

    @property
    def absent(self) -> bool:
        return self.storage is None

    @property
    def n_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def n_bytes(self) -> int:
        """Bytes stored under this name; an absent weight stores none."""
        return self.storage.n_bytes if self.storage is not None else 0

    @property
    def is_float(self) -> bool:
        return dtype(self.dtype).family == "float"


@dataclass(frozen=True)
class Use:
    """One consumption of a weight by an operation, after the chain of view operations between them."""

    weight: str
    """Id of the weight."""
    op: str
    """Operation type of the consumer, with its domain unless it is the default one."""
    node: str
    """Unique handle of the consumer inside its part and scope: its first output's name (`@name` of a graph output)."""
    slot: int
    """Input slot of the consumer."""
    view: View = AS_STORED
    """How the consumer sees the stored tensor; attributes such as transB are part of it."""
    part: str = ""
    scope: str = ""
    """Scope of the consumer, which may lie deeper than the weight's."""
    reads_ids: bool = False
    """A lookup whose indices come from an integer input of the graph."""
    feeds_output: bool = False
    """The consumer's result reaches a graph output through element-wise and shape operations only."""
    chain: tuple[str, ...] = ()
    """First outputs of the view nodes (Transpose, Cast, Identity …) passed on the way, from weight to consumer."""
    transposes: bool = False
    """Whether one of those nodes is a Transpose that moves something: a runtime may fold it into a second copy."""
    calls: tuple[str, ...] = ()
    """First outputs of the calls of model-local functions through which the weight is passed, outermost first."""
    box: Box = ()
    """The range of every axis of what is seen that the consumer reads, where it is a part by constant bounds."""
    call: tuple[str, ...] = ()
    """Calls of modules in which the consumer runs, the outermost first: dotted path, `@`, number of the call from 0.

    Empty where the graph knows no modules."""


@dataclass(frozen=True)
class Operation:
    """One operation of a graph: structure only, so that others can follow what flows without knowing the format.

    A value's name is `make_id(name, part, scope)`; the value of a weight is called by the weight's id. What a graph is
    given and what it returns are operations too, `input` and `output`. Bodies of control flow and of functions follow
    the operation that runs them, joined to it by operations `pass`.
    """

    op: str
    """Operation type in the format's own vocabulary, with its domain unless it is the default one."""
    node: str
    """As `Use.node`."""
    inputs: tuple[str, ...]
    """Values by slot; empty where a slot is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    """Numbers and words that steer it; of an `input` its `rank` and whether it is an `integer`, where known."""
    part: str = ""
    scope: str = ""


@dataclass(frozen=True)
class Quantised:
    """A matrix that is stored as integer codes: its numbers are (code - zero point) · scale."""

    codes: str
    """Id of the weight that holds the codes, `bits` each, the first one of a byte in its lowest bits, row by row."""
    scales: str
    zeros: str | None
    """Id of the zero points; None: `zero` for all."""
    shape: tuple[int, int]
    """Of the matrix, in the layout of the codes."""
    bits: int
    signed: bool
    """Two's complement codes; then `zero` is one too."""
    along: Literal["one", "rows", "columns", "blocks"]
    """One scale for all, for each row, for each column, or for each `block` neighbours of a row."""
    block: int = 0
    zero: int = 0
    packed_zeros: bool = False
    """Zero points are packed like codes, each row of them ending with a byte; else one element each."""


@dataclass(frozen=True)
class Declaration:
    """Somebody claims that these weights are one."""

    members: tuple[str, ...]
    """Ids, the canonical one (the one that keeps its name when saved) first."""
    claimed_by: str
    """File and key, or class, that claims it; shown to the user."""
    active: bool
    """Whether the claim holds as configured (flag on, or default on)."""
    restores: bool
    """Whether the default target loader re-creates a missing member from the others."""
    honoured_by: tuple[str, ...] = ()
    """Loaders and versions, e.g. `transformers 5`."""
    condition: str = ""
    """The setting that switches it, as `file:key`, e.g. `config.json:text_config.tie_word_embeddings`; or empty."""
    because: str = ""
    """Why it is active or not; `UNWRITTEN` and what then holds, where the setting has no value."""

    @property
    def documented(self) -> bool:
        """Whether nobody claims it but an alias map in the metadata of safetensors, by which no loader acts."""
        return self.claimed_by.endswith(("__metadata__", " metadata"))


NOT_HERE = "not here: "
"""How the metadata `weights` of a model begins where files with its weights are elsewhere (git-LFS, DVC, a cache)."""

UNWRITTEN = "not in the file"


@dataclass(frozen=True)
class Role:
    """What a weight is for, with the evidence."""

    kind: str
    because: str
    layer: int | None = None
    side: Literal["encoder", "decoder"] | None = None
    expert: int | None = None
    against: str = ""
    """The kind that weaker evidence says, where it contradicts; `because` has both sides."""
    attention: int | None = None
    """Which attention of its graph it belongs to, in the order of their softmax; None where no graph tells."""
    stream: int | None = None
    """Which row of blocks its layer is counted in; two towers have one each. None where no graph tells."""


@dataclass(frozen=True)
class Member:
    """One weight of a tie and how it is seen from the tie's common value."""

    id: str
    view: View = AS_STORED
    use: str = ""
    """Where one stored weight is a tie by its uses: the consumer, as `Op @ node`."""


@dataclass(frozen=True)
class Tie:
    """Weights that are one value: a class, not a pair. The first member is seen as stored."""

    members: tuple[Member, ...]
    origin: Origin
    because: str
    n_bytes_saved: int = 0
    """Bytes that keeping one stored copy would free."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the members, each once, in order."""
        return tuple(dict.fromkeys(member.id for member in self.members))


@dataclass(frozen=True)
class Part:
    """One file (or sharded set) of a model."""

    name: str
    """Empty for a one-part model."""
    paths: tuple[str, ...]
    """Files of this part, the main one first."""


@dataclass(frozen=True)
class Model:
    """The parameter graph of one model."""

    path: str
    """What the user named, resolved to the model that owns it."""
    format: str
    """Name of the format, a member of `formats/`."""
    parts: tuple[Part, ...]
    weights: tuple[Weight, ...]
    uses: tuple[Use, ...] = ()
    declarations: tuple[Declaration, ...] = ()
    operations: Sequence[Operation] = field(default=(), compare=False, repr=False)
    """All operations in an order in which values are made before they are read; made when first looked at, for who
    follows the flow through them. Empty where the format has no graph, or only the uses of weights."""
    quantised: tuple[Quantised, ...] = ()
    """What the graph says about matrices that are stored as codes; a matrix with several readers is there once."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Role kinds that the loader knows from the class, by weight id."""
    dimensions: Mapping[str, int] = field(default_factory=dict)
    """Sizes that a configuration states, by dotted key, such as `text_config.vocab_size`."""
    flags: Mapping[str, object] = field(default_factory=dict)
    """The setting that ties, by dotted key, at every level of a configuration that states it, as written there."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Facts for the report: producer, opset, model type, whether the class was asked …"""
    notes: tuple[str, ...] = ()
    """What the loader could not tell, in sentences."""
    has_graph: bool = False
    """Whether `uses` is complete, so that its absence means *not used*."""

    @property
    def weights_here(self) -> bool:
        """Whether every file with weights is here, and not a pointer to it: else rules about bytes cannot tell."""
        return not self.metadata.get("weights", "").startswith(NOT_HERE)

    @cached_property
    def restores(self) -> bool:
        """Whether a loader acts by any of the declarations, and makes one what is left out."""
        return any(declaration.restores for declaration in self.declarations)

    @cached_property
    def by_id(self) -> Mapping[str, Weight]:
        return {weight.id: weight for weight in self.weights}

    @cached_property
    def by_module(self) -> Mapping[str, tuple[Weight, ...]]:
        """Weights by their names up to the last dot."""
        found: dict[str, list[Weight]] = {}
        for weight in self.weights:
            found.setdefault(weight.name.rpartition(".")[0], []).append(weight)
        return {module: tuple(weights) for module, weights in found.items()}

    @cached_property
    def uses_of(self) -> Mapping[str, tuple[Use, ...]]:
        found: dict[str, list[Use]] = {}
        for use in self.uses:
            found.setdefault(use.weight, []).append(use)
        return {weight: tuple(uses) for weight, uses in found.items()}

    @cached_property
    def graph(self) -> nx.MultiDiGraph[str]:
        """Weights and consuming operations as nodes, uses as edges from weight to operation."""
        import networkx

        graph: nx.MultiDiGraph[str] = networkx.MultiDiGraph(path=self.path)
        for weight in self.weights:
            graph.add_node(weight.id, kind="weight", shape=weight.shape, dtype=weight.dtype)
        for use in self.uses:
            operation = make_id(use.node, use.part, use.scope) + "()"
            graph.add_node(operation, kind="operation", op=use.op)
            graph.add_edge(use.weight, operation, slot=use.slot, view=str(use.view))
        return graph


def storage_of(weight: Weight) -> Storage:
    """The storage of a weight that is known not to be absent."""
    if weight.storage is None:
        raise ValueError(f"{weight.id} is absent: nothing to read")
    return weight.storage


def classes(groups: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """The transitive closure of overlapping groups, each class in first-seen order.

    Cost: near linear in the number of members (union–find).
    """
    parent: dict[str, str] = {}

    def root(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for group in groups:
        first = None
        for item in group:
            parent.setdefault(item, item)
            first = first or item
            parent[root(item)] = root(first)
    found: dict[str, list[str]] = {}
    for item in parent:
        found.setdefault(root(item), []).append(item)
    return [tuple(members) for members in found.values() if len(members) > 1]
