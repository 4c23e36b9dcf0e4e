"""Schemes that share layers: the maps of their papers, the number of parameters that is left, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tieaudit.errors import UsageError
from tieaudit.model import Member, Model, Operation, Part, Role, Use, Weight, classes
from tieaudit.propose import listed_candidates, propose, schemes
from tieaudit.saving import n_parameters_saved
from tieaudit.stacks import stacks
from tieaudit.toy import At, ramp, toy
from tieaudit.verdict import Candidate, Found, Refusal, Subject

D, F = 8, 32
LAYER = {
    "attn.q.weight": ("attention_query", (D, D)),
    "attn.k.weight": ("attention_key", (D, D)),
    "attn.v.weight": ("attention_value", (D, D)),
    "attn.o.weight": ("attention_output", (D, D)),
    "mlp.up.weight": ("ffn_up", (F, D)),
    "mlp.up.bias": ("ffn_up_bias", (F,)),
    "mlp.down.weight": ("ffn_down", (D, F)),
    "norm1.weight": ("norm_scale", (D,)),
    "norm2.weight": ("norm_scale", (D,)),
}
PER_LAYER = 4 * D * D + 2 * D * F + F + 2 * D


@dataclass(frozen=True)
class Somewhere:
    """Bytes that are never read: schemes look at shapes and roles alone."""

    name: str
    n_bytes: int

    @property
    def region(self) -> tuple[str, int, int]:
        return (self.name, 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        raise AssertionError("a scheme reads no bytes")


def subject(
    n_layers: int = 6,
    *,
    scrambled: bool = False,
    nameless: bool = False,
    sides: Sequence[str | None] = (None,),
    odd: dict[tuple[int, str], tuple[int, ...] | None] | None = None,
) -> Subject:
    """A model of the layers above. `odd`: (layer, name) → another shape, or None for a weight that is not there.

    `nameless`: matrices are numbers, and only vectors have names, as an exporter's optimiser leaves them.
    """
    weights: list[Weight] = []
    roles: dict[str, Role] = {}
    for side in sides:
        for layer in range(n_layers):
            for name, (kind, shape) in LAYER.items():
                found = (odd or {}).get((layer, name), shape)
                if found is None:
                    continue
                full = f"{side + '.' if side else ''}layers.{layer}.{name}"
                id = f"w{len(weights) * 7919 % 104729}" if scrambled or nameless and len(found) > 1 else full
                n_elements = found[0] * (found[1] if len(found) > 1 else 1)
                storage = Somewhere(full, 4 * n_elements)
                weights.append(Weight(id=id, name=id, shape=found, dtype="float32", storage=storage))
                roles[id] = Role(kind, "by hand", layer, side)  # type: ignore[arg-type]
    model = Model(path="m", format="onnx", parts=(Part("", ("m",)),), weights=tuple(weights))
    return Subject(model, Found(()), roles)


def proposed(text: str, one: Subject) -> tuple[list[Candidate], list[Refusal]]:
    return propose(one, schemes([text])[0])


def layer_map(text: str, n_layers: int, name: str = "attn.q.weight") -> str:
    """The map g as letters: equal letters share."""
    one = subject(n_layers)
    candidates, _ = proposed(text, one)
    together = classes([member.id for member in candidate.members] for candidate in candidates)
    group = {id: number for number, ids in enumerate(together) for id in ids}
    letters: dict[object, str] = {}
    ids = [f"layers.{layer}.{name}" for layer in range(n_layers)]
    return "".join(letters.setdefault(group.get(id, id), chr(65 + len(letters))) for id in ids)


def n_parameters_left(text: str, one: Subject) -> int:
    """Unique parameters once every candidate is carried out."""
    candidates, refusals = proposed(text, one)
    assert not refusals
    n = {weight.id: weight.n_elements for weight in one.model.weights}
    gone = [ids[1:] for ids in classes([member.id for member in found.members] for found in candidates)]
    return sum(n.values()) - sum(n[id] for ids in gone for id in ids)


MAPS = [
    ("albert", 6, "AAAAAA"),
    ("albert:3", 6, "AABBCC"),
    ("albert:4", 6, "AABCCD"),  # ⌊ℓ·4/6⌋ = 0 0 1 2 2 3, as num_hidden_groups=4
    ("sequence:3", 6, "AABBCC"),
    ("sequence:6", 18, "AAABBBCCCDDDEEEFFF"),
    ("cycle:3", 6, "ABCABC"),
    ("cycle:6", 18, "ABCDEFABCDEFABCDEF"),
    ("cycle:4", 6, "ABCDAB"),
    ("cycle-rev:3", 6, "ABCCBA"),
    ("cycle-rev:6", 18, "ABCDEFABCDEFFEDCBA"),  # the paper's figure 1; m = N/M − i would give something else here
    ("sandwich", 6, "ABBBBC"),
    ("sandwich:2", 7, "ABCCCDE"),
    ("immediate", 6, "AABBCC"),
    ("immediate:3", 6, "AAABBB"),
    ("middle-cycle:2", 8, "ABCBCBCD"),
]


@pytest.mark.parametrize(("text", "n_layers", "expected"), MAPS, ids=[one[0] for one in MAPS])
def test_the_layer_map_is_the_one_of_the_paper(text: str, n_layers: int, expected: str) -> None:
    assert layer_map(text, n_layers) == expected


COUNTS = [
    ("albert", 6, PER_LAYER),
    ("albert:attention", 6, 4 * D * D + 6 * (PER_LAYER - 4 * D * D)),
    ("albert:ffn", 6, (2 * D * F + F) + 6 * (PER_LAYER - 2 * D * F - F)),
    ("sequence:3", 6, 3 * PER_LAYER),
    ("cycle:6", 18, 6 * PER_LAYER),
    ("cycle-rev:6", 18, 6 * PER_LAYER),
    ("sandwich", 6, 3 * PER_LAYER + 3 * 2 * D),  # three sets, and three more layers with two norms of their own
    ("ffn", 6, (2 * D * F + F) + 6 * (PER_LAYER - 2 * D * F - F)),
    ("norms", 6, 2 * D + 6 * (PER_LAYER - 2 * D)),
    ("shared-qk", 6, 6 * (PER_LAYER - D * D)),
    ("shared-kv", 6, 6 * (PER_LAYER - D * D)),
]


@pytest.mark.parametrize(("text", "n_layers", "expected"), COUNTS, ids=[one[0] for one in COUNTS])
def test_the_number_of_parameters_left_is_the_closed_form(text: str, n_layers: int, expected: int) -> None:
    assert n_parameters_left(text, subject(n_layers)) == expected


def test_encoder_and_decoder_share_among_themselves_and_not_with_each_other() -> None:
    both = subject(4, sides=("encoder", "decoder"))
    assert n_parameters_left("albert", both) == 2 * PER_LAYER
    assert n_parameters_left("tied-transformer", both) == 4 * (PER_LAYER + 2 * D)  # norms stay on both sides


@pytest.mark.parametrize("n_layers", [2, 3, 5])
def test_matrices_that_lost_their_names_are_shared_beside_vectors_that_kept_theirs(n_layers: int) -> None:
    one = subject(n_layers, nameless=True)
    assert n_parameters_left("albert", one) == PER_LAYER  # not n · PER_LAYER less the biases and norms alone
    both = subject(n_layers, nameless=True, sides=("encoder", "decoder"))
    assert n_parameters_left("albert", both) == 2 * PER_LAYER
    assert n_parameters_left("tied-transformer", both) == n_layers * (PER_LAYER + 2 * D)
    assert n_parameters_left("shared-qk", one) == n_layers * (PER_LAYER - D * D)


@dataclass(frozen=True)
class Crossing:
    """An encoder and a decoder of two layers, whose decoder attends to itself and to the encoder."""

    encoder: str
    own: str
    cross: str
    graph: bool = False
    """Names are numbers, and a graph tells which attention a projection belongs to."""

    def subject(self) -> Subject:
        weights, roles = list[Weight](), dict[str, Role]()
        places = [("encoder", self.encoder, 0), ("decoder", self.cross, 20), ("decoder", self.own, 10)]
        for layer, (side, name, attention), letter in (
            (layer, place, letter) for layer in (0, 1) for place in places for letter in "qkvo"
        ):
            full = f"{side}.layers.{layer}.{name}.{letter}.weight"
            id = f"w{(len(weights) * 7919 + 11) % 104729}" if self.graph else full
            kind = {"q": "query", "k": "key", "v": "value", "o": "output"}[letter]
            number = 100 * (side == "decoder") + 40 * layer + attention if self.graph else None
            roles[id] = Role(f"attention_{kind}", "by hand", layer, side, attention=number)  # type: ignore[arg-type]
            weights.append(Weight(id=id, name=id, shape=(D, D), dtype="float32", storage=Somewhere(full, 4 * D * D)))
        if self.graph:  # nothing says in which order a file holds its tensors
            weights.sort(key=lambda one: one.id[::-1])
        model = Model(path="m", format="onnx", parts=(Part("", ("m",)),), weights=tuple(weights))
        return Subject(model, Found(()), roles)


CROSSINGS = [
    Crossing("self_attn", "self_attn", "encoder_attn"),  # BART, Marian, Pegasus: the other one comes first in a file
    Crossing("self_attn", "self_attn", "cross_attn"),  # ProphetNet
    Crossing("self_attn", "self_attn", "multihead_attn"),  # torch.nn.TransformerDecoder
    Crossing("layer.0.SelfAttention", "layer.0.SelfAttention", "layer.1.EncDecAttention"),  # T5
    Crossing("att", "own", "cross"),  # by what the other one is called
    Crossing("self_attn", "self_attn", "encoder_attn", graph=True),
]


@pytest.mark.parametrize("one", CROSSINGS, ids=lambda one: f"{one.cross}{' of a graph' * one.graph}")
def test_the_encoder_is_tied_to_the_self_attention_of_the_decoder(one: Crossing) -> None:
    subject = one.subject()
    candidates, refusals = proposed("tied-transformer", subject)
    stored = {weight.id: str(weight.storage.region[0]) for weight in subject.model.weights if weight.storage}
    pairs = {tuple(stored[member.id] for member in found.members) for found in candidates}
    assert not refusals and pairs == {
        (f"encoder.layers.{layer}.{one.encoder}.{letter}.weight", f"decoder.layers.{layer}.{one.own}.{letter}.weight")
        for layer in (0, 1) for letter in "qkvo"
    }  # fmt: skip


def test_two_attentions_that_nothing_tells_apart_are_refused_by_name() -> None:
    candidates, refusals = proposed("tied-transformer", Crossing("att", "b", "a").subject())
    assert not candidates and len(refusals) == 4
    assert "decoder.layers.#.a.q.weight or decoder.layers.#.b.q.weight: nothing tells" in refusals[0].because


@pytest.mark.parametrize("one", CROSSINGS, ids=lambda one: f"{one.cross}{' of a graph' * one.graph}")
def test_query_and_key_are_of_one_attention_in_whatever_order_a_file_holds_them(one: Crossing) -> None:
    subject = one.subject()
    stored = {weight.id: str(weight.storage.region[0]) for weight in subject.model.weights if weight.storage}
    for scheme, letters in (("shared-qk", "qk"), ("shared-kv", "kv")):
        candidates, refusals = proposed(scheme, subject)
        assert not refusals and len(candidates) == 6
        for found in candidates:
            first, second = (stored[member.id] for member in found.members)
            assert first.replace(f".{letters[0]}.", f".{letters[1]}.") == second


def test_fused_projections_are_refused_as_what_they_are() -> None:
    one = subject(2)
    roles = {id: Role("attention_qkv", "by hand", role.layer) if ".attn.q" in id else
             Role("other", "no evidence") if ".attn." in id else role for id, role in one.roles.items()}  # fmt: skip
    for scheme in ("shared-qk", "shared-kv"):
        candidates, (refusal,) = proposed(scheme, Subject(one.model, one.found, roles))
        assert not candidates and refusal.ids == ("layers.0.attn.q.weight", "layers.1.attn.q.weight")
        assert "layers.0.attn.q.weight makes " in refusal.because and "together, as in 1 more" in refusal.because


def test_a_vector_of_which_nothing_is_known_stays_private_where_norms_do() -> None:
    one = subject(6)
    roles = {id: Role("other", "no evidence", role.layer) for id, role in one.roles.items()}
    candidates, _ = proposed("sandwich", Subject(one.model, one.found, roles))
    shared = {member.id.removeprefix("layers.1.") for found in candidates for member in found.members[:1]}
    assert shared == {name for name, (_, shape) in LAYER.items() if len(shape) > 1}


def test_a_refusal_tells_layers_without_a_kind_from_layers_whose_names_tell_nothing() -> None:
    one = subject(3)
    unknown = {id: Role("other", "no evidence", role.layer) for id, role in one.roles.items()}
    (told,) = proposed("ffn", Subject(one.model, one.found, unknown))[1]
    assert "nothing tells what 9 places of each layer are for, layers.#.attn.q.weight among them" in told.because
    norms = {id: Role("norm_scale", "by hand", role.layer) for id, role in one.roles.items()}
    (told,) = proposed("ffn", Subject(one.model, one.found, norms))[1]
    assert told.because.endswith("hold nothing of the kinds that this scheme shares")


def test_stacks_whose_roles_nobody_knows_are_refused_and_not_passed_over() -> None:
    one = subject(2, sides=("encoder", "decoder"))
    unknown = {id: Role("other", "no evidence", role.layer, role.side) for id, role in one.roles.items()}
    candidates, refusals = proposed("tied-transformer", Subject(one.model, one.found, unknown))
    assert not candidates and "none of their weights was recognised as attention" in refusals[0].because


def test_scrambled_names_share_the_same_weights() -> None:
    straight, scrambled = subject(6), subject(6, scrambled=True)
    for text in ("albert", "cycle:3", "sandwich", "ffn", "shared-qk"):
        n = [len(proposed(text, one)[0]) for one in (straight, scrambled)]
        assert n[0] == n[1], text
        assert n_parameters_left(text, scrambled) == n_parameters_left(text, straight), text
    places = {weight.id: weight.storage.region[0] for weight in scrambled.model.weights if weight.storage is not None}
    for candidate in proposed("albert", scrambled)[0]:
        kept = {str(places[member.id]).split(".", 2)[2] for member in candidate.members}
        assert len(kept) == 1, kept  # one slot: the two norms of a layer are not confused


REFUSED = [
    ("sequence:4", 6, "4 does not divide 6"),
    ("cycle:7", 6, "fewer than M = 7"),
    ("cycle-rev:4", 6, "at least 2·M = 8 layers"),
    ("sandwich:3", 6, "nothing is left to share"),
    ("immediate:4", 6, "4 does not divide 6"),
    ("middle-cycle:4", 6, "no more than M = 4"),
    ("albert:7", 6, "fewer than the 7 groups"),
    ("tied-transformer", 6, "no encoder and decoder"),
    ("three-way", 6, "no second token embedding"),
    ("encoder-decoder", 6, "no second token embedding"),
    ("io-bias", 6, "no bias"),
]


@pytest.mark.parametrize(("text", "n_layers", "because"), REFUSED, ids=[one[0] for one in REFUSED])
def test_what_this_model_cannot_take_is_refused_with_the_reason(text: str, n_layers: int, because: str) -> None:
    candidates, refusals = proposed(text, subject(n_layers))
    assert not candidates
    assert because in refusals[0].because


def test_layers_that_differ_are_refused_slot_by_slot_and_the_others_are_shared() -> None:
    uneven = subject(4, odd={(2, "mlp.up.weight"): (2 * F, D), (3, "norm2.weight"): None})
    candidates, refusals = proposed("albert", uneven)
    assert len(candidates) == len(LAYER) - 2
    said = {refusal.because for refusal in refusals}
    assert any("layers.#.mlp.up.weight" in one and "[32, 8]" in one and "[64, 8]" in one for one in said)
    assert any("layers.#.norm2.weight" in one and "layers 3 have none" in one for one in said)


@pytest.mark.parametrize(
    "text", ["cycle", "cycle:", "cycle:0", "cycle:-1", "cycle:x", "cycle:1.5", "albert:heads", "cycle:²"]
)
def test_an_argument_that_is_none_is_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        proposed(text, subject(6))


def test_a_scheme_that_takes_no_argument_says_so() -> None:
    with pytest.raises(UsageError, match="dedup alone, which takes nothing behind a colon"):
        schemes(["dedup:3"])


def test_layers_that_are_one_already_are_not_proposed_again() -> None:
    one = subject(3)
    same = Somewhere("shared", 4 * D * D)
    weights = tuple(
        Weight(id=w.id, name=w.name, shape=w.shape, dtype=w.dtype, storage=same if "attn.q" in w.id else w.storage)
        for w in one.model.weights
    )
    tied = Subject(Model(path="m", format="onnx", parts=one.model.parts, weights=weights), one.found, one.roles)
    assert not any("attn.q" in member.id for found in proposed("albert", tied)[0] for member in found.members)


def chain(*shapes: tuple[str, str, tuple[int, ...]]) -> Subject:
    """(name, kind, shape) of weights in a row."""
    weights = tuple(
        Weight(id=name, name=name, shape=shape, dtype="float32", storage=Somewhere(name, 4 * shape[0] * shape[-1]))
        for name, _, shape in shapes
    )
    model = Model(path="m", format="onnx", parts=(Part("", ("m",)),), weights=weights)
    return Subject(model, Found(()), {name: Role(kind, "by hand") for name, kind, _ in shapes})


def test_an_autoencoder_is_tied_to_its_mirror_image_transposed() -> None:
    shapes = [("e1", "projection", (64, 20)), ("e2", "projection", (8, 64))]
    mirrored = chain(*shapes, ("d2", "projection", (64, 8)), ("d1", "projection", (20, 64)))
    candidates, refusals = proposed("tied-autoencoder", mirrored)
    assert not refusals
    assert [[(m.id, m.view.transposes) for m in found.members] for found in candidates] == [
        [("e1", False), ("d1", True)],
        [("e2", False), ("d2", True)],
    ]


@pytest.mark.parametrize(
    "shapes",
    [
        [("a", "projection", (64, 20)), ("b", "projection", (8, 64))],
        [("a", "projection", (8, 8)), ("b", "projection", (8, 8))],
        [("a", "projection", (64, 20)), ("b", "projection", (20, 64)), ("c", "projection", (20, 64))],
        [("a", "attention_query", (64, 20)), ("b", "attention_key", (20, 64))],
        [],
    ],
    ids=["two layers that lead on", "squares", "an odd one", "attention", "nothing"],
)
def test_what_does_not_lead_in_and_out_again_is_no_autoencoder(shapes: list[tuple[str, str, tuple[int, ...]]]) -> None:
    candidates, refusals = proposed("tied-autoencoder", chain(*shapes))
    assert not candidates
    assert refusals


def towers(names: Sequence[str], extra: tuple[int, int] = (4, 4)) -> Subject:
    held = [("conv1.weight", (16, 8)), ("conv2.weight", (16, 16)), ("conv2.bias", (16,))]
    inside = [(f"{name}.{rest}", "other", shape) for name in names for rest, shape in held]
    return chain(*inside, ("head.fc.weight", "projection", extra))


def test_two_towers_of_one_shape_are_siamese_and_layers_in_a_row_are_not() -> None:
    candidates, _ = proposed("siamese", towers(("left", "right")))
    assert [found.members[1].id for found in candidates] == [
        "right.conv1.weight",
        "right.conv2.weight",
        "right.conv2.bias",
    ]
    for other in (towers(("0", "1")), towers(("left",)), towers(("left", "right"), extra=(100, 100))):
        assert not proposed("siamese", other)[0]


def test_towers_of_a_graph_are_what_its_inputs_lead_to_whatever_weights_are_called() -> None:
    shapes = {"w7": (D, F), "w3": (F,), "w9": (F, D), "w4": (F,), "w1": (F, D), "w8": (D, F), "w5": (D, D)}
    flow = [  # two towers of a matrix, a bias and a matrix, and one matrix behind both
        ("MatMul", "m1", ("a", "w7")), ("MatMul", "n1", ("b", "w8")), ("Add", "m2", ("m1", "w3")),
        ("Add", "n2", ("n1", "w4")), ("MatMul", "m3", ("m2", "w9")), ("MatMul", "n3", ("n2", "w1")),
        ("Mul", "p", ("m3", "n3")), ("MatMul", "q", ("p", "w5")),
    ]  # fmt: skip
    inputs = [Operation("input", f"@{name}", (), (name,)) for name in ("a", "b")]
    operations = (*inputs, *(Operation(op, node, given, (node,)) for op, node, given in flow))
    uses = tuple(Use(given[1], op, node, 1) for op, node, given in flow if given[1] in shapes)
    weights = tuple(
        Weight(id=id, name=id, shape=shape, dtype="float32", storage=Somewhere(id, 4 * math.prod(shape)))
        for id, shape in shapes.items()
    )
    model = Model("m", "onnx", (Part("", ("m",)),), weights=weights, uses=uses, operations=operations)
    one = Subject(model, Found(()), {id: Role("other", "by hand") for id in shapes})
    candidates, refusals = proposed("siamese", one)
    assert not refusals
    assert [tuple(m.id for m in found.members) for found in candidates] == [("w7", "w8"), ("w3", "w4"), ("w9", "w1")]
    joined = replace(model, operations=tuple(replace(o, inputs=("a", *o.inputs[1:])) if o.node == "n1" else o
                                             for o in operations))  # fmt: skip
    assert not proposed("siamese", Subject(joined, one.found, one.roles))[
        0
    ]  # one input leads to both: layers, no towers


def test_custom_groups_share_what_their_pattern_and_role_choose(tmp_path: Path) -> None:
    file = tmp_path / "ties.toml"
    file.write_text(
        '[[group]]\nmatch = ["layers.*.mlp.up.weight"]\nlayers = [1, 2]\n'
        '[[group]]\nrole = "norm_scale"\neach = "layer"\n'
    )
    candidates, refusals = proposed(f"custom:{file}", subject(4))
    assert not refusals
    assert [[member.id for member in found.members] for found in candidates] == [
        ["layers.1.mlp.up.weight", "layers.2.mlp.up.weight"],
        *([f"layers.{layer}.norm1.weight", f"layers.{layer}.norm2.weight"] for layer in range(4)),
    ]


def test_custom_groups_that_match_nothing_or_what_does_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ties.toml"
    file.write_text('[[group]]\nmatch = ["nothing.*"]\n[[group]]\nmatch = ["layers.0.mlp.up.*", "layers.0.attn.q.*"]\n')
    candidates, refusals = proposed(f"custom:{file}", subject(2))
    assert not candidates
    assert "matches nothing" in refusals[0].because
    assert "[32, 8] float32 does not fit [8, 8] float32" in refusals[1].because


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ("", "found no group"),
        ("group = 3", "found something else"),
        ("[[group]]", "found neither"),
        ("[[group]]\nmatch = 'x'", "expected a list of patterns"),
        ("[[group]]\nmatch = ['x']\nlayers = ['a']", "expected a list of numbers"),
        ("[[group]]\nrole = 'bias'\neach = 'head'", "expected one of layer"),
        ("[[group]]\nrol = 'bias'", "found 'rol'"),
        ("[group", "expected TOML"),
        ("extra = 1\n[[group]]\nrole = 'bias'", "the key 'extra'"),
    ],
)
def test_a_custom_file_that_is_wrong_is_one_clear_line(tmp_path: Path, text: str, because: str) -> None:
    file = tmp_path / "ties.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=because):
        proposed(f"custom:{file}", subject(2))
    with pytest.raises(UsageError, match="cannot be read"):
        proposed(f"custom:{tmp_path / 'missing.toml'}", subject(2))


# what a scan lists --------------------------------------------------------------------------------------------------


def test_a_scan_lists_the_candidates_of_every_scheme_and_reads_nothing() -> None:
    one = subject(6)
    found = listed_candidates(one)  # `Somewhere` raises if anything is read
    n_saved: dict[str, int] = {}
    for name in dict.fromkeys(candidate.scheme for candidate in found):
        own = [candidate for candidate in found if candidate.scheme == name]
        assert all(not candidate.lossless for candidate in own)
        n_saved[name] = n_parameters_saved(one.model, own)
        assert 4 * n_saved[name] == sum(candidate.n_bytes_saved for candidate in own)
        assert n_saved[name] == 6 * PER_LAYER - n_parameters_left(name, one)
    # of six layers halves and thirds are worth a look, the third first: cycle:2
    assert n_saved == {
        "albert": 5 * PER_LAYER,
        "cycle:2": 4 * PER_LAYER,
        "cycle-rev:2": 4 * PER_LAYER,
        "ffn": 5 * (2 * D * F + F),
        "immediate": 3 * PER_LAYER,
        "middle-cycle:1": 3 * PER_LAYER,  # the first and the last layer stay as they are
        "sandwich": 3 * (PER_LAYER - 2 * D),  # and all norms (Subformer)
        "sequence:2": 4 * PER_LAYER,
        "shared-kv": 6 * D * D,
        "shared-qk": 6 * D * D,
    }


def test_a_scan_lists_no_candidate_twice_for_a_tie_that_it_shows() -> None:
    lost = toy({"model.embed_tokens.weight": ramp(64, 8), "lm_head.weight": ramp(64, 8)})
    assert [one.scheme for one in listed_candidates(lost)] == ["io"]  # dedup would repeat the tie


def test_parameters_of_what_shares_bytes_already_are_counted_once() -> None:
    # a and b are one range; c another: with all three as one, only c's 12 numbers go
    one = toy({"a": At(ramp(4, 3), 0), "b": At(ramp(4, 3), 0), "c": ramp(4, 3, seed=1)}, format="onnx").model
    several = [
        Candidate("x", (Member("a"), Member("b")), 0, True, ""),
        Candidate("x", (Member("a"), Member("c")), 48, False, ""),
    ]
    assert n_parameters_saved(one, several) == 12
    assert n_parameters_saved(one, [Candidate("x", (Member("a"), Member("c")), 24, False, "", action="fit")]) == 6


def test_layers_are_put_in_order_once_for_all_schemes() -> None:
    one = subject(4)
    assert stacks(one) is stacks(one)
    assert stacks(replace(one, roles={id: replace(role, layer=None) for id, role in one.roles.items()})) == ()
