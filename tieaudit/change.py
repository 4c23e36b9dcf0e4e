"""The nouns of changing a model: a plan of edits, and the proof that only the plan happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tieaudit.model import Member
from tieaudit.storage import Storage
from tieaudit.verdict import Refusal


@dataclass(frozen=True)
class Adjustment:
    """What one member applies to the common value C of a share before it is used; stored beside C.

    Rows and columns are those of C in the first member's layout.
    """

    kind: Literal["scale", "linear", "low-rank"]
    """C·diag(right), C·right, or C + left·right."""
    dtype: str
    """Element type of the factors: that of C."""
    right: Storage
    right_shape: tuple[int, ...]
    """[columns], [columns, columns] or [rank, columns]."""
    left: Storage | None = None
    left_shape: tuple[int, ...] = ()
    """[rows, rank]."""

    @property
    def n_bytes(self) -> int:
        """What it costs."""
        return self.right.n_bytes + (self.left.n_bytes if self.left is not None else 0)


@dataclass(frozen=True)
class Gain:
    """A norm whose only reader is one product, so that its gain can take a scale of each column of that."""

    ids: tuple[str, ...]
    """The gain, and the bias if there is one."""
    added: float = 0.0
    """To the stored gain, before it is applied: 1 in Gemma, where 0 means that nothing is scaled."""


@dataclass(frozen=True)
class Share:
    """Make the members one stored tensor. The first member's name survives; lossy if the values differ."""

    members: tuple[Member, ...]
    values: Storage | None = None
    """The common value in the first member's layout; None keeps the first member's own bytes."""
    because: str = ""
    adjustments: Mapping[str, Adjustment] = field(default_factory=dict)
    """Id of a member → what it applies to the common value; the others see it as it is."""
    lossless: bool = False
    """Every member, seen as it says, holds the common value already, whatever other edits change."""


@dataclass(frozen=True)
class Equalise:
    """Give the members one value, each in a stored tensor of its own: nobody would restore a name that is left out."""

    members: tuple[Member, ...]
    values: Storage | None = None
    """The common value in the first member's layout; None keeps the first member's own bytes."""
    because: str = ""


@dataclass(frozen=True)
class Unshare:
    """Give a weight that is tied (aliased, absent, or one initializer with several uses) a stored copy per role."""

    source: str
    """Id of the stored weight."""
    name: str
    """Name of the new copy."""
    uses: tuple[tuple[str, str, str, int], ...] = ()
    """(part, scope, node, slot) of the uses that move to the copy; empty where the format has no graph."""
    because: str = ""


@dataclass(frozen=True)
class Respell:
    """Express an existing tie so that the runtime does not fold it apart: the uses of `weight` through a Transpose."""

    weight: str
    because: str = ""


@dataclass(frozen=True)
class SetConfig:
    """Set one key of a JSON file beside the weights; the rest of the file keeps its order."""

    file: str
    key: tuple[str, ...]
    value: bool | int | str
    because: str = ""


@dataclass(frozen=True)
class Pooled:
    """A weight whose heads lie one after the other along an axis."""

    id: str
    axis: int


@dataclass(frozen=True)
class Pool:
    """Make the heads of a projection fewer, each the mean of neighbours; what reads its result sees each repeated."""

    weights: tuple[Pooled, ...]
    """The projection, and its bias if it has one."""
    n_heads: int
    n_groups: int
    """A divisor of `n_heads`: head h goes into group ⌊h · n_groups / n_heads⌋."""
    because: str = ""


Edit = Share | Equalise | Unshare | Respell | Pool | SetConfig


Kind = Literal["safetensors", "torch"]


@dataclass(frozen=True)
class Container:
    """What a model is to be written as, where that is another container than its own."""

    form: Kind
    file: str
    """Name of the file that is written; empty where a folder of its own (with config.json) becomes one."""
    left_out: tuple[str, ...] = ()
    """Files of a folder that do not come along: they would be read in place of the result."""
    doubled: Mapping[str, str] = field(default_factory=dict)
    """Name that is written as a second copy, because the container cannot keep its tie → the name it was one with."""


@dataclass(frozen=True)
class Prediction:
    """What one value for a class of weights is predicted to cost, from calibration tokens."""

    ids: tuple[str, ...]
    policy: str
    changed: tuple[float, ...]
    """‖change‖²/‖W‖² at each weight."""
    errors: tuple[float | None, ...]
    """Share of the energy of what each weight's site gives that changes; None where it was not calibrated."""
    nats: float | None
    """Rise of the negative log-likelihood per token, to second order; None without gradients."""
    n_tokens: int
    """From so many tokens, to which nothing was fitted where there were enough."""


@dataclass(frozen=True)
class LossChange:
    """The negative log-likelihood of the same tokens under two models, in nats per token."""

    before: float
    after: float
    rise: float
    """ΔNLL, the mean of the differences."""
    standard_error: float
    """Of the rise; NaN for a single token."""
    n_tokens: int
    held_out: bool
    """No policy was fitted to these tokens."""


@dataclass(frozen=True)
class Plan:
    """What will be done to one model."""

    path: str
    target: str
    """The consumer that the result must be safe for, e.g. `transformers-5`, `ort-cpu`."""
    schemes: tuple[str, ...]
    edits: tuple[Edit, ...]
    n_bytes_saved: int
    lossless: bool
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    transposed_as: Literal["auto", "gemm", "gather", "fused"] = "auto"
    share_files: bool | None = None
    """Whether files may keep equal weights in one common data file; None: those that are parts of one export."""
    optimizer: Literal["adjust", "keep"] = "adjust"
    """What becomes of an optimizer's state beside parameters that are tied, where adjusting it is certain."""
    data_names: Mapping[str, str] = field(default_factory=dict)
    """Data file as the model names it → its name in the result, where the first one is taken at the destination."""
    into: Container | None = None
    """None: rewritten as what it is."""
    predictions: tuple[Prediction, ...] = ()
    """With calibration data: of each class of unequal weights that gets one value."""
    merge: str | None = None
    """The policy that was asked for; None: the usual one of each scheme."""
    loss: LossChange | None = None
    """Measured on calibration data with a temporary copy, where it could not be predicted for every class."""


@dataclass(frozen=True)
class Rewritten:
    """What an edit reports back about one original use that it had to express differently."""

    part: str
    scope: str
    node: str
    slot: int
    """The original use."""
    new_node: str
    new_slot: int
    """The use that took its place."""
    pattern: str
    """Name of the allow-listed graph edit."""


@dataclass(frozen=True)
class Factor:
    """A stored factor of an adjustment."""

    side: Literal["left", "right"]
    id: str
    """Id of the weight that holds it in the result."""
    transposed: bool = False


@dataclass(frozen=True)
class Adjusted:
    """What an edit reports back about one original use that sees the common value adjusted."""

    weight: str
    """Id of the member."""
    part: str
    scope: str
    node: str
    slot: int
    """The original use."""
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Repeated:
    """What an edit reports back about a projection that was pooled."""

    weight: str
    part: str
    scope: str
    node: str
    slot: int
    """The original use of the projection."""
    result: str
    """The value that has all heads again: the projection's result, behind its bias, under its original name."""


@dataclass(frozen=True)
class Written:
    """What a format wrote into a folder or file."""

    files: tuple[str, ...]
    """Paths relative to the destination."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Original weight id → id that now serves it, for weights whose name did not survive."""
    rewritten: tuple[Rewritten, ...] = ()
    adjusted: tuple[Adjusted, ...] = ()
    repeated: tuple[Repeated, ...] = ()
    placed: Mapping[str, str] = field(default_factory=dict)
    """Original file name → name in the result, for files that could not keep theirs."""
    copied: tuple[str, ...] = ()
    """Of `files`, what was only carried along: the folder's other files, which are none of the model's."""


Outcome = Literal["held", "failed", "not run"]


@dataclass(frozen=True)
class Level:
    """One level of proof."""

    name: Literal["structural", "regional", "end to end", "training"]
    outcome: Outcome
    because: str
    """What was checked, what failed, or why it could not run."""
    max_difference: float | None = None
    limit: float | None = None
    """The noise floor that the difference was compared with."""
    device: str = ""


@dataclass(frozen=True)
class Proof:
    """Which levels ran and held, and what was not exercised."""

    levels: tuple[Level, ...]
    not_exercised: tuple[str, ...] = ()
    """Uses that never moved the outputs when perturbed."""
    drift: float | None = None
    """Largest output difference against the original, for lossy plans."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Stored / optimised / resident bytes, latency, versions."""

    @property
    def failed(self) -> tuple[Level, ...]:
        return tuple(level for level in self.levels if level.outcome == "failed")
