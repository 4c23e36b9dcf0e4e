"""Stage: a model and another container → the plan of a conversion that keeps every tie the container can keep.

What a container can say about ties differs: a checkpoint of PyTorch holds one storage under several names, safetensors
holds every tensor once and leaves the other names to whoever loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tieaudit.arrange import arranged
from tieaudit.change import Container, Edit, Kind, Plan, Share, Unshare
from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.formats import Format
from tieaudit.formats.torch_checkpoint.create import can_create as cannot_share_storage
from tieaudit.formats.torch_module.state import HOLDS, STATE_DICT
from tieaudit.merges import Calibrated
from tieaudit.model import Declaration, Member, Model, Tie, Weight, classes, storage_of
from tieaudit.plan import Choices
from tieaudit.plan import plan as make_plan
from tieaudit.registry import choose, discover
from tieaudit.storage import no_values, same_bytes
from tieaudit.verdict import Subject
from tieaudit.view import AS_STORED

KINDS: tuple[Kind, ...] = ("safetensors", "torch")
_BY_SUFFIX: dict[str, Kind] = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch",
}  # fmt: skip
_OWN: dict[str, Kind] = {"safetensors": "safetensors", "torch_checkpoint": "torch"}
_FORMATS: dict[Kind, str] = {"safetensors": "safetensors", "torch": "torch_checkpoint"}
_ENDINGS: dict[Kind, str] = {"safetensors": ".safetensors", "torch": ".pt"}
_FOLDER, _LIVE = "huggingface", "torch_module"
_N_MOST_NAMED = 6


def container_for(model: Model, destination: Path | None, given: Kind | None = None) -> Container | None:
    """What the destination's name, or `given`, makes of the model; None where it stays what it is.

    UsageError where the two disagree, or a live module is to be written under a name that says nothing.
    """
    named = _BY_SUFFIX.get(destination.suffix.lower()) if destination is not None else None
    if model.format == _FOLDER:
        if given is None or given == _own(model):
            return None
        from tieaudit.formats.huggingface.create import left_out

        return Container(given, "", left_out(Path(model.path), given))
    if given is not None and named not in (None, given):
        raise UsageError(f"{destination}: expected a name for the container {given}, found one for {named}")
    if model.format not in (*_OWN, _LIVE):
        if given is not None:
            raise UsageError(f"{model.path}: expected tensors in a file or a Hugging Face folder, found {model.format}")
        return None
    if model.format == _LIVE and model.metadata.get(HOLDS) != STATE_DICT:
        if destination is None and given is None:
            return None
        raise RewriteRefused(
            f"{model.path}: its module is built in another process, and what its state dict holds is not known here",
            hint="in Python, tieaudit.apply(module, to=…) writes it",
        )
    own = _own(model)
    if given is None and named in (None, own) or given == own == "safetensors":
        if model.format == _LIVE and destination is not None:
            raise UsageError(f"{destination}: expected a name that ends in {', '.join(_BY_SUFFIX)}")
        return None
    kind = given or named
    if kind is None:
        return None
    stem = Path(model.path).name.removesuffix(".index.json").removesuffix(Path(model.path).suffix)
    file = destination.name if destination is not None and named == kind else stem + _ENDINGS[kind]
    return Container(kind, file)


def _own(model: Model) -> Kind | None:
    if model.format == _FOLDER:
        return "torch" if model.metadata.get("weights") == "pickled" else "safetensors"
    return _OWN.get(model.format)


def format_of(model: Model, into: Container) -> Format:
    """The format that writes and reads the container."""
    name = _FOLDER if model.format == _FOLDER else _FORMATS[into.form]
    found: Format = choose(discover("formats", Format), name, "format")
    return found


@dataclass
class _Draft:
    """A conversion in the making."""

    subject: Subject
    into: Container
    format: Format
    target: str
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubled: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return self.subject.model

    def reason(self, edit: Edit) -> str | None:
        """Why a tie that is there cannot be kept. One storage under several names stays what it was, whatever a class
        makes of them: it was that in memory."""
        if self.into.form == "torch":
            return cannot_share_storage(self.model, edit, self.into.form, self.target)
        return self.reason_for_new(edit)

    def reason_for_new(self, edit: Edit) -> str | None:
        """Why an edit of a scheme cannot be made."""
        if self.format.can_create is None:
            return f"the format {self.format.name} cannot be written"
        return self.format.can_create(self.model, edit, self.into.form, self.target)


def convert(
    subject: Subject, into: Container, choices: Choices | None = None, calibrated: Calibrated | None = None
) -> Plan:
    """The plan of a conversion: what `choices` tie or untie first (None: nothing), then every tie that is there.

    RewriteRefused, naming the tensor, if the container cannot hold one of them. Cost: reads no tensor beyond what the
    schemes read.
    """
    model, format_ = subject.model, format_of(subject.model, into)
    target = (choices.target if choices is not None else None) or format_.targets[0]
    _check_each(model, into)
    draft = _Draft(subject, into, format_, target)
    made = Plan(model.path, target, (), (), 0, True)
    if choices is not None:
        # the container's word counts: a checkpoint can hold a tie that a lone safetensors file cannot, say
        asked = replace(
            format_,
            can_realise=lambda model, edit, target: draft.reason_for_new(edit),
            edit=format_.edit or format_.create,
            notes=None,  # of what lies beside the tensors, which stays behind
        )
        made = make_plan(subject, choices, asked, calibrated=calibrated)
    apart = {edit.name for edit in made.edits if isinstance(edit, Unshare)}
    apart |= {edit.source for edit in made.edits if isinstance(edit, Unshare)}
    for edit in _whole(draft, made.edits):
        draft.edits.append(_kept_first(draft, edit) if isinstance(edit, Share) else edit)
    taken = {member.id for edit in draft.edits if isinstance(edit, Share) for member in edit.members}
    for tie in _ties(subject):
        left = tuple(one for one in tie.members if one.id not in taken and model.by_id[one.id].name not in apart)
        if len(left) > 1 and not apart & {model.by_id[one.id].id for one in left}:
            _keep(draft, replace(tie, members=_anchored(left)))
            taken.update(one.id for one in left)
    _mention_views(draft)
    if into.form == "safetensors" and into.file:
        draft.notes += list(_mention_loaders(draft))
    draft.notes += list(_not_carried(model, into))
    made = replace(
        made,
        schemes=(*made.schemes, f"convert to {into.form}"),
        edits=tuple(draft.edits),
        notes=tuple(dict.fromkeys((*made.notes, *draft.notes))),
        into=replace(into, doubled=draft.doubled),
    )
    return replace(made, n_bytes_saved=_n_stored(model.weights) - _n_bytes_after(model, made, into.form))


def _n_stored(weights: Iterable[Weight]) -> int:
    """Bytes of all tensors, each region once."""
    return sum({one.storage.region: one.storage.n_bytes for one in weights if one.storage is not None}.values())


def _n_bytes_after(model: Model, plan: Plan, kind: Kind) -> int:
    weights = arranged(model, plan).weights
    if kind == "torch":
        return _n_stored(weights)
    gone = {member.id for edit in plan.edits if isinstance(edit, Share) for member in edit.members[1:]}
    return sum(weight.n_bytes for weight in weights if weight.id not in gone)


def _whole(draft: _Draft, edits: tuple[Edit, ...]) -> Iterator[Edit]:
    """The edits of the schemes, each share with all names of the tensors that it ties."""
    ties = {one.id: tie for tie in _aliased(draft.subject) for one in tie.members}
    for edit in edits:
        if isinstance(edit, Share):
            known = {member.id for member in edit.members}
            more = [
                Member(other.id, member.view)
                for member in edit.members
                if (tie := ties.get(member.id)) is not None
                for other in tie.members
                if other.id not in known and other.view == _view_in(tie, member.id)
            ]
            edit = replace(edit, members=(*edit.members, *dict.fromkeys(more)))
        yield edit


def _view_in(tie: Tie, id: str) -> object:
    return next(one.view for one in tie.members if one.id == id)


def _aliased(subject: Subject) -> list[Tie]:
    return [tie for tie in subject.found.ties if tie.origin == "aliased" and len(tie.ids) > 1]


def _ties(subject: Subject) -> list[Tie]:
    """What is one tensor and must stay one: aliases, and names that are left out because somebody restores them."""
    model = subject.model
    found = _aliased(subject)
    for declaration in model.declarations:
        members = _restored(model, declaration)
        if len(members) > 1:
            found.append(Tie(tuple(Member(id) for id in members), "absent", declaration.because))
    together = classes(tie.ids for tie in found)
    views = {member.id: member for tie in reversed(found) for member in tie.members}
    return [Tie(tuple(views[id] for id in ids), "aliased", "one tensor") for ids in together]


def _restored(model: Model, declaration: Declaration) -> list[str]:
    """Members of a claim that a loader makes one anyway: the stored one, and the absent ones of its kind.

    Of an alias map (which restores nothing by itself) also the stored ones that are equal, as they were one tensor.
    Cost: reads those.
    """
    documented = declaration.documented
    if not declaration.active or not (declaration.restores or documented):
        return []
    stored = [model.by_id[id] for id in declaration.members if not model.by_id[id].absent]
    if not stored:
        return []
    first = stored[0]
    unclear = model.by_id[declaration.members[0]].absent
    equal = [one for one in stored[1:] if (documented or unclear) and _equal(one, first)]
    if unclear and len(equal) < len(stored) - 1:
        return []  # from which of them it would be restored depends on the loader
    absent = [one for id in declaration.members if (one := model.by_id[id]).absent and _alike(one, first)]
    return [first.id, *(one.id for one in absent), *(one.id for one in equal if documented)]


def _equal(one: Weight, other: Weight) -> bool:
    return _alike(one, other) and same_bytes(storage_of(one), storage_of(other))


def _alike(one: Weight, other: Weight) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _anchored(members: tuple[Member, ...]) -> tuple[Member, ...]:
    anchor = members[0]
    return (Member(anchor.id), *(Member(one.id, anchor.view.compose(one.view)) for one in members[1:]))


def _keep(draft: _Draft, tie: Tie) -> None:
    """Say one tie in the container: as one share if it can hold that, else as many smaller ones as it can."""
    left = list(tie.members)
    while len(left) > 1:
        found = _largest(draft, left)
        if found is None:
            break
        draft.edits.append(found)
        shared = {member.id for member in found.members[1:]}
        left = [one for one in left if one.id not in shared]
        if len(found.members) == 1:
            break
    stored = [one for one in left if not draft.model.by_id[one.id].absent]
    for other in stored[1:]:
        names = draft.model.by_id[other.id].name, draft.model.by_id[stored[0].id].name
        because = draft.reason(Share(_anchored((stored[0], other)))) or "the container cannot say it"
        draft.notes.append(f"{names[0]} and {names[1]} are one tensor and are written as two equal ones: {because}")
        if stored[0].view == other.view:
            draft.doubled[names[0]] = names[1]


def _largest(draft: _Draft, members: list[Member]) -> Share | None:
    """The share of most of these members that the container can hold: all, or those that a class ties."""
    model = draft.model
    groups = [members]
    alike: dict[object, list[Member]] = {}
    for member in members:
        alike.setdefault(member.view, []).append(member)
    groups += list(alike.values())
    groups += [[one for one in members if one.id in claim.members] for claim in model.declarations]
    for group in sorted(groups, key=len, reverse=True):
        if len(group) > 1 and any(not model.by_id[one.id].absent for one in group):
            share = _kept_first(draft, Share(_anchored(tuple(group)), None, "one tensor"))
            if draft.reason(share) is None:
                return share
    return None


def _kept_first(draft: _Draft, share: Share) -> Share:
    """The same share, anchored at the name that is stored: the class's own choice, else the first in order of names,
    as `save_model` has it. Values stay in the layout they are in."""
    model = draft.model
    stored = [one for one in share.members if not model.by_id[one.id].absent]
    if draft.into.form == "torch" or not stored or share.values is not None and share.members[0].view != AS_STORED:
        order = [*stored, *(one for one in share.members if one not in stored)]
    else:
        ids = {one.id for one in share.members}
        claimed = [id for claim in model.declarations if ids <= set(claim.members) for id in claim.members]
        stored.sort(
            key=lambda one: (claimed.index(one.id) if one.id in claimed else len(claimed), model.by_id[one.id].name)
        )
        order = [*stored, *(one for one in share.members if one not in stored)]
    if share.values is not None and order[0].view != AS_STORED:
        return share
    return replace(share, members=_anchored(tuple(order)))


def _mention_loaders(draft: _Draft) -> Iterator[str]:
    """Who gives a name that a lone safetensors file leaves out its tensor."""
    by_id = draft.model.by_id
    gone = [by_id[one.id].name for edit in draft.edits if isinstance(edit, Share) for one in edit.members[1:]]
    if gone:
        names = ", ".join(gone[:_N_MOST_NAMED]) + f" and {len(gone) - _N_MOST_NAMED} more" * (len(gone) > _N_MOST_NAMED)
        yield (
            f"{names}: left out and noted in __metadata__, as safetensors' save_model does; load_model restores "
            "that in a module that ties the names itself, load_file returns the stored names only; --scheme untie "
            "writes every name"
        )


def _mention_views(draft: _Draft) -> None:
    """Overlaps that the container cannot say."""
    if draft.into.form == "torch":
        return
    for overlap in draft.subject.found.overlaps:
        names = ", ".join(overlap.ids[:_N_MOST_NAMED])
        draft.notes.append(f"{names} share some of their bytes ({overlap.because}): each is written out in full")


def _check_each(model: Model, into: Container) -> None:
    """RewriteRefused for the first tensor that the container cannot hold."""
    from tieaudit.formats.safetensors.create import unwritable as no_safetensors
    from tieaudit.formats.torch_checkpoint.create import unwritable as no_checkpoint

    unwritable = no_safetensors if into.form == "safetensors" else no_checkpoint
    for weight in model.weights:
        if weight.storage is None:
            continue
        because = no_values(weight.storage) or unwritable(weight)
        if weight.held_as != "tensor":
            because = "it is a sparse tensor"
        if because:
            raise _cannot(model, into, weight.name, because)
    for file in _checkpoints(model):
        from tieaudit.formats.torch_checkpoint.create import key_of
        from tieaudit.formats.torch_checkpoint.state import state_of

        state = state_of(file, key_of(model))
        known = {weight.name for weight in model.weights}
        for name in state.names:
            because = state.problems.get(name)
            if because is None and name not in known:
                because = next((note for note in model.notes if note.startswith(f"{name}: ")), "it was not read")
            if because is not None:
                raise _cannot(model, into, name, because)


def _cannot(model: Model, into: Container, name: str, because: str) -> RewriteRefused:
    what = "a safetensors file" if into.form == "safetensors" else "a PyTorch checkpoint"
    return RewriteRefused(
        f"{model.path}: tensor {name!r} cannot be written to {what}: {because.removeprefix(f'{name}: ')}; "
        "nothing was written"
    )


def _checkpoints(model: Model) -> list[Path]:
    """The PyTorch files that hold the model's tensors."""
    if _own(model) != "torch":
        return []
    return [Path(path) for path in model.parts[0].paths if not path.endswith(".json")]


def _not_carried(model: Model, into: Container) -> Iterator[str]:
    """What lies beside the tensors and stays behind."""
    from tieaudit.formats.torch_checkpoint.create import key_of
    from tieaudit.formats.torch_checkpoint.state import state_of

    for file in _checkpoints(model):
        beside = state_of(file, key_of(model)).beside
        if beside:
            more = f" and {len(beside) - _N_MOST_NAMED} more" if len(beside) > _N_MOST_NAMED else ""
            yield f"not carried, as only tensors are: {', '.join(beside[:_N_MOST_NAMED])}{more} of {file.name}"
    if into.left_out:
        yield f"left behind, as it would be read in place of the result: {', '.join(into.left_out)}"
    absent = [weight.name for weight in model.weights if weight.absent and not _is_restored(model, weight.id)]
    if absent and model.format != _FOLDER:
        yield f"stored nowhere, and so not written: {', '.join(absent[:_N_MOST_NAMED])}"


def _is_restored(model: Model, id: str) -> bool:
    return any(id in one.members and one.active for one in model.declarations)
