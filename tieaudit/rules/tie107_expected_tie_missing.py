"""The policy expects a tie that the model does not have."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.equality import Equality, declared
from tieaudit.model import Model, classes
from tieaudit.printable import listed, printable, size
from tieaudit.registry import choose, discover
from tieaudit.remedy import rewrite, share
from tieaudit.rules import Examples, rule
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, CannotTell, Demands, Finding, Fix, Subject


def _examples() -> Examples:
    from tieaudit.toy import Away, Broken, claim, ramp, toy

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    w = ramp(64, 8)
    io = Demands(expect=("io",))
    return Examples(
        bad=[
            toy({embed: w, head: w.T.copy()}, uses=[(embed, "Gather"), (head, "MatMul")], format="onnx", demands=io),
            toy({embed: w, head: ramp(64, 8, seed=1)}, declared=[claim(embed, head, active=False)], demands=io),
            toy({embed: w, head: w.copy()}, declared=[claim(embed, head, active=False)], demands=io),
        ],
        good=[
            toy({embed: w}, uses=[(embed, "Gather"), (embed, "Gemm")], format="onnx", demands=io),
            toy({embed: w, head: None}, declared=[(embed, head)], demands=io),
            toy({embed: w, head: w.copy()}, declared=[(embed, head)], demands=io),
            toy({embed: w, head: ramp(64, 8, seed=1)}),
        ],
        unsure=[
            toy({"conv.weight": ramp(8, 4)}, demands=io),
            toy({embed: w, head: ramp(60, 8)}, demands=io),
            toy({embed: w, head: Broken((64, 8))}, declared=[claim(embed, head, active=False)], demands=io),
            toy({embed: Away((64, 8)), head: Away((64, 8))}, declared=[(embed, head)], demands=io),
        ],
    )


@rule(
    "TIE107",
    "expected-tie-missing",
    severity="error",
    since="0.1",
    examples=_examples,
)
def check(subject: Subject) -> Iterator[Finding | CannotTell]:
    """The policy expects a tie that the model does not have.

    What it does:
        Reports weights that a scheme named under `expect` would make one, and that are not one in this model.

    Why it matters:
        Exporters, optimisers, loaders and merges lose ties without a word, and the model goes on working, only larger,
        or with a head that is no longer trained with its embedding. Whoever ships the model knows that it is meant to
        be tied; written down, that knowledge is checked with each release.

    How it is decided:
        The scheme proposes its classes, and each must be one already: one stored tensor, a name that the loader
        restores, or stored copies that are declared to be one and equal bit for bit. An equal copy that nobody
        declares is not a tie: the next training step makes it two matrices.

    Example:
        tieaudit.toml says expect = ["io"], and the ONNX export stores the embedding and its transpose.

    Fix:
        Equal copies become one with the scheme `dedup`, and no value changes. Weights that differ were never tied, or
        have been trained apart: tie them where they are trained, or with `--allow-lossy` and a `--merge`.

    Cannot tell when:
        The scheme finds nothing in this model that it could tie: no output head was recognised, shapes do not fit. Or
        the bytes of a member cannot be read, or are elsewhere (git-LFS, DVC), and those that were read do not differ.

    Sources:
        onnx/onnx#3278 (an exported ALBERT stores its one layer several times), onnx/onnx#4149 and
        huggingface/transformers#16841 (an export doubles the embedding): ties lost on the way, unnoticed.
    """
    for asked in subject.demands.expect:
        name, _, argument = asked.partition(":")
        scheme = choose(discover("schemes", Scheme), name, "scheme")
        proposals = list(scheme.propose(subject, argument))
        # a pair whose shapes differ is shown, and never written: whether it was one tensor cannot be told
        candidates = [one for one in proposals if isinstance(one, Candidate) and one.action != "fit"]
        missing = [one for one in candidates if not _one(subject, one)]
        for candidate in missing:
            hidden = _undecided(subject, candidate)
            if hidden:
                because = f"the bytes of {listed(hidden)} cannot be read"
                yield CannotTell(f"whether the expected tie {printable(asked)} is there: {because}", hidden)
            else:
                yield _finding(subject, asked, candidate)
        if not candidates:
            refusals = [one.because for one in proposals]
            if refusals or not _any_tie(subject):
                because = refusals[0] if refusals else "nothing in this model is tied, and nothing fits"
                yield CannotTell(f"whether the expected tie {asked} is there: {because}")


def _undecided(subject: Subject, candidate: Candidate) -> tuple[str, ...]:
    """Members that nobody has seen, where those that were seen may still be one tensor with them."""
    ids = tuple(dict.fromkeys(member.id for member in candidate.members))
    hidden = subject.unseen(ids)
    seen = [id for id in ids if id not in hidden]
    equality = Equality(subject.model, subject.found)
    if any(equality.same(seen[0], id) is False for id in seen[1:]):
        return ()
    return tuple(hidden)


def _one(subject: Subject, candidate: Candidate) -> bool:
    """Whether the members are one already, by construction or by a declaration that is true."""
    ids = {member.id for member in candidate.members}
    return any(ids <= set(members) for members in _tied(subject))


def _tied(subject: Subject) -> list[tuple[str, ...]]:
    """Classes that are tied: the one definition of the word, plus true declarations of what is stored twice."""
    groups = [tie.ids for tie in subject.found.ties if tie.origin in ("aliased", "absent")]
    equality = Equality(subject.model, subject.found)
    for claimed in declared(subject.model, active=True):
        here = [id for id in claimed.members if not subject.model.by_id[id].absent]
        groups += [tuple(group) for group in equality.groups(here) if len(group) > 1]
    return classes(groups)


def _any_tie(subject: Subject) -> bool:
    """Whether anything is one: what proposes nothing because all is done differs from what knows nothing."""
    return bool(_tied(subject)) or any(tie.origin in ("aliased", "absent") for tie in subject.found.ties)


def _finding(subject: Subject, asked: str, candidate: Candidate) -> Finding:
    model = subject.model
    ids = tuple(dict.fromkeys(member.id for member in candidate.members))
    many = candidate.n_bytes_saved
    if candidate.lossless:
        views = [member.view for member in candidate.members]
        fix = rewrite(model, "dedup", [share(ids, views)])
        how = f"equal, but stored more than once and declared by nobody ({size(many)} again)"
    else:
        fix = Fix("manual", _by_hand(model, asked))
        how = "not equal"
    message = f"the policy expects {printable(asked)}: {listed(ids)} should be one tensor and are {how}"
    evidence = {"scheme": asked, "lossless": candidate.lossless}
    return Finding(ids, message, fix, evidence, many)


def _by_hand(model: Model, asked: str) -> str:
    from tieaudit.remedy import command

    return f"they were trained apart; to tie them all the same: {command(model, '--scheme', asked, '--allow-lossy')}"
