"""What a Hugging Face folder can hold for which transformers: reasons against an edit, and the setting that lifts one.

A dropped name comes back only if the class ties it with this configuration. A dropped name that the class does not
declare is initialised randomly (reproduced with Llama and Qwen2 under 4.57 and 5.23), whatever `__metadata__` says.
"""

from __future__ import annotations

import re

from tieaudit.change import Edit, Equalise, Pool, Respell, SetConfig, Share, Unshare
from tieaudit.formats import NEEDS_SETTING
from tieaudit.formats.huggingface import write_pickled
from tieaudit.formats.huggingface.facts import FLAG
from tieaudit.formats.huggingface.folder import CONFIG
from tieaudit.formats.huggingface.pickled import WHAT as PICKLED
from tieaudit.model import Declaration, Model, Weight
from tieaudit.printable import listed
from tieaudit.storage import same_bytes
from tieaudit.view import AS_STORED

LOADERS = {"transformers-5": "transformers 5", "transformers-4": "transformers 4"}
_SCALED_WHEN_TIED = frozenset(
    "t5 mt5 umt5 longt5 switch_transformers pop2piano udop kosmos-2.5 pix2struct_text_model".split()
)
"""Model types whose decoder output 4.57 scales by 1/√d_model exactly if the flag is on (reproduced with T5)."""
_COMPANION = re.compile(r"scale|zero|qzeros|g_idx|absmax|quant|SCB|meta$|lut|perm", re.IGNORECASE)
"""Names of the tensors that quantisers store beside a packed one."""


def can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Why this edit cannot be made for the target, in one sentence, or None. Begins with `needs flag: ` if a setting
    (see `switch`) would lift it."""
    reason = of_class(model, edit, target)
    if model.metadata.get("weights") == PICKLED and isinstance(edit, Pool):
        return (
            f"{listed(tuple(one.id for one in edit.weights))} lies in a pickle, where a tensor keeps its shape: "
            "--container safetensors pools it"
        )
    if model.metadata.get("weights") == PICKLED and isinstance(edit, (Share, Equalise, Unshare)):
        if reason is None or reason.startswith(NEEDS_SETTING):
            return write_pickled.reason(model, edit) or reason
    return reason


def of_class(model: Model, edit: Edit, target: str) -> str | None:
    """Reasons that lie in what the class makes of the folder, whatever the weights are kept in."""
    if isinstance(edit, Share):
        return _unknown(model) or _share(model, edit, target)
    if isinstance(edit, Equalise):
        return _equalise(model, edit)
    if isinstance(edit, Unshare):
        return _unshare(model, edit)
    if isinstance(edit, Pool):
        lost = [one.id for one in edit.weights if one.id not in model.by_id or model.by_id[one.id].absent]
        return f"{listed(tuple(lost))} is not stored" if lost else None
    if isinstance(edit, Respell):
        return "a Hugging Face folder holds no graph, so there is nothing to express differently"
    return None if edit.file == CONFIG else f"only {CONFIG} can be changed, not {edit.file}"


def _unknown(model: Model) -> str | None:
    """A class whose ties are only guessed must not lose a tensor over the guess."""
    if not model.metadata.get("transformers", "").endswith("convention"):
        return None
    name = model.metadata.get("architecture") or "the class"
    return f"{name} is known neither to an installed transformers nor to the data files, so nothing restores a tie"


def _share(model: Model, edit: Share, target: str) -> str | None:
    ids = tuple(dict.fromkeys(member.id for member in edit.members))
    if any(member.view != AS_STORED for member in edit.members):
        return "a Hugging Face folder cannot hold a transposed tie: transformers ties parameters as they are"
    stored = [model.by_id[id] for id in ids if not model.by_id[id].absent]
    if not stored:
        return f"none of {', '.join(ids)} is stored"
    reason = _same_kind(stored) or _quantised(model, stored)
    if reason:
        return reason
    covering = [one for one in model.declarations if set(ids) <= set(one.members) and _restorable(one, target)]
    if any(one.active and LOADERS[target] in one.honoured_by for one in covering):
        return _canonical_is_kept(next(one for one in covering if one.active), model, target)
    switched = [one for one in covering if not one.active and one.condition]
    if switched:
        name = model.metadata.get("architecture", "the class")
        return f"{NEEDS_SETTING}{name} ties these only with {switched[0].condition}"
    return _undeclared(model, ids, target)


def _equalise(model: Model, edit: Equalise) -> str | None:
    """Why the members cannot hold one value each: of a name that is not stored only its class decides the value."""
    weights = [model.by_id[member.id] for member in edit.members]
    absent = [weight.name for weight in weights if weight.absent]
    if absent:
        return f"{', '.join(absent)} is not stored"
    first = weights[0]
    for weight, member in zip(weights, edit.members, strict=True):
        if weight.dtype != first.dtype or member.view.shape(first.shape) != weight.shape:
            return (
                f"{first.id} is {first.dtype} {list(first.shape)} and {weight.id} is {weight.dtype} "
                f"{list(weight.shape)}: they cannot hold one value"
            )
    return _quantised(model, weights)


def held_by(model: Model) -> str:
    """Who makes what of equal values under several names (docs/decisions/ties-without-config.md)."""
    return (
        "transformers loads exactly these values, into a parameter for each name, which training moves apart; the "
        "alias map in the metadata of safetensors notes which names are one, for tieaudit and people, and no loader "
        "reads it; for one parameter, tie the live module (tieaudit.tie(model, scheme=…)) and save it as a checkpoint"
    )


def _restorable(declaration: Declaration, target: str) -> bool:
    """A claim of the class; an alias map in `__metadata__` restores nothing."""
    if declaration.active:
        return LOADERS[target] in declaration.honoured_by
    return bool(declaration.condition)


def _same_kind(stored: list[Weight]) -> str | None:
    first = stored[0]
    for other in stored[1:]:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            return (
                f"{first.id} is {first.dtype} {list(first.shape)} and {other.id} is {other.dtype} {list(other.shape)}: "
                "one parameter cannot be both"
            )
    return None


def _quantised(model: Model, stored: list[Weight]) -> str | None:
    """A packed tensor means nothing without its scales, and nobody restores those."""
    if len(stored) < 2:
        return None
    for weight in stored:
        module, _, leaf = weight.name.rpartition(".")
        for other in model.by_module.get(module, ()):
            name = other.name.rpartition(".")[2]
            if name != leaf and not other.absent and _COMPANION.search(name):
                return f"{weight.name} is quantised: {other.name} belongs to it and would not be restored with it"
    return None


def _canonical_is_kept(declaration: Declaration, model: Model, target: str) -> str | None:
    canonical = model.by_id[declaration.members[0]]
    if target == "transformers-4" and canonical.absent:
        return (
            f"{canonical.name} is not stored, and transformers 4 restores only from that name (it leaves it "
            "uninitialised otherwise); 5.x restores in both directions"
        )
    return None


def _undeclared(model: Model, ids: tuple[str, ...], target: str) -> str:
    name = model.metadata.get("architecture") or "the class"
    kept, dropped = ids[0], listed(ids[1:])
    declared = [one for one in model.declarations if set(ids) <= set(one.members) and one.active and one.honoured_by]
    if declared:
        return f"{LOADERS[target]} does not tie {dropped} to {kept}: {declared[0].because}"
    if model.metadata.get("weights") == PICKLED:
        return (
            f"the class {name} does not tie {dropped} to {kept}: transformers would load one storage as two parameters "
            "that share their memory, and an optimizer would change it twice"
        )
    return (
        f"transformers would initialise {dropped} randomly: the class {name} does not tie it to {kept} "
        "(a dropped name that the class does not declare comes back random)"
    )


def _unshare(model: Model, edit: Unshare) -> str | None:
    weight = next((one for one in model.weights if one.name == edit.name), None)
    if weight is None:
        return f"{model.metadata.get('architecture') or 'the class'} has no tensor {edit.name}"
    source = model.by_id.get(edit.source)
    if source is None or source.storage is None:
        return f"{edit.source} is not stored"
    shared = weight.storage is not None and weight.storage.region == source.storage.region
    return None if weight.absent or shared else f"{edit.name} is stored already"


def switch(model: Model, ids: tuple[str, ...], tied: bool, target: str) -> tuple[SetConfig, ...] | str:
    """The settings after which the class ties (or does not tie) these ids; a reason where that would do more than that.

    Cost: compares stored members of other ties that the same setting would switch on, in blocks.
    """
    if unknown := _unknown(model):
        return unknown
    covering = [one for one in model.declarations if set(ids) <= set(one.members) and _is_of_class(one)]
    if not covering and not tied and not any(model.by_id[id].absent for id in ids):
        return ()  # names of one storage in a pickle, which no class ties
    if not covering:
        return f"no setting of {model.metadata.get('architecture') or 'the class'} ties {' and '.join(ids)}"
    wrong = [one for one in covering if one.active != tied]
    if not wrong:
        return ()
    fixed = [one for one in wrong if not one.condition]
    if fixed:
        return f"no setting changes this: {fixed[0].because}"
    conditions = tuple(dict.fromkeys(one.condition for one in wrong))
    for condition in conditions:
        others = [one for one in model.declarations if one.condition == condition and one not in covering]
        reason = _on(model, ids, wrong, others, target) if tied else _off(model, ids, wrong, others)
        if reason:
            return reason
    wanted = "tied" if tied else "not tied"
    return tuple(
        SetConfig(
            CONFIG, tuple(c.removeprefix(f"{CONFIG}:").split(".")), tied, f"{' and '.join(ids)} are to be {wanted}"
        )
        for c in conditions
    )


def _is_of_class(declaration: Declaration) -> bool:
    return bool(declaration.condition) or declaration.restores or not declaration.documented


def _on(
    model: Model, ids: tuple[str, ...], wrong: list[Declaration], others: list[Declaration], target: str
) -> str | None:
    """What else switching the flag on would do; `ids` are becoming one value by the same plan."""
    model_type = model.metadata.get("model_type", "")
    if target == "transformers-4" and model_type in _SCALED_WHEN_TIED:
        return (
            f"under transformers 4, {FLAG} also scales the logits of {model_type} by 1/√d_model: outputs would change"
        )
    for declaration in (*wrong, *others):
        stored = [model.by_id[id] for id in declaration.members if not model.by_id[id].absent]
        if {weight.id for weight in stored} <= set(ids):
            continue
        for other in stored[1:]:
            if not _same_bytes(stored[0], other):
                return (
                    f"{declaration.condition} would also tie {other.id} to {stored[0].id}, which are stored with "
                    "different values"
                )
    return None


def _off(model: Model, ids: tuple[str, ...], wrong: list[Declaration], others: list[Declaration]) -> str | None:
    """What else switching the flag off would do: absent members of its ties would come back random.

    Where some of `ids` are absent themselves, copies of all absent members are being planned; `edit` checks the sum.
    """
    if any(model.by_id[id].absent for id in ids):
        return None
    for declaration in (*wrong, *others):
        absent = [id for id in declaration.members if model.by_id[id].absent]
        if declaration.active and absent:
            return (
                f"without {declaration.condition} transformers would initialise {', '.join(absent)} randomly, "
                "which the file does not store"
            )
    return None


def _same_bytes(one: Weight, other: Weight) -> bool:
    if one.storage is None or other.storage is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return same_bytes(one.storage, other.storage)
