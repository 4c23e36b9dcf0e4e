"""Carry out a plan on ONNX files: share, unshare and respell weights, then write everything into a new folder.

`can_realise` asks the same functions that `edit` acts by, so that what is planned can be done. Which layout is stored,
and how the other consumers read it, is decided in `share` and `patterns`.
"""

from __future__ import annotations

from pathlib import Path

from tieaudit.change import Edit, Plan, Pool, Respell, Share, Unshare, Written
from tieaudit.errors import RewriteRefused
from tieaudit.formats.onnx import correct, pool, repack, respell, share, unshare
from tieaudit.formats.onnx.bench import Bench, for_looking
from tieaudit.formats.onnx.patterns import Style
from tieaudit.formats.onnx.write import write
from tieaudit.model import Model


def can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Why this edit of the original cannot be made, in a sentence, or None.

    Cost: linear in the consumers of the weights; the files are parsed once per model, without their tensors.
    """
    return _why_not(for_looking(model), model, edit, "auto")


def edit(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned model into the new folder `dest`.

    Raises RewriteRefused, before anything is written, if an edit cannot be made; CorruptFile if bytes are missing.
    Cost: each tensor is read and written once, in blocks.
    """
    bench = Bench(model.parts)
    style: Style = plan.transposed_as
    if style == "fused" and not plan.target.startswith("ort"):
        raise RewriteRefused(
            f"expected a plan for ONNX Runtime, whose own operation FusedMatMul is asked for, found {plan.target!r}",
            hint="leave out --transposed-as fused, or choose the target ort-cpu",
        )
    for one in plan.edits:
        reason = _act(bench, model, one, plan, style)
        if reason is not None:
            raise RewriteRefused(f"{model.path}: {reason}", hint="nothing was written")
    files = write(model, list(bench.pieces.values()), dest, plan.data_names)
    records, renamed = bench.records, bench.renamed()
    made = records.rewritten(model.uses), records.adjusted(), records.repeated()
    return Written(files.written, renamed, *made, copied=files.copied)


def _why_not(bench: Bench, model: Model, edit: Edit, style: Style) -> str | None:
    found: object
    if isinstance(edit, Share):
        one_packing = repack.is_repacking(edit)
        found = correct.decide(bench, model, edit)
        if isinstance(found, str):
            return found
        found = repack.decide(bench, model, edit) if one_packing else share.decide(bench, model, edit, style)
    elif isinstance(edit, Respell):
        found = respell.decide(bench, model, edit, style)
    elif isinstance(edit, Unshare):
        found = unshare.why_not(bench, model, edit)
    elif isinstance(edit, Pool):
        found = pool.decide(bench, model, edit)
    else:
        found = "an ONNX model has no settings to change: its ties are in its graph"
    return found if isinstance(found, str) else None


def _act(bench: Bench, model: Model, edit: Edit, plan: Plan, style: Style) -> str | None:
    """Make one edit; the reason if it cannot be made."""
    if isinstance(edit, Share) and repack.is_repacking(edit):
        packing = repack.decide(bench, model, edit)
        if isinstance(packing, str):
            return packing
        repack.repack(bench, packing)
    elif isinstance(edit, Share):
        corrected = correct.decide(bench, model, edit)
        if isinstance(corrected, str):
            return corrected
        correct.correct(bench, corrected)
        decision = share.decide(bench, model, edit, style)
        if isinstance(decision, str):
            return decision
        share.share(bench, decision, edit.values, plan.lossless, style)
    elif isinstance(edit, Respell):
        found = respell.decide(bench, model, edit, style)
        if isinstance(found, str):
            shared = {member.id for one in plan.edits if isinstance(one, Share) for member in one.members}
            # a share that changed the stored layout has taken the Transposes away already
            return None if found.startswith(respell.NO_TRANSPOSE) and edit.weight in shared else found
        if isinstance(found, share.Decision):
            share.share(bench, found, None, True, style)
        else:
            respell.respell(bench, found, style)
    elif isinstance(edit, Unshare):
        reason = unshare.why_not(bench, model, edit)
        if reason is not None:
            return reason
        unshare.unshare(bench, model, edit)
    elif isinstance(edit, Pool):
        places = pool.decide(bench, model, edit)
        if isinstance(places, str):
            return places
        pool.pool(bench, model, edit, places)
    else:
        return _why_not(bench, model, edit, style)
    return None
