"""The difference between two models: how weights are matched across names and formats, and what is said of ties."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tieaudit.called import key_of
from tieaudit.cli import main
from tieaudit.difference import Difference, Told, difference, shown
from tieaudit.errors import TieAuditError
from tieaudit.load import load_one, locate
from tieaudit.locked import NAME, changes, lock_of, read_lock, write_lock
from tieaudit.scan import look
from tieaudit.sealed import Locked
from tieaudit.toy import Broken, claim, ramp, toy
from tieaudit.verdict import Subject

ROOT = Path(__file__).resolve().parent.parent
W, OTHER = ramp(64, 8), ramp(64, 8, seed=1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FOLDERS = ("gpt_decoder", "bert_encoder", "bart_seq2seq", "albert_shared")


def tieaudit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def counts(found: Difference) -> dict[str, int]:
    """Outcomes that occur, with how often."""
    every = {outcome: len(found.of(outcome)) for outcome in ("lost", "gained", "cannot tell", "kept")}  # type: ignore[arg-type]
    return {outcome: n for outcome, n in every.items() if n}


def between(before: Subject, after: Subject) -> dict[str, int]:
    return counts(difference(before, after))


def tied(embed: str = EMBED, head: str = HEAD, values: Any = W) -> Subject:
    return toy({embed: values, head: None}, declared=[(embed, head)])


# folders against their ONNX exports

EXPECTED = {
    ("hf_tied", "tied.onnx"): {"kept"},
    ("hf_tied", "lost.onnx"): {"lost"},
    ("hf_tied", "untied.onnx"): {"lost"},
    ("hf_lost", "tied.onnx"): {"gained"},
    ("hf_untied", "tied.onnx"): {"gained"},
    ("hf_untied", "lost.onnx"): {"gained"},
    ("hf_untied", "untied.onnx"): set(),
    ("tied.onnx", "hf_tied"): {"kept"},
    ("tied.onnx", "hf_lost"): {"lost"},
    ("tied.onnx", "hf_untied"): {"lost"},
    ("lost.onnx", "hf_tied"): {"gained"},
    ("tied.onnx", "lost.onnx"): {"lost"},
    ("lost.onnx", "tied.onnx"): {"gained"},
    ("tied.onnx", "untied.onnx"): {"lost"},
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("pair", EXPECTED, ids=[" ".join(pair) for pair in EXPECTED])
def test_the_tie_of_embedding_and_head_is_followed_across_formats(
    fixtures_dir: Path, name: str, pair: tuple[str, str]
) -> None:
    if any(one.startswith("hf_") for one in pair):
        pytest.importorskip("transformers")
    subjects = [look(load_one(fixtures_dir / name / one)) for one in pair]
    found = difference(*subjects)
    tables = {id for one in subjects for id, role in one.roles.items() if role.kind == "token_embedding"}
    told = {one.outcome for one in found.told if tables & {*one.before, *one.after}}
    assert told == EXPECTED[pair], shown(found, "text")


@pytest.mark.parametrize("name", ["gpt_decoder", "bert_encoder", "bart_seq2seq", "albert_shared", "lstm_lm",
                                  "gru_seq2seq", "tied_autoencoder"])  # fmt: skip
@pytest.mark.parametrize("variant", ["tied", "lost", "untied"])
def test_a_model_has_lost_nothing_to_itself(fixtures_dir: Path, name: str, variant: str) -> None:
    subject = look(load_one(fixtures_dir / name / f"{variant}.onnx"))
    assert set(between(subject, subject)) <= {"kept"}
    assert ("kept" in between(subject, subject)) is (variant != "untied")


@pytest.mark.parametrize("name", ["gpt_decoder", "bart_seq2seq", "tied_autoencoder", "lstm_lm"])
@pytest.mark.parametrize(("variant", "outcome"), [("tied", "kept"), ("lost", "lost")])
def test_with_every_initializer_renamed_ties_are_followed_by_their_values(
    fixtures_dir: Path, tmp_path: Path, name: str, variant: str, outcome: str
) -> None:
    import onnx

    model = onnx.load(fixtures_dir / name / f"{variant}.onnx")
    new = {one.name: f"val_{index}" for index, one in enumerate(model.graph.initializer)}
    for one in model.graph.initializer:
        one.name = new[one.name]
    for node in model.graph.node:
        node.input[:] = [new.get(value, value) for value in node.input]
    onnx.save(model, tmp_path / "renamed.onnx")
    found = difference(look(load_one(fixtures_dir / name / "tied.onnx")), look(load_one(tmp_path / "renamed.onnx")))
    assert set(counts(found)) == {outcome}
    assert found.n_bytes_read > 0


def test_a_layer_that_was_stored_once_and_is_exported_once_for_each_call_has_lost_its_tie(fixtures_dir: Path) -> None:
    before = look(load_one(fixtures_dir / "albert_shared" / "tied.onnx"))
    after = look(load_one(fixtures_dir / "albert_shared" / "lost.onnx"))
    lost = difference(before, after).of("lost")
    # one table, and 16 tensors of a layer that three layers share
    assert len(lost) == 17
    assert "stored once before and 3 times after" in lost[1].because


# matching


def test_names_decide_where_they_are_equal() -> None:
    assert between(tied(), tied(values=OTHER)) == {"kept": 1}
    assert between(tied(), toy({EMBED: OTHER, HEAD: OTHER.copy()}, declared=[(EMBED, HEAD)])) == {"lost": 1}
    assert between(tied(), toy({EMBED: W, HEAD: OTHER})) == {"lost": 1}
    assert between(toy({EMBED: W, HEAD: OTHER}), tied()) == {"gained": 1}


@pytest.mark.parametrize("seed", range(40))
def test_what_is_lost_one_way_is_gained_the_other(seed: int) -> None:
    rng = random.Random(seed)

    def drawn() -> Subject:
        values = [ramp(12, 5, seed=index) for index in range(3)]
        names = rng.sample(["a.w", "b.w", "c.w", "val_1", "val_2", "x.k.w"], 4)
        chosen = {name: values[rng.randrange(3)] for name in names}
        return toy({name: (one if rng.random() < 0.6 else one.T).copy() for name, one in chosen.items()}, format="onnx")

    before, after = drawn(), drawn()
    there, back = difference(before, after), difference(after, before)
    assert len(there.of("lost")) == len(back.of("gained"))
    assert len(there.of("gained")) == len(back.of("lost"))


@pytest.mark.parametrize("layout", ["as stored", "transposed"])
@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 16)])
def test_values_decide_where_names_say_nothing(layout: str, shape: tuple[int, int]) -> None:
    values = ramp(*shape)
    there = values if layout == "as stored" else np.ascontiguousarray(values.T)
    before = toy({"a": values, "b": None}, declared=[("a", "b")])
    once = toy({"x": there, "y": ramp(*shape, seed=3)}, format="onnx", uses=[("x", "Gather"), ("x", "Gemm")])
    twice = toy({"x": there, "y": there.copy()}, format="onnx")
    found = difference(before, once)
    assert counts(found) == {"kept": 1}
    assert found.told[0].matched_by == {"a": "values", "b": "values"}
    assert between(before, twice) == {"lost": 1}
    assert between(twice, before) == {"gained": 1}


def test_one_bit_is_enough_to_be_another_value() -> None:
    off = W.copy()
    off.view("uint32")[5, 3] ^= 1
    assert between(toy({"a": W, "b": None}, declared=[("a", "b")]), toy({"x": off})) == {"cannot tell": 1}


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_a_narrower_float_type_is_the_same_value_and_a_wider_one_too(narrow: str) -> None:
    import ml_dtypes

    half = W.astype(np.float16 if narrow == "float16" else ml_dtypes.bfloat16)
    wide, lost = toy({"a": W, "b": None}, declared=[("a", "b")]), toy({"x": half, "y": half.T.copy()}, format="onnx")
    assert between(wide, lost) == {"lost": 1}
    assert between(lost, wide) == {"gained": 1}
    assert between(wide, toy({"x": half})) == {"kept": 1}


def test_two_half_types_are_not_converted_into_each_other() -> None:
    import ml_dtypes

    before = toy({"a": W.astype(np.float16), "b": None}, declared=[("a", "b")])
    assert between(before, toy({"x": W.astype(ml_dtypes.bfloat16)})) == {"cannot tell": 1}


def test_the_end_of_a_name_decides_for_values_that_changed() -> None:
    before = tied("transformer.wte.weight", "lm_head.weight")
    after = toy({"wte.weight": OTHER, "model.lm_head.weight": None}, declared=[("wte.weight", "model.lm_head.weight")])
    found = difference(before, after)
    assert counts(found) == {"kept": 1}
    assert set(found.told[0].matched_by.values()) == {"end of name"}


def test_a_name_with_another_shape_is_still_that_weight() -> None:
    cut = ramp(60, 8, seed=7)
    assert between(tied(), toy({EMBED: cut, HEAD: None}, declared=[(EMBED, HEAD)], shapes={HEAD: (60, 8)})) == {
        "kept": 1
    }
    # the tempting wrong answer: the head is unknown, so the tie is what the table still is
    assert between(tied(), toy({EMBED: W, HEAD: cut})) == {"lost": 1}


def test_numbers_that_an_exporter_gives_are_no_names_where_values_say_more() -> None:
    third = ramp(64, 8, seed=8)
    before = toy({"w": W, "onnx::MatMul_1": W.copy(), "onnx::MatMul_2": third}, format="onnx")
    after = toy({"w": W, "onnx::MatMul_2": W.copy(), "onnx::MatMul_1": third}, format="onnx")
    assert between(before, after) == {"kept": 1}
    retrained = toy({"w": OTHER, "onnx::MatMul_1": OTHER.copy(), "onnx::MatMul_2": third}, format="onnx")
    assert between(before, retrained) == {"kept": 1}


def test_an_end_that_several_names_have_decides_nothing() -> None:
    before = toy({"a.block.w": W, "b.block.w": None}, declared=[("a.block.w", "b.block.w")])
    assert between(before, toy({"c.block.w": OTHER, "d.block.w": ramp(64, 8, seed=4)})) == {"cannot tell": 1}


def test_a_role_decides_where_one_weight_alone_has_it() -> None:
    before = tied("transformer.wte.weight", "lm_head.weight")
    after = toy({"emb": OTHER, "out": ramp(8, 64, seed=5)}, uses=[("emb", "Gather"), ("out", "MatMul")], format="onnx")
    found = difference(before, after)
    assert counts(found) == {"lost": 1}
    assert found.told[0].matched_by == {"transformer.wte.weight": "role", "lm_head.weight": "role"}
    again = toy({"emb": OTHER}, uses=[("emb", "Gather"), ("emb", "Transpose MatMul")], format="onnx")
    assert between(before, again) == {"kept": 1}


def test_a_table_that_is_its_own_head_is_followed_to_a_head_of_its_own() -> None:
    before = toy({"emb": W}, uses=[("emb", "Gather"), ("emb", "Transpose MatMul")], format="onnx")
    # the tempting wrong answer: emb is the table, which is one tensor after, too
    assert between(before, toy({EMBED: OTHER, HEAD: ramp(64, 8, seed=5)})) == {"lost": 1}


def test_a_role_that_two_weights_have_decides_nothing() -> None:
    before = toy({"a": W, "b": None}, declared=[("a", "b")], roles_by_class={"a": "token_embedding"})
    two = {"x": "token_embedding", "y": "token_embedding"}
    after = toy({"x": OTHER, "y": ramp(64, 8, seed=5)}, roles_by_class=two)
    assert between(before, after) == {"cannot tell": 1}


def test_what_has_no_counterpart_is_said_and_never_called_kept() -> None:
    before = tied("a", "b")
    assert between(before, toy({"x": ramp(10, 3)})) == {"cannot tell": 1}
    assert between(toy({"x": ramp(10, 3)}), before) == {"cannot tell": 1}
    perhaps = toy({"a": OTHER, "strange": ramp(64, 8, seed=6)})
    (told,) = difference(before, perhaps).told
    assert told.outcome == "cannot tell"
    assert "b has no counterpart of its own after, and it might be strange" in told.because


def test_two_tables_that_became_equal_have_gained_a_tie_and_lost_none() -> None:
    separate, equal = toy({"a.w": W, "b.w": OTHER}), toy({"a.w": W, "b.w": W.copy()})
    assert between(separate, equal) == {"gained": 1}
    assert between(equal, separate) == {"lost": 1}


def test_constants_tie_nothing() -> None:
    zeros = np.zeros((64, 8), "float32")
    assert between(toy({"a": zeros, "b": None}, declared=[("a", "b")]), toy({"a": zeros, "b": zeros.copy()})) == {}


def test_unreadable_weights_are_matched_by_name_only() -> None:
    assert between(tied("a", "b"), toy({"x": Broken((64, 8))})) == {"cannot tell": 1}


def test_only_what_can_match_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    table = ramp(256, 64)
    rest = {f"layer.{index}.w": ramp(256, 64, seed=index + 1) for index in range(8)}
    safetensors.save_file({"a": table, "b": table.copy(), **rest}, tmp_path / "one.safetensors")
    names = {f"x{index}": values for index, values in enumerate(rest.values())}
    safetensors.save_file({"y": table, **names}, tmp_path / "other.safetensors")
    found = difference(*(look(load_one(tmp_path / f"{name}.safetensors")) for name in ("one", "other")))
    assert counts(found) == {"gained": 1}
    # 2 · 65,536 bytes of the table on both sides, and 16 probed numbers (64 bytes) of each weight in each comparison;
    # all weights of that shape would be 19 · 65,536 = 1,245,184
    assert 2 * 65_536 <= found.n_bytes_read < 3 * 65_536


# the command


@pytest.fixture
def chat(fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixtures of a decoder, as the current folder."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(fixtures_dir / "gpt_decoder")
    return fixtures_dir / "gpt_decoder"


@pytest.mark.parametrize("format_name", ["text", "markdown", "json"])
def test_what_is_printed(chat: Path, golden: Callable[[str, str], None], format_name: str) -> None:
    done = tieaudit("diff", "hf_tied", "lost.onnx", "--format", format_name)
    assert done.exit_code == 1, done.output
    suffix = {"text": "txt", "markdown": "md", "json": "json"}[format_name]
    golden(f"diff-lost.{suffix}", done.stdout.replace(json.loads(tool())["version"], "VERSION"))
    if format_name != "json":
        assert "transformer.wte.weight = lm_head.weight" in done.stdout
        assert "384.0 kB again" in done.stdout  # 1,500 · 64 · 4 bytes


def tool() -> str:
    from tieaudit import __version__

    return json.dumps({"version": __version__})


@pytest.mark.parametrize("pair", [("hf_tied", "lost.onnx"), ("hf_tied", "tied.onnx"), ("hf_untied", "untied.onnx")])
def test_json_is_what_its_schema_says(chat: Path, pair: tuple[str, str]) -> None:
    schema = json.loads((ROOT / "docs" / "schema" / "diff-1.schema.json").read_text())
    printed = json.loads(tieaudit("diff", *pair, "--format", "json").stdout)
    jsonschema.Draft202012Validator(schema).validate(printed)
    assert printed["schema"] == "tieaudit/diff/1"
    assert sum(printed["counts"].values()) == len(printed["told"])


def test_exit_codes_are_those_of_the_help(chat: Path, tmp_path: Path) -> None:
    assert tieaudit("diff", "hf_tied", "tied.onnx").exit_code == 0
    assert tieaudit("diff", "hf_untied", "tied.onnx").exit_code == 0
    assert tieaudit("diff", "hf_tied", "untied.onnx").exit_code == 1
    assert tieaudit("diff", "hf_tied", "nothing.onnx").exit_code == 2
    assert tieaudit("diff", "hf_tied").exit_code == 2
    assert tieaudit("diff", "hf_tied", "../tied_autoencoder/untied.onnx").exit_code == 0
    done = tieaudit("diff", "hf_tied", "../tied_autoencoder/untied.onnx", "--strict")
    assert done.exit_code == 2
    assert "cannot tell" in done.stdout
    assert "Traceback" not in done.output


HOSTILE = ["\x1b[31mred", "<script>alert(1)</script>", "::error::x", "a\nb", "\u202egpj", "``` \n# title", "@team #1"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("format_name", ["text", "markdown"])
def test_hostile_names_stay_inside_their_line(name: str, format_name: str) -> None:
    subject = toy({name: W, HEAD: None}, declared=[(name, HEAD)], path=name)
    text = shown(difference(subject, toy({name: W, HEAD: W.copy()}, path=name)), format_name)
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith(("::", "# title")) for line in text.split("\n"))
    if format_name == "markdown":
        heading, _, opening, *inside, closing, _, counted = text.split("\n")
        fence = opening.removesuffix("diff")
        assert (heading, closing) == ("### Ties were lost", fence)
        assert set(fence) == {"`"}
        assert not any(fence in line for line in inside)
        assert counted == "0 kept · 1 lost · 0 gained · 0 cannot tell"


def test_many_ties_are_listed_in_part_and_counted() -> None:
    told = Told("lost", ("a",), ("b",), "a: stored once before and twice after", {"a": "name"}, 4)
    found = Difference("x", "y", tuple(replace(told, before=(f"a{index}",)) for index in range(25)), 0)
    text = shown(found, "text")
    assert text.count("stored once before") == 20
    assert "… lost: 5 more values (--format json lists all)" in text
    assert "25 lost" in text


def test_a_declaration_that_is_off_ties_nothing() -> None:
    off = toy({EMBED: W, HEAD: OTHER}, declared=[claim(EMBED, HEAD, active=False)])
    assert between(off, toy({EMBED: W, HEAD: OTHER})) == {}


def test_real_models_have_lost_nothing_to_themselves(corpus: Path, tmp_path: Path) -> None:
    sources = locate([str(corpus)])[0][::15]
    models: dict[str, Locked] = {}
    for source in sources:
        try:
            subject = look(source.load())
            one = lock_of(subject, key_of(source, corpus))
        except TieAuditError:  # what cannot be read is the business of other tests
            continue
        assert set(between(subject, subject)) <= {"kept"}, source.path
        assert changes(one, one, frozenset(subject.model.by_id)) == ()
        models[one.path] = one
    assert len(models) > 20
    write_lock(tmp_path / NAME, models)
    assert read_lock(tmp_path / NAME) == models
