"""Every name of a tensor that a share is about: a tie made of one of them is a tie of all."""

from __future__ import annotations

from dataclasses import replace

from tieaudit.change import Share
from tieaudit.model import Member
from tieaudit.verdict import Subject
from tieaudit.view import AS_STORED, View


def with_other_names(subject: Subject, share: Share) -> Share:
    """The share with every other name of its members' memory, which would stay behind with the old value.

    In a graph nothing stays behind: what reads a weight reads it under the one name that the graph knows.
    """
    views = {member.id: member.view for member in share.members}
    adjustments = dict(share.adjustments)
    aliased = [tie for tie in subject.found.ties if tie.origin == "aliased" and len(tie.ids) > 1]
    for tie in aliased if not subject.model.has_graph else ():
        inside = next((one for one in tie.members if one.id in views), None)
        if inside is None or not all(_swaps(one.view) for one in tie.members):
            continue
        back = views[inside.id].compose(inside.view)  # from the common value to that of the tie: a swap is its inverse
        for other in tie.members:
            views.setdefault(other.id, back.compose(other.view))
            if inside.id in adjustments:
                adjustments.setdefault(other.id, adjustments[inside.id])
    more = [Member(id, view) for id, view in views.items() if id not in {one.id for one in share.members}]
    return replace(share, members=(*share.members, *more), adjustments=adjustments)


def _swaps(view: View) -> bool:
    """Whether a view is its own inverse: as stored, or transposed."""
    return view == AS_STORED or view.transposes
