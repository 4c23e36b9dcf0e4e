"""A tie that is declared, but whose stored tensors differ."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Declared, Equality, declared, stored
from tieaudit.printable import listed, printable, size
from tieaudit.remedy import LIVE, command, declare_untied
from tieaudit.rules import Examples, rule
from tieaudit.verdict import CannotTell, Finding, Fix, Subject

_LIVE_FIX = (
    "in Python: switch the flag off in module.config before saving, or make the tie true with "
    'tieaudit.tie(module, scheme="io", allow_lossy=True, merge="keep:embedding")'
)


def _examples() -> Examples:
    from tieaudit.toy import Broken, claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)
    one_bit_off = w.copy()
    one_bit_off.view("uint32")[5, 3] ^= 1

    return Examples(
        bad=[
            toy({embed: w, head: ramp(64, 8, seed=1)}, declared=[(embed, head)]),
            toy({embed: w, head: one_bit_off}, declared=[(embed, head)]),
            toy({"emb": w, "enc": w.copy(), "dec": ramp(64, 8, seed=2)}, declared=[("emb", "enc"), ("emb", "dec")]),
        ],
        good=[
            toy({embed: w, head: w.copy()}, declared=[(embed, head)]),
            toy({embed: w, head: None}, declared=[(embed, head)]),
            toy({embed: w, head: ramp(64, 8, seed=1)}, declared=[claim(embed, head, active=False)]),
        ],
        unsure=[
            toy({embed: w, head: Broken((64, 8))}, declared=[(embed, head)]),
            toy({embed: w, head: ramp(60, 8)}, declared=[(embed, head)]),
        ],
    )


@rule(
    "TIE101",
    "broken-tie",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """A tie that is declared, but whose stored tensors differ.

    What it does:
        Reports weights that the configuration or the class declares to be one, and that are stored with different
        bytes.

    Why it matters:
        The folder is two models. transformers 4.57 copies the embedding over the head and discards the stored head,
        without a word; transformers 5.x compares first, warns, and keeps both. Whoever trained the head loses it
        under one version and not under the other, and the next save makes the loss permanent.

    How it is decided:
        Exactly: canonical bytes, element type and shape. One differing bit is enough; there is no tolerance.

    Example:
        config.json says tie_word_embeddings = true, and model.safetensors holds an lm_head.weight of its own.

    Fix:
        `--scheme declare` makes the configuration tell the truth (what 5.x runs). To make the tie true instead:
        `--scheme io --allow-lossy --merge keep:embedding` (what 4.57 runs). Which of the two was meant, only the
        author of the model knows: compare their outputs first with `tieaudit verify`.

    Cannot tell when:
        The bytes of a member cannot be read, or the shapes differ, so that no loader could make them one.

    Sources:
        transformers modeling_utils.tie_weights (5.x compares with torch.equal) and _tie_or_clone_weights (4.57
        assigns); huggingface/transformers#42612, vllm-project/vllm#51063, huggingface/transformers#46456.
    """
    equality = Equality(subject.model, subject.found)
    for claimed in declared(subject.model, active=True):
        ids = stored(subject, claimed.members)
        if len(ids) < 2:
            continue
        shapes = {subject.model.by_id[id].shape for id in ids}
        if len(shapes) > 1:
            shown = ", ".join(f"{printable(id)} {list(subject.model.by_id[id].shape)}" for id in ids[:4])
            yield CannotTell(f"{claimed.claimed_by} declares a tie of tensors whose shapes differ: {shown}", ids)
            continue
        groups = equality.groups(ids)
        if any(equality.same(groups[0][0], group[0]) is False for group in groups[1:]):
            yield _finding(subject, claimed, groups)
        elif len(groups) > 1:
            lost = tuple(subject.unseen(ids))
            yield CannotTell(f"whether {listed(ids)} are equal, as declared: {listed(lost)} cannot be read", ids)


def _finding(subject: Subject, claimed: Declared, groups: list[list[str]]) -> Finding:
    model = subject.model
    same, rest = groups[0], tuple(id for group in groups[1:] for id in group)
    n_bytes = sum(model.by_id[id].n_bytes for id in rest)
    message = (
        f"{printable(claimed.claimed_by)} ties {listed((*same, *rest))}, but the stored {listed(rest)} "
        f"({size(n_bytes)}) differ{'s' if len(rest) == 1 else ''} from {printable(same[0])}"
    )
    message += _by_loader(claimed, listed(rest), printable(same[0]))
    fix = Fix("manual", "nothing switches this tie off: decide which tensor was meant, and store that one only")
    if model.format == LIVE:
        fix = Fix("manual", _LIVE_FIX)
    elif claimed.condition:
        fix = declare_untied(model, (*same, *rest))
    evidence = {
        "claimed_by": claimed.claimed_by,
        "condition": claimed.condition,
        "groups": [list(group) for group in groups],
        "to_make_the_tie_true": command(model, "--scheme", "io", "--allow-lossy", "--merge", "keep:embedding"),
    }
    return Finding((*same, *rest), message, fix, evidence, n_bytes)


def _by_loader(claimed: Declared, rest: str, kept: str) -> str:
    """What the versions of transformers that honour the claim make of it."""
    said = {
        "transformers 4": f"transformers 4.57 discards {rest} and uses {kept}",
        "transformers 5": "transformers 5.x keeps both and runs untied",
    }
    does = [text for loader, text in said.items() if any(name.startswith(loader) for name in claimed.honoured_by)]
    return f": {'; '.join(does)}" if does else ""
