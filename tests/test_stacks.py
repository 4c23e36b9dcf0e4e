"""Which layers belong to one row, which weights have one place in them, and which tables are those of two sides."""

from __future__ import annotations

import random
import re
from pathlib import Path

import onnx
import pytest
from onnx_cases import saved
from role_graphs import D, Graph

from tieaudit.propose import propose, schemes
from tieaudit.scan import look
from tieaudit.toy import ramp, toy
from tieaudit.verdict import Candidate, Refusal, Subject


def proposed(scheme: str, one: Subject) -> tuple[list[Candidate], list[Refusal]]:
    return propose(one, schemes([scheme])[0])


def shared_places(proto: onnx.ModelProto, meaning: dict[str, str], folder: Path, scheme: str) -> list[list[str]]:
    """What each candidate shares, in the words of `meaning`."""
    found, _ = proposed(scheme, look(saved(proto, folder)))
    return [[meaning[member.id] for member in one.members] for one in found]


def rows_of(graph: Graph, sizes: dict[str, int], crossed: bool = False) -> tuple[dict[str, str], list[str]]:
    """Rows of layers (attention, cross-attention where the second row looks at the first, feed-forward) and what each
    weight is: its place in a layer and that layer."""
    meaning: dict[str, str] = {}
    ends: list[str] = []
    for row, n_layers in sizes.items():
        x = graph.floats("b", row, D)
        for layer in range(n_layers):
            for block in ("self", *(("cross",) if crossed and ends else ()), "feed"):
                n = len(graph.tensors)
                before = graph.layer_norm(x)
                made = (
                    graph.plain(before)
                    if block == "feed"
                    else graph.attention(before, ends[0] if block == "cross" else None)
                )
                x = graph.op("Add", x, made)
                new = [one.name for one in graph.tensors[n:] if one.name in graph.truth]
                counted = [f"{row}{layer} {block} {graph.truth[name]}" for name in new]
                meaning.update(zip(new, counted, strict=True))
        ends.append(x)
    return meaning, ends


def shuffled(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same graph with its initializers in another order, which means nothing."""
    tensors = list(proto.graph.initializer)
    random.Random(seed).shuffle(tensors)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)
    return proto


def without_layer(place: str) -> str:
    return re.sub(r"^(\w)\d", r"\1", place)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_initializers_says_nothing_about_layers(tmp_path: Path, seed: int) -> None:
    graph = Graph()
    meaning, ends = rows_of(graph, {"E": 2, "D": 2}, crossed=True)
    proto = shuffled(graph.proto(ends[-1]), seed)
    shared = shared_places(proto, meaning, tmp_path, "albert")
    assert len(shared) == len(meaning) // 2
    for one, other in shared:
        assert without_layer(one) == without_layer(other) and one != other
    for query, key in shared_places(proto, meaning, tmp_path, "shared-qk"):
        assert query.replace("query", "key") == key
    encoder, decoder = zip(*shared_places(proto, meaning, tmp_path, "tied-transformer"), strict=True)
    assert [place.replace("E", "D") for place in encoder] == list(decoder)
    assert len(encoder) == 2 * (4 + 4)  # in each layer four matrices of self-attention, two of the FFN and their biases


def test_two_towers_of_one_graph_do_not_share_layers_with_each_other(tmp_path: Path) -> None:
    graph = Graph()
    meaning, ends = rows_of(graph, {"A": 2, "B": 4})
    shared = shared_places(shuffled(graph.proto(*ends), 1), meaning, tmp_path, "albert")
    assert sorted(len(one) for one in shared) == [2] * 12 + [4] * 12  # 4 of attention, 4 of the FFN, two norms of 2
    assert all(len({without_layer(place) for place in one}) == 1 for one in shared)


def named(*names: str) -> Subject:
    """A checkpoint of these names: matrices of 16 × 16."""
    return toy({name: ramp(16, 16, seed=seed) for seed, name in enumerate(names)}, format="torch_checkpoint")


def test_two_towers_are_told_apart_by_their_names() -> None:
    text = [f"text_model.encoder.layers.{n}.mlp.{part}.weight" for n in range(2) for part in ("fc1", "fc2")]
    image = [f"vision_model.encoder.layers.{n}.mlp.{part}.weight" for n in range(4) for part in ("fc1", "fc2")]
    found, refused = proposed("albert", named(*text, *image))
    assert not refused
    assert sorted(len(one.members) for one in found) == [2, 2, 4, 4]


def test_a_digit_in_the_name_of_the_model_is_no_layer() -> None:
    names = [f"wav2vec2.encoder.layers.{n}.feed_forward.{part}.weight" for n in range(3) for part in ("fc1", "fc2")]
    found, _ = proposed("albert", named("wav2vec2.encoder.layers.0.extra.weight", *names))
    assert sorted(len(one.members) for one in found) == [3, 3]


TABLES: dict[str, tuple[list[str], bool]] = {
    "an encoder and a decoder": (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], True),
    "source and target": (["src_embed.weight", "tgt_embed.weight"], True),
    "four codebooks of one decoder": ([f"decoder.embed_tokens.{n}.weight" for n in range(4)], False),
    "two encoders": ([f"{one}_model.embeddings.word_embeddings.weight" for one in ("query", "doc")], False),
}


@pytest.mark.parametrize("name", TABLES)
def test_two_sides_are_an_encoder_and_a_decoder_and_not_any_two_tables(name: str) -> None:
    names, tied = TABLES[name]
    one = toy({name: ramp(64, 8, seed=seed) for seed, name in enumerate(names)},
              roles_by_class=dict.fromkeys(names, "token_embedding"))  # fmt: skip
    found, refused = proposed("encoder-decoder", one)
    assert (len(found), len(refused)) == ((1, 0) if tied else (0, 1)), refused


def test_of_two_models_in_one_file_each_head_belongs_to_its_own_table() -> None:
    names = [f"{one}.{leaf}.weight" for one in ("coarse", "fine") for leaf in ("embed_tokens", "lm_head")]
    found, _ = proposed("io", toy({name: ramp(64, 8, seed=seed) for seed, name in enumerate(names)}))
    assert [tuple(member.id for member in one.members) for one in found] == [tuple(names[:2]), tuple(names[2:])]


def test_a_table_that_is_looked_up_twice_is_no_tied_head() -> None:
    one = toy({"wte.weight": ramp(64, 8)}, uses=[("wte.weight", "Gather"), ("wte.weight", "Gather")], format="onnx")
    assert proposed("io", one)[1]
    both = toy({"wte.weight": ramp(64, 8)}, uses=[("wte.weight", "Gather"), ("wte.weight", "MatMul")], format="onnx")
    assert not proposed("io", both)[1]
