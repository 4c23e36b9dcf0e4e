"""All layers of a stack use one set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.errors import UsageError
from tieaudit.schemes import Scheme
from tieaudit.stacks import ATTENTION, FEED_FORWARD, of_kinds, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    which, n_groups = _read(argument)
    chosen = {"": whole, "attention": of_kinds(ATTENTION), "ffn": of_kinds(FEED_FORWARD)}[which]

    def plan_of(n_layers: int) -> Sequence[int] | str:
        if n_groups > n_layers:
            return f"fewer than the {n_groups} groups that were asked for"
        return [layer * n_groups // n_layers for layer in range(n_layers)]

    yield from share_layers(subject, "albert", chosen, plan_of)


def _read(argument: str) -> tuple[str, int]:
    """`attention`, `ffn`, a number of groups, or both with a comma. UsageError."""
    which, n_groups = "", 1
    for word in filter(None, argument.split(",")):
        if word in ("attention", "ffn"):
            which = word
        elif word.isascii() and word.isdigit() and int(word[:9]):
            n_groups = int(word[:9])
        else:
            raise UsageError(
                f"--scheme albert:{argument}: expected attention, ffn or a number of groups, found {word!r}"
            )
    return which, n_groups


albert = Scheme(
    name="albert",
    argument="attention|ffn|GROUPS",
    worth_comparing=lambda subject: ("", "attention", "ffn"),
    merge="mean",
    summary="all layers of a stack use one set of weights, or one set for each group of layers",
    source="Lan et al. 2020, ALBERT (ICLR), section 3.1 and table 4 (all, attention only, FFN only); "
    "num_hidden_groups of its configuration",
    propose=_propose,
    page="""albert: every layer uses the same weights.

albert shares attention, feed-forward and both norms; albert:attention and albert:ffn only these (sharing the FFN
causes most of the drop: table 4). albert:4 makes four groups of neighbouring layers, as num_hidden_groups does; the
group of layer ℓ of N is ⌊ℓ·4/N⌋. After training this is destructive unless the model is trained further.""",
)
