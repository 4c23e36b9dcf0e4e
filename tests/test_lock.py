"""The lock file: laws of what changed, the format, hostile files, the command, and being killed in between."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.audit import audit
from tieaudit.cli import main
from tieaudit.config import Settings
from tieaudit.errors import UnreadableModel, UsageError
from tieaudit.find import find
from tieaudit.inline import quoted, value_of
from tieaudit.load import load_one
from tieaudit.locked import NAME, changes, lock_of, lock_text, read_lock, write_lock
from tieaudit.roles import roles
from tieaudit.scan import look
from tieaudit.sealed import Change, Locked, LockedMember, LockedTie
from tieaudit.sealing import as_locked, changes_since, fingerprint, sealed
from tieaudit.since import tie_changes
from tieaudit.toy import Broken, claim, ramp, toy
from tieaudit.verdict import Subject

W, OTHER = ramp(64, 8), ramp(64, 8, seed=1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = toy({EMBED: W, HEAD: None}, declared=[(EMBED, HEAD)])
FIXTURES = ("gpt_decoder", "bert_encoder", "bart_seq2seq", "albert_shared")


def tieaudit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def locked(path: Path) -> Locked:
    return lock_of(look(load_one(path)), path.name)


def since(before: Subject, after: Subject) -> list[Change]:
    return list(tie_changes(sealed(before), sealed(after), after.model.by_id))


def kinds(before: Subject, after: Subject) -> list[str]:
    return [change.kind for change in since(before, after)]


# laws


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("variant", ["hf_tied", "hf_lost", "hf_untied", "tied.onnx", "lost.onnx", "untied.onnx"])
def test_what_was_locked_just_now_has_not_changed(fixtures_dir: Path, tmp_path: Path, name: str, variant: str) -> None:
    one = locked(fixtures_dir / name / variant)
    write_lock(tmp_path / NAME, {one.path: one})
    assert read_lock(tmp_path / NAME) == {one.path: one}
    assert changes(one, locked(fixtures_dir / name / variant)) == ()


@pytest.mark.parametrize("name", ["gpt_decoder/tied.onnx", "gpt_decoder/hf_tied", "bart_seq2seq/hf_tied"])
def test_untying_a_model_loses_every_tie_that_it_unties(fixtures_dir: Path, tmp_path: Path, name: str) -> None:
    if "hf_" in name:
        pytest.importorskip("transformers")
    source, result = fixtures_dir / name, tmp_path / Path(name).name
    done = tieaudit("apply", source, "--scheme", "untie", "--to", result)
    assert done.exit_code == 0, done.output
    before, after = locked(source), locked(result)
    found = changes(before, after, frozenset(load_one(result).by_id))
    assert [change.kind for change in found if change.kind != "count"] == ["lost"] * len(before.ties)
    assert all(change.n_bytes for change in found if change.kind == "lost")
    assert [change.kind for change in changes(after, before, frozenset(load_one(source).by_id))].count("lost") == 0


def test_another_container_has_lost_no_tie(fixtures_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source, result = fixtures_dir / "gpt_decoder" / "hf_tied", tmp_path / "hf_tied"
    done = tieaudit("apply", source, "--container", "torch", "--to", result)
    assert done.exit_code == 0, done.output
    before, after = locked(source), locked(result)
    assert before.ties[0].origin == "absent"  # safetensors leaves the name out, a checkpoint stores it as an alias
    assert after.ties[0].origin == "aliased"
    assert [change.kind for change in changes(before, after) if change.kind != "count"] == []


def test_other_shards_are_the_same_lock(fixtures_dir: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    source, result = fixtures_dir / "gpt_decoder" / "hf_lost", tmp_path / "hf_lost"
    shutil.copytree(source, result)
    tensors = safetensors.load_file(result / "model.safetensors")
    (result / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(where.values()):
        safetensors.save_file({name: tensors[name] for name in tensors if where[name] == shard}, result / shard)
    index = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": where}
    (result / "model.safetensors.index.json").write_text(json.dumps(index))
    assert changes(locked(source), locked(result)) == ()
    assert lock_text({"m": locked(source)}) == lock_text({"m": locked(result)})


def test_names_in_another_order_lock_the_same(fixtures_dir: Path) -> None:
    model = load_one(fixtures_dir / "albert_shared" / "lost.onnx")
    weights = list(model.weights)
    random.Random(5).shuffle(weights)
    shuffled = replace(model, weights=tuple(weights))
    assert sealed(Subject(shuffled, find(shuffled), roles(shuffled))) == sealed(look(model))


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 16), (1, 64), (64,), (4, 4, 4)])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_digest_is_that_of_the_transpose_and_of_nothing_that_differs_in_one_bit(
    shape: tuple[int, ...], kind: str
) -> None:
    values = (ramp(*shape) * 50).astype(kind)
    changed = values.copy()
    changed.reshape(-1).view("uint8")[3] ^= 1
    digests = [
        fingerprint(toy({"w": array}).model.by_id["w"]) for array in (values, np.ascontiguousarray(values.T), changed)
    ]
    same = values.ndim < 3  # a permutation of three axes is no transpose: another digest
    assert (digests[0] == digests[1]) is same
    assert digests[0] != digests[2]


def test_a_digest_is_the_sha256_of_the_tall_matrix() -> None:
    import hashlib

    wide = toy({"w": np.ascontiguousarray(W.T)}).model.by_id["w"]
    # the tempting wrong answer is the digest of the bytes as they are stored, which no transposed export has
    assert fingerprint(wide) == hashlib.sha256(W.tobytes()).hexdigest() != hashlib.sha256(W.T.tobytes()).hexdigest()


# what is said of a change


def test_a_tie_that_is_stored_twice_is_lost_and_the_bytes_are_named() -> None:
    (change,) = since(TIED, toy({EMBED: W, HEAD: W.copy()}, declared=[(EMBED, HEAD)]))
    # 64 · 8 · 4 bytes = 2,048
    assert change.message == (
        "lost: lm_head.weight is stored apart from model.embed_tokens.weight (was absent); 2.0 kB again"
    )
    assert change.n_bytes == 2048


def test_a_tie_whose_members_differ_is_lost() -> None:
    (change,) = since(TIED, toy({EMBED: W, HEAD: OTHER}, declared=[claim(EMBED, HEAD, active=False)]))
    assert change.message == "lost: lm_head.weight is no longer model.embed_tokens.weight (was absent); 2.0 kB again"


def test_new_values_under_the_same_tie_are_a_changed_value_and_nothing_lost() -> None:
    assert kinds(TIED, toy({EMBED: OTHER, HEAD: None}, declared=[(EMBED, HEAD)])) == ["value"]


def test_both_names_new_with_the_same_value_is_a_rename() -> None:
    (change,) = since(TIED, toy({"wte": W, "head": None}, declared=[("wte", "head")]))
    assert change.kind == "renamed"
    assert set(change.before) == {EMBED, HEAD}
    assert set(change.after) == {"wte", "head"}


def test_one_name_new_is_a_rename_only_while_the_old_one_is_not_there() -> None:
    again = {"declared": [(EMBED, "head")]}
    assert kinds(TIED, toy({EMBED: W, "head": None}, **again)) == ["renamed"]  # type: ignore[arg-type]
    stays = toy({EMBED: W, "head": None, HEAD: OTHER}, **again)  # type: ignore[arg-type]
    assert kinds(TIED, stays) == ["lost", "members"]


def test_names_that_are_still_there_untied_are_lost_whatever_else_has_their_value() -> None:
    after = toy({EMBED: OTHER, HEAD: ramp(64, 8, seed=2), "x": W, "y": None}, declared=[("x", "y")])
    assert kinds(TIED, after) == ["lost", "gained"]


def test_renamed_and_retrained_at_once_is_no_loss_where_the_roles_say_which_tie_it_is() -> None:
    after = toy({"transformer.wte.weight": OTHER, "embed_out.weight": None},
                declared=[("transformer.wte.weight", "embed_out.weight")])  # fmt: skip
    assert kinds(TIED, after) == ["renamed", "value"]


def test_renamed_and_untied_at_once_is_lost() -> None:
    after = toy({"transformer.wte.weight": W, "embed_out.weight": OTHER})
    (change,) = since(TIED, after)
    assert change.kind == "lost"
    assert "none of them is there" in change.message


def test_one_of_three_apart_is_told_by_name() -> None:
    before = toy({"a": W, "b": None, "c": None}, declared=[("a", "b", "c")])
    after = toy({"a": W, "b": None, "c": OTHER}, declared=[("a", "b")])
    (change,) = since(before, after)
    assert change.message.startswith("lost: c is no longer a (was absent)")


def test_a_tie_that_fell_into_two_is_one_loss_and_no_gain() -> None:
    before = toy({name: W if name == "a" else None for name in "abcd"}, declared=[("a", "b", "c", "d")])
    after = toy({"a": W, "b": None, "c": OTHER, "d": None}, declared=[("a", "b"), ("c", "d")])
    (change,) = since(before, after)
    assert change.message.startswith("lost: c and d are no longer a")


def test_a_flag_switched_off_loses_a_tie_that_only_the_declaration_held() -> None:
    before = toy({EMBED: W, HEAD: W.copy()}, declared=[(EMBED, HEAD)])
    after = toy({EMBED: W, HEAD: W.copy()}, declared=[claim(EMBED, HEAD, active=False)])
    (change,) = since(before, after)
    assert change.kind == "lost"
    assert "no longer declared" in change.message
    assert kinds(after, before) == ["gained"]


def test_a_stored_tensor_that_serves_fewer_operations_beside_its_copy_has_lost_a_tie() -> None:
    before = toy({"w": W}, uses=[("w", "Gather"), ("w", "Gemm")], format="onnx")
    after = toy({"w": W, "w2": W.T.copy()}, uses=[("w", "Gather"), ("w2", "Gemm")], format="onnx")
    assert kinds(before, after) == ["lost"]
    assert kinds(after, before) == ["gained"]
    assert kinds(before, toy({"w": W}, uses=[("w", "Gather"), ("w", "MatMul")], format="onnx")) == ["members"]
    three = toy({"w": W}, uses=[("w", "Gather"), ("w", "Gemm"), ("w", "MatMul")], format="onnx")
    split = toy({"w": W, "w2": W.T.copy()}, uses=[("w", "Gather"), ("w", "Gemm"), ("w2", "MatMul")], format="onnx")
    assert kinds(three, split)[0] == "lost"
    assert kinds(before, three) == ["members"]


def test_a_stored_tensor_that_serves_fewer_operations_without_a_copy_has_lost_nothing() -> None:
    before = toy({"w": W}, uses=[("w", "Gather"), ("w", "Gemm")], format="onnx")
    three = toy({"w": W}, uses=[("w", "Gather"), ("w", "Gemm"), ("w", "MatMul")], format="onnx")
    (change,) = since(before, toy({"w": W}, uses=[("w", "Gather")], format="onnx"))
    assert change.message == "members: w serves one operation at most, before Gather and Gemm; no copy of it is stored"
    (change,) = since(three, before)
    assert change.message == "members: w serves Gather and Gemm, before Gather, Gemm and MatMul"
    # a copy that was there before is no further one
    beside = [("w", "Gather"), ("w", "Gemm"), ("w2", "MatMul")]
    copied = toy({"w": W, "w2": W.copy()}, uses=[*beside, ("w", "Add")], format="onnx")
    assert kinds(copied, toy({"w": W, "w2": W.copy()}, uses=beside, format="onnx")) == ["members"]


def test_a_tensor_that_serves_fewer_operations_beside_one_trained_apart_has_lost_a_tie() -> None:
    before = toy({EMBED: W}, uses=[(EMBED, "Gather"), (EMBED, "Gemm")], format="onnx")
    uses = [(EMBED, "Gather"), (HEAD, "MatMul")]
    after = toy({EMBED: W, HEAD: OTHER.T.copy()}, uses=uses, format="onnx", locked=as_locked(before))
    (change,) = changes_since(after)
    assert change.message == (
        f"lost: {EMBED} serves one operation at most, before Gather and Gemm, beside 1 × output_head, 0 before; "
        "2.0 kB again"
    )


def test_a_tie_of_a_few_bytes_that_splits_is_under_the_threshold_and_one_that_is_switched_off_is_not() -> None:
    scale = ramp(64)  # 64 · 4 = 256 bytes, under min-n-bytes of 1,024
    shared = toy({"scale": scale}, uses=[("scale", "Mul"), ("scale", "Add")], format="onnx")
    split = toy({"scale": scale, "scale2": scale.copy()}, uses=[("scale", "Mul"), ("scale2", "Add")], format="onnx",
                locked=as_locked(shared))  # fmt: skip
    assert [change.kind for change in changes_since(split)] == ["lost"]
    assert not [one for one in audit(split).findings if one.code in ("TIE206", "TIE207")]
    assert audit(split, settings=Settings(min_n_bytes=256)).findings[0].code == "TIE206"
    # nothing is stored again where only the declaration went, and 2,048 bytes are at stake all the same
    before = as_locked(toy({EMBED: W, HEAD: W.copy()}, declared=[(EMBED, HEAD)]))
    off = toy({EMBED: W, HEAD: W.copy()}, declared=[claim(EMBED, HEAD, active=False)], locked=before)
    assert [one.n_bytes for one in audit(off).findings if one.code == "TIE206"] == [2048]


def test_a_tie_under_new_names_of_which_one_is_gone_is_a_rename_and_a_loss() -> None:
    before = toy({"a": W, "b": W.copy(), "c": W.copy()}, format="safetensors")
    after = toy({"x": W, "y": W.copy()}, format="safetensors")
    renamed, lost, *_ = since(before, after)
    assert renamed.message == "renamed: a is now x, b is now y"
    assert lost.message == "lost: c is no longer a (was measured); c is not there any more"


@given(st.data())
def test_whatever_became_of_ties_a_split_is_told_and_what_stands_is_not(data: st.DataObject) -> None:
    def ties(names: list[str]) -> list[list[str]]:
        home = {name: data.draw(st.sampled_from([0, 0, 0, 1, 2, 3])) for name in names}
        return [[name for name in names if home[name] == one] for one in range(4)]

    def locked_as(groups: list[list[str]]) -> list[LockedTie]:
        shown = (tuple(LockedMember(name, "other") for name in group) for group in groups if len(group) > 1)
        digest = "{:064x}".format
        return [
            LockedTie(members, "aliased", "float32", (4, 4), digest(data.draw(st.integers(0, 2)))) for members in shown
        ]

    names = list("abcdef")[: data.draw(st.integers(2, 6))]
    others = ["x", "y", "z"]
    now = others if data.draw(st.booleans()) else [name for name in [*names, *others] if data.draw(st.booleans())]
    before, after = ties(names), ties(now)
    found = list(tie_changes(locked_as(before), locked_as(after), frozenset(now)))
    for old in before:
        lost = [change for change in found if change.kind == "lost" and set(change.before) == set(old)]
        pieces = [set(old) & set(group) for group in after if set(old) & set(group)]
        if len(pieces) > 1:
            assert lost
        if pieces == [set(old)]:
            assert not lost


def test_constants_and_buffers_are_not_locked() -> None:
    zeros = np.zeros((64, 8), "float32")
    assert sealed(toy({"a": zeros, "b": zeros.copy()}, format="onnx")) == ()
    assert sealed(toy({"a": zeros, "b": None}, declared=[("a", "b")])) == ()
    assert sealed(toy({"a": W, "b": W.copy()}, format="onnx", buffers=["a", "b"])) == ()
    assert len(sealed(toy({"a": W, "b": W.copy()}, format="onnx"))) == 1


def test_a_model_with_unreadable_bytes_is_not_locked(tmp_path: Path) -> None:
    with pytest.raises(UnreadableModel, match="not locked, h cannot be read"):
        lock_of(toy({"e": W, "h": Broken((64, 8))}), "m")


# the file

NAMES = st.text(st.characters(exclude_categories=()), max_size=40)


@given(NAMES)
def test_any_text_survives_and_shows_nothing_that_acts(text: str) -> None:
    line = quoted(text)
    assert value_of(line) == text
    assert line.isprintable()
    if not re.search("[\ud800-\udfff]", text):  # TOML has no lone surrogates
        assert tomllib.loads(f"name = {line}") == {"name": text}


HOSTILE = [
    "plain", "a\nb", "\x1b[31mred", "<script>", "::set-output name=x::y", "\u202egpj.exe", "x" * 65536,
    'quote " and \\', "\udcff", "]", "# comment", "a = 1", "\x7f", "name\x00",
]  # fmt: skip


def test_hostile_names_come_back_as_they_were(tmp_path: Path) -> None:
    weights = {name: W if index % 2 else W.copy() for index, name in enumerate(HOSTILE)}
    one = lock_of(toy(weights), "model\u202e\n")
    assert len(one.ties[0].members) == len(HOSTILE)
    write_lock(tmp_path / NAME, {one.path: one})
    text = (tmp_path / NAME).read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert len([line for line in text.split("\n") if "members" in line]) == 1
    assert read_lock(tmp_path / NAME) == {one.path: one}


def test_the_lock_file_is_toml(fixtures_dir: Path) -> None:
    one = locked(fixtures_dir / "bart_seq2seq" / "lost.onnx")
    read = tomllib.loads(lock_text({one.path: one}))  # a reader that is not ours
    held = read["model"][one.path]
    assert read["version"] == 1
    assert (held["n_parameters"], held["n_bytes"]) == (one.n_parameters, one.n_bytes)
    assert held["roles"] == dict(one.roles)
    assert [[member["id"] for member in tie["members"]] for tie in held["ties"]] == [list(tie.ids) for tie in one.ties]


def test_one_more_tie_is_one_more_line() -> None:
    one = replace(lock_of(toy({"a": W, "b": W.copy()}, format="onnx"), "toy"), n_bytes=0)
    two = replace(one, ties=(*one.ties, replace(one.ties[0], digest="0" * 64)))
    before, after = lock_text({"m": one}).split("\n"), lock_text({"m": two}).split("\n")
    assert len(after) == len(before) + 1
    assert set(before) <= set(after)


GOOD = lock_text({"m": Locked("m", "onnx", 4, 16, 0, sealed(toy({"a": W, "b": W.copy()}, format="onnx")), {"x": 1})})
BROKEN = {
    "": "1: expected version = 1 as its first line",
    "version = 2\n": "version 2",
    "version = one\n": "1: expected version = 1",
    "<<<<<<< HEAD\n" + GOOD: "a merge left its marks",
    GOOD + "<<<<<<< HEAD\n": "a merge left its marks",
    GOOD + GOOD.partition("\n\n")[2]: "expected each model once",
    GOOD[: GOOD.index("ties")] + "ties = [\n": "cut off",
    GOOD[: GOOD.index("ties")]: "expected ties of the model m",
    GOOD.replace("n_bytes = 16", "n_bytes = -16"): "n_bytes: expected",
    GOOD.replace("n_bytes = 16", "n_bytes = " + "9" * 5000): "n_bytes: expected",
    GOOD.replace("n_bytes = 16", "n_bytes = 16\nn_bytes = 17"): "expected n_bytes once",
    GOOD.replace("n_bytes = 16\n", ""): "expected n_bytes of the model m",
    GOOD.replace("n_bytes = 16", "weight = 16"): "expected one of format",
    GOOD.replace('"float32"', '"float31"'): "dtype: expected an element type",
    GOOD.replace('"measured"', '"imagined"'): "origin: expected one of",
    GOOD.replace("[64, 8]", '[64, "8"]'): "shape: expected a whole number",
    GOOD.replace("[64, 8]", "[" * 5000): "nested at most",
    GOOD.replace('id = "b"', 'id = "a"'): "members: expected two or more names, each once",
    GOOD.replace('id = "b", ', ""): "members: expected id",
    GOOD.replace('id = "b"', 'name = "b"'): "members: expected one of id",
    GOOD.replace('id = "b"', 'id = "b", id = "c"'): "a key, each one once",
    GOOD.replace('"b"', '"\\x62"'): "an escape that TOML knows",
    GOOD.replace('"b"', '"\\U00110000"'): "a character that exists",
    GOOD.replace('sha256 = "', 'sha256 = "zz'): "64 hexadecimal digits",
    GOOD.replace('"m"', '"/etc/passwd"'): "a path relative to the lock file",
    GOOD.replace('[model."m"]', "[model.m"): r"expected \[model\.",
    GOOD.replace('format = "onnx"', "format = 3"): "format: expected a text",
    GOOD.replace("roles.x = 1", "roles.x = 1\nroles.x = 2"): "expected each role once",
    GOOD.replace("},\n]", "} trailing,\n]"): "one value and the end of the line",
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.items(), ids=[str(index) for index in range(len(BROKEN))])
def test_a_broken_lock_file_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert text != GOOD
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UsageError, match=rf"{NAME}:\d+: ") as raised:
        read_lock(tmp_path / NAME)
    assert re.search(expected, str(raised.value))
    assert len(raised.value.message) < 1000


def test_the_line_that_is_named_is_the_wrong_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(GOOD.replace("n_bytes = 16", "n_bytes = x"))
    number = GOOD.split("\n").index("n_bytes = 16") + 1
    with pytest.raises(UsageError, match=f"{NAME}:{number}: n_bytes: expected"):
        read_lock(tmp_path / NAME)


def test_a_lock_file_that_is_no_text_too_large_a_folder_or_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / NAME
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_lock(file)
    file.write_bytes(b"version = 1\n\xff")
    with pytest.raises(UsageError, match="expected UTF-8, found something else at byte 12"):
        read_lock(file)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_lock(tmp_path)
    file.write_text(GOOD)
    monkeypatch.setattr("tieaudit.locked.MAX_LOCK_BYTES", 100)
    with pytest.raises(UsageError, match="at most 100 bytes"):
        read_lock(file)


def test_windows_line_ends_and_comments_are_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(GOOD.replace("\n", "\r\n").encode() + b"# the end\r\n")
    assert list(read_lock(tmp_path / NAME)) == ["m"]


def test_a_huge_lock_file_is_read_in_linear_time(tmp_path: Path) -> None:
    (tie,) = sealed(toy({"a": W, "b": W.copy()}, format="onnx"))
    models = {f"models/{index:05}": Locked(f"models/{index:05}", "onnx", 4, 16, 0, (tie,) * 3) for index in range(2000)}
    write_lock(tmp_path / NAME, models)
    start = time.process_time()
    assert len(read_lock(tmp_path / NAME)) == 2000
    assert time.process_time() - start < 20  # 6,000 ties; some 0.5 s on one core, minutes were it quadratic


# writing


def test_a_lock_that_holds_the_same_is_not_touched(tmp_path: Path) -> None:
    file = tmp_path / NAME
    one = lock_of(TIED, "toy")
    assert write_lock(file, {"m": one})
    before = file.stat()
    assert not write_lock(file, {"m": one})
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_linked_lock_file_stays_a_link_and_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.lock", tmp_path / NAME
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_lock(link, {})
    assert link.is_symlink()
    assert real.read_text().startswith("# Which weights")
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / NAME
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, fail)
            with pytest.raises(OSError, match="No space left"):
                write_lock(file, {})
        assert file.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


_KILLED = """
import sys
from pathlib import Path
from tieaudit.locked import write_lock, read_lock
path = Path(sys.argv[1])
both = [read_lock(Path(name)) for name in sys.argv[2:4]]
write_lock(path, both[0])
print("ready", flush=True)
while True:
    for models in both:
        write_lock(path, models)
"""


def test_killed_at_any_moment_the_lock_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    (tie,) = sealed(toy({"a": W, "b": W.copy()}, format="onnx"))
    texts = []
    for n_models, name in ((400, "a.lock"), (500, "b.lock")):
        models = {f"m{index}": Locked(f"m{index}", "onnx", 4, 16, 0, (tie,) * 4) for index in range(n_models)}
        write_lock(tmp_path / name, models)
        texts.append((tmp_path / name).read_bytes())
    seen = set()
    rng = random.Random(1)
    for _ in range(8):
        command = [sys.executable, "-c", _KILLED, tmp_path / NAME, tmp_path / "a.lock", tmp_path / "b.lock"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 0.05 + 0.2 * rng.random()
        while time.monotonic() < until:
            seen.add((tmp_path / NAME).read_bytes())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add((tmp_path / NAME).read_bytes())
    assert seen <= set(texts)


# the command


@pytest.fixture
def repository(fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two models, and the current folder."""
    home = tmp_path / "repository"
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_tied", home / "chat")
    (home / "exported").mkdir()
    shutil.copy(fixtures_dir / "gpt_decoder" / "tied.onnx", home / "exported" / "model.onnx")
    monkeypatch.chdir(home)
    return home


def test_locking_twice_changes_nothing_and_check_agrees(repository: Path) -> None:
    first = tieaudit("lock")
    assert first.exit_code == 0, first.output
    assert first.stdout.endswith("tieaudit.lock: 2 models, 2 ties; written\n")
    text = (repository / NAME).read_text()
    assert list(read_lock(repository / NAME)) == ["chat", "exported/model.onnx"]
    again = tieaudit("lock")
    assert (again.exit_code, again.stdout) == (0, "tieaudit.lock: 2 models, 2 ties; up to date\n")
    assert tieaudit("lock", "--check").exit_code == 0
    assert (repository / NAME).read_text() == text


def test_a_lost_tie_is_told_and_check_writes_nothing(
    repository: Path, fixtures_dir: Path, golden: Callable[[str, str], None]
) -> None:
    assert tieaudit("lock").exit_code == 0
    text = (repository / NAME).read_text()
    shutil.rmtree(repository / "chat")
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_lost", repository / "chat")
    shutil.copy(fixtures_dir / "gpt_decoder" / "untied.onnx", repository / "exported" / "model.onnx")
    done = tieaudit("lock", "--check")
    assert done.exit_code == 1
    golden("lock-check.txt", done.stdout)
    # 1,500 · 64 · 4 bytes = 384,000 are stored again in the folder; so many parameters more has the export
    assert "384.0 kB again" in done.stdout
    assert "n_parameters 263,168, before 167,168" in done.stdout
    assert 263_168 - 167_168 == 1500 * 64
    assert (repository / NAME).read_text() == text
    assert tieaudit("lock").exit_code == 0
    golden("lock.toml", (repository / NAME).read_text())


def test_what_is_gone_leaves_the_lock_only_when_everything_is_locked(repository: Path) -> None:
    assert tieaudit("lock").exit_code == 0
    shutil.rmtree(repository / "chat")
    assert tieaudit("lock", "exported").exit_code == 0
    assert list(read_lock(repository / NAME)) == ["chat", "exported/model.onnx"]
    done = tieaudit("lock")
    assert "chat\n  gone: it is not there any more" in done.stdout
    assert list(read_lock(repository / NAME)) == ["exported/model.onnx"]


def test_the_lock_lies_beside_the_nearest_settings(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "pyproject.toml").write_text("[tool.tieaudit]\n")
    (repository / "exported" / "pyproject.toml").write_text("[tool.other]\n")
    monkeypatch.chdir(repository / "exported")
    assert tieaudit("lock").exit_code == 0
    assert list(read_lock(repository / NAME)) == ["chat", "exported/model.onnx"]
    assert not (repository / "exported" / NAME).exists()
    (repository / "exported" / "tieaudit.toml").write_text("")
    assert tieaudit("lock").exit_code == 0
    assert list(read_lock(repository / "exported" / NAME)) == ["model.onnx"]
    monkeypatch.chdir(repository.parent)
    (repository / NAME).unlink()
    assert tieaudit("lock", repository / "chat").exit_code == 0
    assert list(read_lock(repository / NAME)) == ["chat"]
    assert tieaudit("lock", repository / "chat", "--to", "other.lock").exit_code == 0
    assert list(read_lock(repository.parent / "other.lock")) == ["repository/chat"]


def test_variants_of_one_export_are_locked_apart(fixtures_dir: Path, tmp_path: Path) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    one.mkdir()
    parts.mkdir()
    for name in ("model.onnx", "model_fp16.onnx"):
        shutil.copy(fixtures_dir / "gpt_decoder" / "tied.onnx", one / name)
    for file in (fixtures_dir / "bart_seq2seq" / "parts_lost").iterdir():
        shutil.copy(file, parts / file.name)
        shutil.copy(file, parts / f"{file.stem}_fp16.onnx")
    done = tieaudit("lock", one, parts, "--to", tmp_path / NAME)
    assert done.exit_code == 0, done.output
    assert list(read_lock(tmp_path / NAME)) == [
        "one/model.onnx", "one/model_fp16.onnx", "parts", "parts/decoder_model_fp16.onnx",
    ]  # fmt: skip


def test_an_unreadable_model_locks_nothing(repository: Path) -> None:
    file = repository / "exported" / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    done = tieaudit("lock")
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert "nothing was written" in done.stderr
    assert not (repository / NAME).exists()


def test_a_folder_without_models_and_a_broken_lock_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tieaudit("lock").exit_code == 2
    (tmp_path / NAME).write_text("version = 9\n")
    done = tieaudit("lock")
    assert done.exit_code == 2
    assert "another version of tieaudit wrote it" in done.stderr
    (tmp_path / NAME).unlink()
    (tmp_path / "pyproject.toml").write_text("[tool")
    assert "expected TOML" in tieaudit("lock").stderr


def test_killed_while_it_locks_the_old_lock_stays(repository: Path) -> None:
    assert tieaudit("lock").exit_code == 0
    text = (repository / NAME).read_text()
    shutil.rmtree(repository / "chat")
    for delay in (0.1, 0.3, 0.6):
        process = subprocess.Popen([sys.executable, "-m", "tieaudit", "lock"], stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        left = (repository / NAME).read_text()
        assert left == text or list(read_lock(repository / NAME)) == ["exported/model.onnx"]


def test_a_misspelt_command_is_told_the_nearest() -> None:
    done = tieaudit("lok")
    assert done.exit_code == 2
    assert "did you mean lock?" in done.stderr


def test_new_models_without_ties_are_named_while_they_are_few_and_counted_when_they_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import save_file

    monkeypatch.chdir(tmp_path)
    for number in range(5):
        save_file({"a": np.full((8, 8), number + 1.0) + np.arange(8)}, f"m{number}.safetensors")
    few = tieaudit("lock", "--check")
    assert few.output.count("  new: 0 ties\n") == 5
    tied = np.arange(64.0).reshape(8, 8)
    save_file({"a": tied, "b": tied}, "tied.safetensors")
    save_file({"a": np.arange(64.0).reshape(8, 8) * 3}, "m5.safetensors")
    many = tieaudit("lock", "--check")
    assert many.output.splitlines()[:3] == ["6 new models without ties", "tied.safetensors", "  new: 1 tie"]
    assert many.output.splitlines()[-1] == "tieaudit.lock: 7 models, 1 tie; would change"
