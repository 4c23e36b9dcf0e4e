"""Bytes that nobody here has seen: no rule judges them, no lock forgets them, whatever kept them away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gate_models import W, save

from tieaudit.audit import audit, rules
from tieaudit.cli import main
from tieaudit.equality import Equality
from tieaudit.errors import UnreadableModel
from tieaudit.locked import NAME, lock_of
from tieaudit.sealing import as_locked
from tieaudit.toy import Away, Broken, claim, ramp, toy
from tieaudit.verdict import Demands, Subject

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IO = Demands(expect=("io",))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"


def said(subject: Subject, *codes: str) -> tuple[list[str], list[str]]:
    """(codes of findings, codes of what cannot be told)"""
    report = audit(subject, only={code: rules()[code] for code in codes})
    assert report.crashed == ()
    return [one.code for one in report.findings], [one.code for one in report.cannot_tell]


def folder(home: Path) -> Path:
    """A tied Llama in two shards; the head is stored again in the second one."""
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save(home / one, {EMBED: W}, {"format": "pt"})
    save(home / two, {HEAD: W}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {EMBED: one, HEAD: two}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 8,
              "num_hidden_layers": 0, "num_attention_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    (home / "config.json").write_text(json.dumps(config))
    return home


def test_one_question_knows_every_reason_for_not_having_seen_a_weight() -> None:
    subject = toy({"a": W, "b": Broken((64, 8)), "c": Away((64, 8)), "d": None})
    unseen = subject.unseen(["a", "b", "c", "d", "nowhere"])
    assert list(unseen) == ["b", "c", "d", "nowhere"]
    assert "truncated" in unseen["b"]
    assert unseen["c"] == "a git-LFS pointer"
    assert unseen["nowhere"] == "not here: c.safetensors (a git-LFS pointer)"
    assert not subject.seen_whole
    # where every file is here, what is not stored is known not to be
    here = toy({"a": W, "d": None}, declared=[("a", "d")])
    assert here.unseen(["a", "d", "nowhere"]) == {}
    assert here.seen_whole
    assert not toy({"a": W, "b": Broken((64, 8))}).seen_whole


def test_equality_with_what_nobody_has_seen_is_not_known() -> None:
    for hidden in (Broken((64, 8)), Away((64, 8))):
        subject = toy({"a": W, "b": hidden})
        assert Equality(subject.model, subject.found).same("a", "b") is None


@pytest.mark.parametrize("hidden", [Broken((64, 8)), Away((64, 8))], ids=["broken", "pointer"])
def test_an_expected_tie_with_an_unseen_member_is_neither_there_nor_missing(hidden: Broken | Away) -> None:
    off = [claim(EMBED, HEAD, active=False)]
    assert said(toy({EMBED: W, HEAD: hidden}, declared=off, demands=IO), "TIE107") == ([], ["TIE107"])


def test_seen_members_that_differ_are_no_expected_tie_whatever_the_unseen_one_holds() -> None:
    names = [f"decoder.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    demands = Demands(expect=("cycle:1",))
    away = {names[0]: W, names[1]: W + 1, names[2]: Away((64, 8))}
    assert said(toy(away, demands=demands), "TIE107") == (["TIE107"], [])
    alike = {names[0]: W, names[1]: W.copy(), names[2]: Away((64, 8))}
    assert said(toy(alike, demands=demands), "TIE107") == ([], ["TIE107"])


def test_a_lock_is_not_lost_on_pointers() -> None:
    tied = as_locked(toy({EMBED: W, HEAD: None}, declared=[(EMBED, HEAD)]))
    both, codes = ("TIE206", "TIE207"), ["TIE206", "TIE207"]
    for left in ({EMBED: W, HEAD: Away((64, 8))}, {EMBED: Away((64, 8)), HEAD: Away((64, 8))}, {"x": Away((0,))}):
        assert said(toy(left, declared=[(EMBED, HEAD)], locked=tied), *both) == ([], codes)
    # two members that were read and differ are lost, and no pointer beside them hides it
    apart = toy({EMBED: W, HEAD: W + 1, "x": Away((4, 3))}, locked=tied)
    assert said(apart, *both) == (["TIE206"], [])


def test_a_budget_of_copies_is_not_kept_by_not_looking() -> None:
    none = Demands(max_duplicate_bytes=0)
    assert said(toy({"a": W, "b": Away((64, 8))}, demands=none), "TIE108") == ([], ["TIE108"])
    # a folder of which not even names are known
    nothing = toy({}, demands=none, metadata={"weights": "not here: model.safetensors (a git-LFS pointer)"})
    assert said(nothing, "TIE108") == ([], ["TIE108"])
    # what is here is over the limit already: 64 · 8 · 4 = 2,048 bytes again
    over = toy({"a": W, "b": W.copy(), "c": Away((64, 8))}, demands=none)
    assert said(over, "TIE108") == (["TIE108"], [])


def test_the_number_of_parameters_may_be_less_where_a_copy_was_not_seen() -> None:
    # 64 · 8 = 512 each: 1,024 if they differ, 512 if they are the tie that is declared
    claimed = {"declared": [(EMBED, HEAD)]}
    may = toy({EMBED: W, HEAD: Broken((64, 8))}, demands=Demands(max_parameters=600), **claimed)  # type: ignore[arg-type]
    assert said(may, "TIE109") == ([], ["TIE109"])
    sure = toy({EMBED: W, HEAD: Broken((64, 8))}, demands=Demands(max_parameters=511), **claimed)  # type: ignore[arg-type]
    assert said(sure, "TIE109") == (["TIE109"], [])
    small = toy({EMBED: W, HEAD: Broken((64, 8))}, demands=Demands(max_parameters=1024), **claimed)  # type: ignore[arg-type]
    assert said(small, "TIE109") == ([], [])


def test_pointers_are_not_locked() -> None:
    with pytest.raises(UnreadableModel, match=r"not locked, the weights are not here: .*git-LFS"):
        lock_of(toy({EMBED: W, HEAD: Away((64, 8))}), "m")


@pytest.mark.parametrize("gone", [("model-00002-of-00002.safetensors",), ("model-00001-of-00002.safetensors",)])
def test_a_shard_that_became_a_pointer_loses_no_tie_and_the_lock_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = folder(tmp_path / "m")
    (tmp_path / "tieaudit.toml").touch()
    run = CliRunner()
    assert run.invoke(main, ["lock"]).exit_code == 0
    before = (tmp_path / NAME).read_bytes()
    assert b"lm_head.weight" in before
    for name in gone:
        (home / name).write_text(LFS)
    done = run.invoke(main, ["check", "--select", "TIE206,TIE207", "--format", "json", "--no-cache"])
    (model,) = json.loads(done.stdout)["models"]
    assert model["findings"] == []
    assert [one["code"] for one in model["cannot_tell"]] == ["TIE206", "TIE207"]
    done = run.invoke(main, ["lock"])
    assert done.exit_code == 2
    assert "not locked, the weights are not here" in done.output
    assert (tmp_path / NAME).read_bytes() == before


def test_the_examples_of_pointers_are_pointers() -> None:
    subject = toy({"a": Away((2, 3)), "b": ramp(2, 3)})
    assert not subject.model.weights_here
    assert subject.found.unreadable == {}
