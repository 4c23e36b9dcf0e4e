"""Stage: a live module → the same module, tied or untied in place, and the way back.

Only the slots of modules are set (which tensor a module owns under which name); forward code is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tieaudit.change import Adjustment, Edit, Plan, Share, Unshare
from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.find import find
from tieaudit.formats.torch_module.read import held, read_module
from tieaudit.formats.torch_module.tensors import identity
from tieaudit.model import Member, Model, make_id
from tieaudit.plan import Choices
from tieaudit.plan import plan as make_plan
from tieaudit.roles import roles
from tieaudit.storage import Storage, blocks
from tieaudit.verdict import Found, Subject

if TYPE_CHECKING:
    import torch

_FLAG = "tie_word_embeddings"


@dataclass
class Change:
    """What was done to a live module, and how to take it back."""

    module: torch.nn.Module
    plan: Plan
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put back the very tensors that were there before, under their names. Safe to call twice.

        A tensor that a lossy merge wrote into has its old values again, bit for bit; what training has changed since in
        one that was kept as it was stays.
        """
        while self._undo:
            self._undo.pop()()


def tie(module: torch.nn.Module, choices: Choices | None = None) -> Change:
    """Tie in place what the schemes name. RewriteRefused if nothing can be done and something was refused.

    A tied name becomes the *same* `Parameter` object, so that an optimizer made afterwards sees it once; a transposed
    one is the same object behind a parametrization, which moves its name to `….parametrizations.<name>.original`.
    Names of one memory in separate `Parameter` objects become one object, too. What a merge policy corrects at one name
    is a parametrization as well, whose factors are parameters of the module. Cost: that of `scan`, and what the policy
    reads where values differ; the kept tensors that get merged values are held twice until `undo` is forgotten.
    """
    _expect_module(module)
    model = read_module(module)
    found = find(model)
    made = make_plan(Subject(model, found, roles(model)), choices or Choices())
    edits = (*made.edits, *_one_object(module, model, found, made))
    if made.refusals and not edits:
        raise RewriteRefused("; ".join(dict.fromkeys(refusal.because for refusal in made.refusals)))
    slots = _Slots(module)
    _check(slots, edits)
    change = Change(module, _with_notes(made, edits, module))
    try:
        for edit in edits:
            if isinstance(edit, Share):
                _share(slots, edit, change)
    except BaseException:
        change.undo()
        raise
    return change


def untie(module: torch.nn.Module) -> Change:
    """Give every name a tensor of its own, in place: equal values, separate memory. Outputs stay what they are.

    A module that is registered at several paths becomes several modules. A parameter that one module uses in several
    calls stays one: no name tells its uses apart.
    """
    _expect_module(module)
    change = Change(module, Plan("", "torch", ("untie",), (), 0, True))
    edits: list[Edit] = []
    n_added = 0
    before = {one.name: identity(one.tensor) for one in held(module)}
    _separate_modules(module, change)
    slots = _Slots(module)
    first: dict[object, str] = {}
    seen: set[tuple[int, str]] = set()
    for one in held(module):
        owner, leaf = slots.owner(one.name)
        if (id(owner), leaf) in seen:
            continue
        seen.add((id(owner), leaf))
        kept = first.setdefault(before[one.name], one.name)
        if kept != one.name:
            slots.put(one.name, _own(one.tensor), change)
            edits.append(Unshare(make_id(kept), one.name, (), f"shared with {kept}"))
            n_added += one.tensor.numel() * one.tensor.element_size()
    _undo_transposed(module, {edit.name for edit in edits if isinstance(edit, Unshare)}, change)
    path = f"{type(module).__module__}.{type(module).__qualname__} in memory"
    plan = Plan(path, "torch", ("untie",), tuple(edits), -n_added, True)
    change.plan = _with_notes(plan, plan.edits, module)
    return change


def _expect_module(module: object) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"expected an nn.Module, found a {type(module).__name__}")


class _Slots:
    """Where a module keeps the tensor that a dotted name means."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._touched: set[int] = set()

    def owner(self, name: str) -> tuple[torch.nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._modules[path], leaf

    def tensor(self, name: str) -> torch.Tensor:
        owner, leaf = self.owner(name)
        found: torch.Tensor = (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf]
        return found

    def put(self, name: str, tensor: torch.Tensor, change: Change) -> None:
        owner, leaf = self.owner(name)
        self.remember(owner, change)
        places: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        places[leaf] = tensor

    def remember(self, owner: torch.nn.Module, change: Change) -> None:
        """Note how to put a module's slots back, once for each module."""
        if id(owner) not in self._touched:
            self._touched.add(id(owner))
            change._undo.append(_restorer(owner))


def _restorer(owner: torch.nn.Module) -> Callable[[], None]:
    places = (owner._parameters, owner._buffers, owner._modules)
    kind, contents = owner.__class__, [dict(place) for place in places]

    def restore() -> None:
        owner.__class__ = kind
        for place, content in zip(places, contents, strict=True):
            place.clear()
            place.update(content)

    return restore


def _one_object(module: torch.nn.Module, model: Model, found: Found, plan: Plan) -> list[Edit]:
    """Names of one memory that are separate `Parameter` objects: an optimizer would update that memory twice."""
    objects = {make_id(one.name): id(one.tensor) for one in held(module)}
    planned = {frozenset(member.id for member in edit.members) for edit in plan.edits if isinstance(edit, Share)}
    return [
        Share(tie.members, None, "one memory in separate Parameter objects")
        for tie in found.ties
        if tie.origin == "aliased" and len({objects[id] for id in tie.ids}) > 1
        and all(model.by_id[id].parameter for id in tie.ids)
        and not any(frozenset(tie.ids) <= ids for ids in planned)
    ]  # fmt: skip


def _check(slots: _Slots, edits: Sequence[Edit]) -> None:
    """Refuse before anything is touched."""
    for edit in edits:
        if not isinstance(edit, Share):
            continue
        kept = slots.tensor(edit.members[0].id)
        for member in edit.members[1:]:
            other = slots.tensor(member.id)
            if kept.requires_grad != other.requires_grad:
                frozen = member.id if kept.requires_grad else edit.members[0].id
                raise RewriteRefused(
                    f"{edit.members[0].id} and {member.id}: {frozen} is frozen (requires_grad is False) and the other "
                    "is not; one tensor cannot be both"
                )
            if kept.device != other.device:
                raise RewriteRefused(
                    f"{edit.members[0].id} is on {kept.device} and {member.id} on {other.device}: "
                    "one tensor cannot be both"
                )


def _share(slots: _Slots, edit: Share, change: Change) -> None:
    holder = _holder(edit)
    kept = slots.tensor(holder.id)
    if edit.values is not None:
        _write(kept, edit.values, holder.view.transposes, change)
    done: set[tuple[int, str]] = set()
    for member in edit.members:
        owner, leaf = slots.owner(member.id)
        steps = _steps(edit, holder, member, kept)
        if (id(owner), leaf) in done or not steps and slots.tensor(member.id) is kept:
            continue
        done.add((id(owner), leaf))
        if steps:
            slots.remember(owner, change)
            _put_behind(owner, leaf, kept, steps)
        else:
            slots.put(member.id, kept, change)


def _holder(edit: Share) -> Member:
    """The member whose parameter holds the common value: the first one that sees it as it is."""
    return next((one for one in edit.members if one.id not in edit.adjustments), edit.members[0])


def _steps(edit: Share, holder: Member, member: Member, kept: torch.Tensor) -> list[torch.nn.Module]:
    """What the member's weight is computed by from the kept parameter: swaps of its axes, and its correction."""
    from tieaudit.transposition import Transposition  # imports torch

    adjustment = edit.adjustments.get(member.id)
    swaps = (holder.view.transposes, member.view.transposes)
    if adjustment is None:
        return [Transposition()] if swaps[0] != swaps[1] else []
    before, after = ([Transposition()] if swap else [] for swap in swaps)
    return [*before, _correction(adjustment, kept), *after]


def _correction(adjustment: Adjustment, kept: torch.Tensor) -> torch.nn.Module:
    """The factors as new parameters beside the kept one, and what they do to it."""
    import torch

    from tieaudit.corrected import Mapped, Residual, Scaled  # imports torch

    def parameter(storage: Storage, shape: tuple[int, ...]) -> torch.Tensor:
        data = bytearray().join(blocks(storage))
        return torch.frombuffer(data, dtype=torch.uint8).view(kept.dtype).reshape(shape).to(kept.device)

    right = parameter(adjustment.right, adjustment.right_shape)
    if adjustment.left is not None:
        left = parameter(adjustment.left, adjustment.left_shape)
        return Residual(left, right, kept.requires_grad)
    return (Scaled if adjustment.kind == "scale" else Mapped)(right, kept.requires_grad)


def _put_behind(owner: torch.nn.Module, leaf: str, kept: torch.Tensor, steps: Sequence[torch.nn.Module]) -> None:
    """The slot reads `kept` through the steps; its name moves to `….parametrizations.<leaf>.original`."""
    import torch
    from torch.nn.utils import parametrize

    # a stand-in: registering changes the parameter object that it finds, and `undo` wants the old one unchanged
    with torch.no_grad():
        owner._parameters[leaf] = torch.nn.Parameter(steps[0](kept.detach()), kept.requires_grad)
    for step in steps:
        parametrize.register_parametrization(owner, leaf, step, unsafe=True)
    parametrized: Any = owner.parametrizations
    parametrized[leaf]._parameters["original"] = kept


def _write(tensor: torch.Tensor, values: Storage, transposed: bool, change: Change) -> None:
    """Put merged values into a tensor in place, where it lies transposed too; the old ones come back with `undo`."""
    import torch

    data = bytearray().join(blocks(values))
    shape = tensor.shape[::-1] if transposed else tensor.shape
    new = torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).reshape(shape)
    new = new.mT if transposed else new
    old = tensor.detach().clone()

    def back() -> None:
        with torch.no_grad():
            tensor.copy_(old)

    change._undo.append(back)
    with torch.no_grad():
        tensor.copy_(new)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind, values and gradient switch in memory of its own."""
    import torch

    made = tensor.detach().clone()
    return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made


def _separate_modules(module: torch.nn.Module, change: Change) -> None:
    """A module object at a further path is replaced there by a twin with the same tensors."""
    slots = _Slots(module)
    seen: set[int] = {id(module)}

    def walk(parent: torch.nn.Module) -> None:
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) in seen and any(True for _ in (*child.parameters(), *child.buffers())):
                slots.remember(parent, change)
                child = parent._modules[name] = _twin(child)
            seen.add(id(child))
            walk(child)

    walk(module)


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """The same module once more: own slots, the same tensors in them; its children are twins later, when walked."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[name] = copy.copy(module.__dict__[name])
    return twin


def _undo_transposed(module: torch.nn.Module, names: set[str], change: Change) -> None:
    """Transposed ties of ours that were untied: the plain name, in its own layout again."""
    from torch.nn.utils import parametrize

    from tieaudit.transposition import Transposition

    for path, owner in list(module.named_modules()):
        if not parametrize.is_parametrized(owner):
            continue
        parametrized: Any = owner.parametrizations
        for leaf in list(parametrized):
            name = f"{path}.parametrizations.{leaf}.original".lstrip(".")
            if name in names and [type(step) for step in parametrized[leaf]] == [Transposition]:
                change._undo += [_restorer(parametrized), _restorer(owner)]
                _put_plain(owner, leaf)


def _put_plain(owner: torch.nn.Module, leaf: str) -> None:
    """Take our parametrization away from one slot. `remove_parametrizations` deletes a property of the class.

    That class is shared with every deep copy of the module, which would lose its weight (seen in torch 2.13).
    """
    import torch

    parametrized: Any = owner.parametrizations
    original = parametrized[leaf].original
    del parametrized[leaf]
    kind = type(owner)
    if len(parametrized):
        content = {name: value for name, value in vars(kind).items() if name not in (leaf, "__dict__", "__weakref__")}
        owner.__class__ = type(kind.__name__, kind.__bases__, content)
    else:
        del owner._modules["parametrizations"]
        owner.__class__ = kind.__bases__[0]
    owner._parameters[leaf] = torch.nn.Parameter(original.detach().mT.contiguous(), original.requires_grad)


def _with_notes(plan: Plan, edits: Sequence[Edit], module: torch.nn.Module) -> Plan:
    notes = list(plan.notes)
    flag = getattr(getattr(module, "config", None), _FLAG, None)
    if edits and flag is not None:
        notes.append(f"the module's config.{_FLAG} is {flag} and was left alone; save_pretrained and loading follow it")
    if edits:
        notes.append("an optimizer made before now holds the old parameters: make it anew")
    return replace(plan, edits=tuple(edits), notes=tuple(dict.fromkeys(notes)))
