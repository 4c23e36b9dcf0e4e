"""One member's values survive everywhere."""

from __future__ import annotations

from collections.abc import Collection

from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.merges import Merge, Merged, Sites
from tieaudit.registry import nearest

_ROLES = {"head": "output_head", "embedding": "token_embedding"}
_PLACES = ("first", "last")
_HINT = "keep:head, keep:embedding, keep:first, keep:last, or keep: and the id of one of them"


def _check(argument: str, ids: Collection[str]) -> None:
    if argument in _ROLES or argument in _PLACES or argument in ids:
        return
    if not argument:
        raise UsageError("--merge keep: expected a member behind a colon, found none", hint=_HINT)
    found = f"no weight of the model is called {argument}"
    raise UsageError(
        f"--merge keep:{argument}: {found}",
        hint="; ".join(filter(None, (nearest(argument, (*_ROLES, *_PLACES, *ids)), _HINT))),
    )


def _merge(sites: Sites, argument: str) -> Merged:
    if argument in _PLACES:
        index: int | None = 0 if argument == "first" else len(sites.ids) - 1
    elif argument in _ROLES:
        index = sites.index_of(_ROLES[argument])
    else:
        index = sites.ids.index(argument) if argument in sites.ids else None
    if index is None:
        what = (
            f"is a {_ROLES[argument]}" if argument in _ROLES else f"is called {argument}" if argument else "was named"
        )
        question = nearest(argument, (*_ROLES, *_PLACES, *sites.ids))
        raise RewriteRefused(
            f"--merge keep:{argument}: none of {', '.join(sites.ids)} {what}" + (f"; {question}" if question else ""),
            hint=_HINT,
        )
    return Merged(sites.tables[index].rows, keeps=index)


keep = Merge(
    name="keep",
    argument="head|embedding|first|last|ID",
    summary="one member's values survive everywhere, bit for bit",
    source="Press & Wolf 2017, section 4, and Lopardo et al. 2026 (arXiv 2603.26663): a tied matrix evolves like the "
    "output "
    "embedding, so the head is the better survivor; keep:embedding is what transformers 4.57 does "
    "(_tie_or_clone_weights)",
    merge=_merge,
    check=_check,
    page="""keep:head, keep:embedding, keep:first, keep:last, keep:ID

The damage falls on all other sites. On two small language models trained untied, keep:head costs 1.5 and 1.6 nats per
token and keep:embedding 27 and 4.2 (docs/merging.md).""",
)
