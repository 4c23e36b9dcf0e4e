"""What makes a candidate lossless: measured or one region, and seen in the same way. A claim is no evidence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tieaudit.model import Member, Origin, Tie
from tieaudit.onevalue import OneValue
from tieaudit.propose import propose, schemes
from tieaudit.toy import At, ramp, toy
from tieaudit.verdict import Candidate, Subject
from tieaudit.view import AS_STORED, TRANSPOSED, Cast, View

SQUARE = ramp(16, 16)


def tie(origin: Origin, *members: tuple[str, View]) -> Tie:
    return Tie(tuple(Member(*one) for one in members), origin, "by hand")


@pytest.mark.parametrize("origin", ["declared", "absent", "proposed"])
def test_what_is_only_claimed_is_no_value(origin: Origin) -> None:
    assert not OneValue([tie(origin, ("a", AS_STORED), ("b", AS_STORED))]).holds((Member("a"), Member("b")))


def test_views_are_followed_from_tie_to_tie() -> None:
    # four arrays in three ties: of each whether it is X or Xᵀ
    turned = {"a": False, "b": True, "c": True, "d": False}
    view = {id: TRANSPOSED if swaps else AS_STORED for id, swaps in turned.items()}
    ties = [
        tie("measured", ("a", AS_STORED), ("b", TRANSPOSED)),
        tie("aliased", ("c", AS_STORED), ("b", AS_STORED)),
        tie("measured", ("d", TRANSPOSED), ("c", AS_STORED)),
    ]
    for order in itertools.permutations(ties):
        known = OneValue(order)
        for one, other in itertools.permutations(turned, 2):
            for seen in (AS_STORED, TRANSPOSED):
                truth = (turned[one] != turned[other]) == (seen == TRANSPOSED)
                assert known.holds((Member(one), Member(other, seen))) == truth
            assert known.view(one, other) == (AS_STORED if turned[one] == turned[other] else TRANSPOSED)
        assert known.holds([Member(id, view[id]) for id in turned])
        assert not known.holds([Member(id) for id in turned])


def test_what_is_seen_in_another_way_is_not_known_to_be_equal() -> None:
    half = AS_STORED.then(Cast("float16"))
    known = OneValue([tie("measured", ("a", AS_STORED), ("b", half), ("c", AS_STORED))])
    assert not known.holds((Member("a"), Member("b")))
    assert known.holds((Member("a"), Member("c")))
    assert not known.holds((Member("a"), Member("c", half)))
    assert known.view("a", "nothing") is None


def layers(**tensors: np.ndarray) -> Subject:
    return toy({f"model.layers.0.self_attn.{name}_proj.weight": one for name, one in tensors.items()})


E, D, H = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"
TABLE, OTHER = ramp(64, 8), ramp(64, 8, seed=1)
CASES: dict[str, tuple[Subject, str, bool]] = {
    "equal": (toy({E: TABLE, D: TABLE.copy(), H: TABLE.copy()}), "three-way", True),
    "declared, and different": (toy({E: TABLE, D: TABLE.copy(), H: OTHER}, [(E, D, H)]), "three-way", False),
    "a broken tie of both sides": (toy({E: TABLE, D: OTHER}, [(E, D)]), "encoder-decoder", False),
    "a broken tie of biases": (
        toy({"lm_head.bias": ramp(64), "cls.decoder.bias": ramp(64, seed=1)}, [("lm_head.bias", "cls.decoder.bias")],
            roles_by_class=dict.fromkeys(("lm_head.bias", "cls.decoder.bias"), "output_head_bias")),
        "io-bias",
        False,
    ),
    "a key that is the query": (layers(q=SQUARE, k=SQUARE.copy()), "shared-qk", True),
    "a key that is the query transposed": (layers(q=SQUARE, k=SQUARE.T.copy()), "shared-qk", False),
    "one memory, and its copy": (toy({E: At(TABLE, 0), H: At(TABLE, 0), D: TABLE.copy()}), "encoder-decoder", True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_candidate_is_lossless_where_its_members_are_one_value_as_it_would_write_them(name: str) -> None:
    subject, scheme, lossless = CASES[name]
    found, refused = propose(subject, schemes([scheme])[0])
    assert [one.lossless for one in found if isinstance(one, Candidate)] == [lossless], refused


@pytest.mark.parametrize(("head", "view"), [(SQUARE, AS_STORED), (SQUARE.T, TRANSPOSED)])
def test_a_square_head_is_tied_the_way_in_which_it_is_equal(head: np.ndarray, view: View) -> None:
    kinds = {"embed_tokens.weight": "token_embedding", "lm_head.weight": "output_head"}
    subject = toy({"embed_tokens.weight": SQUARE, "lm_head.weight": head.copy()}, roles_by_class=kinds)
    (found,), _ = propose(subject, schemes(["io"])[0])
    assert found.lossless
    assert found.members[1].view == view
