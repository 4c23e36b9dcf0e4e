"""Replacing a model's own files: all or none of them at every moment, links broken, other files untouched."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_onnx
from exchange_under_fire import listing, without_receipt

from tieaudit import journal
from tieaudit.apply import apply_in_place
from tieaudit.change import Plan
from tieaudit.deliver import check_receipt, undo
from tieaudit.errors import CorruptFile, ParityFailed, RewriteRefused
from tieaudit.exchange import check_replaceable, exchange
from tieaudit.load import load_one
from tieaudit.model import Model
from tieaudit.plan import Choices, plan
from tieaudit.scan import look

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def structural_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof without running models, which has tests of its own, unless a test asks for `every_level`."""
    if "every_level" in request.fixturenames:
        return
    verify = importlib.import_module("tieaudit.verify")
    monkeypatch.setattr(verify, "runner_for", lambda model: "this test runs no models")
    monkeypatch.setattr(
        importlib.import_module("tieaudit.apply"),
        "prove_apart",
        lambda asked: verify.prove(asked.before, asked.after, asked.plan, asked.written),
    )


@pytest.fixture
def every_level() -> None:
    """Asked for by a test whose proof is the real one."""


def planned(path: Path, scheme: str = "dedup") -> tuple[Model, Plan]:
    model = load_one(path)
    return model, plan(look(model), Choices((scheme,)))


def in_place(path: Path, scheme: str = "dedup") -> Path:
    return apply_in_place(*planned(path, scheme), require="structural").delivered.receipt


def sharded(source: Path, folder: Path) -> Path:
    """A folder with the tensors of another one in three shards, the last of which holds nothing but the head."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors, key=lambda name: (name == "lm_head.weight", name))
    half = len(names) // 2
    shards = {"1": names[:half], "2": names[half:-1], "3": names[-1:]}
    folder.mkdir(parents=True)
    weight_map = {}
    for number, inside in shards.items():
        file = f"model-0000{number}-of-00003.safetensors"
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(inside, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    shutil.copy(source / "config.json", folder)
    (folder / "README.md").write_text("# Mine\n")
    return folder


def configured(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}, indent=2))
    return folder


def scene(kind: str, fixtures: Path, home: Path) -> tuple[str, str]:
    """A model of each kind below `home`: its name, and the scheme that changes it."""
    home.mkdir()
    if kind == "external":
        tiny_onnx.lost(home / "m.onnx", external=True)
        return "m.onnx", "dedup"
    if kind == "folder":
        shutil.copytree(fixtures / "gpt_decoder" / "hf_lost", home / "folder")
        return "folder", "dedup"
    if kind == "shards":
        configured(sharded(fixtures / "gpt_decoder" / "hf_lost", home / "folder"), tie_word_embeddings=False)
        return "folder", "dedup"
    if kind == "settings":
        shutil.copytree(fixtures / "gpt_decoder" / "hf_untied", home / "folder")
        configured(home / "folder", tie_word_embeddings=True)
        return "folder", "declare"
    import torch

    table = torch.arange(480.0).reshape(60, 8)
    torch.save({"wte.weight": table, "lm_head.weight": table.clone()}, home / "m.pt")
    return "m.pt", "dedup"


KINDS = ("external", "folder", "shards", "settings", "checkpoint")
CHANGED = {
    "external": {"m.onnx", "m.onnx.data"},
    "folder": {"folder/model.safetensors"},
    # the head's shard has nothing left and goes; the flag was off, and dedup switches it on
    "shards": {"folder/model-00003-of-00003.safetensors", "folder/model.safetensors.index.json", "folder/config.json"},
    "settings": {"folder/config.json"},
    "checkpoint": {"m.pt"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_files_that_change_are_replaced(kind: str, fixtures_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    name, scheme = scene(kind, fixtures_dir, home)
    before = listing(home)
    inodes = {file: (home / file).stat().st_ino for file in before}
    receipt = in_place(home / name, scheme)
    after = without_receipt(listing(home))
    assert {file for file in before if after.get(file) != before[file]} == CHANGED[kind]
    assert after.keys() - before.keys() == set()
    untouched = before.keys() - CHANGED[kind]
    assert {file: (home / file).stat().st_ino for file in untouched} == {file: inodes[file] for file in untouched}
    said = json.loads(receipt.read_text())["replaced"]["files"]
    below = receipt.parent.relative_to(home).as_posix()
    assert {file if below == "." else f"{below}/{file}" for file in said} == CHANGED[kind]
    assert [path.name for path in home.rglob(".*")] == []
    assert check_receipt(receipt) == []


@pytest.mark.parametrize(
    ("mode", "kind"), [*(("kill", kind) for kind in KINDS), ("fail", "external"), ("fail", "shards")]
)
def test_hit_at_any_step_a_model_is_all_old_or_all_new(
    mode: str, kind: str, fixtures_dir: Path, tmp_path: Path
) -> None:
    assert_all_or_none_under_fire(mode, kind, fixtures_dir, tmp_path)


@pytest.mark.parametrize("mode", ["recover", "kill-unlinked", "fail-unlinked"])
def test_so_it_is_where_putting_back_is_hit_too_and_where_no_file_can_have_two_names(
    mode: str, fixtures_dir: Path, tmp_path: Path
) -> None:
    assert_all_or_none_under_fire(mode, "external", fixtures_dir, tmp_path)


def assert_all_or_none_under_fire(mode: str, kind: str, fixtures: Path, tmp_path: Path) -> None:
    name, scheme = scene(kind, fixtures, tmp_path / "home")
    script = Path(__file__).with_name("exchange_under_fire.py")
    done = subprocess.run(
        [sys.executable, script, mode, tmp_path / "home", name, scheme], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # two folders of the journal, at least two files moved into it, at least one kept, itself, its place, its end …
    assert json.loads(done.stdout)["steps"] > 10


def test_a_proof_that_fails_leaves_every_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tieaudit.change import Level, Proof

    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    before = listing(tmp_path)
    failed = replace(Proof(()), levels=(Level("structural", "failed", "a planted failure"),))
    monkeypatch.setattr(importlib.import_module("tieaudit.apply"), "prove_apart", lambda request: failed)
    with pytest.raises(ParityFailed, match="a planted failure"):
        in_place(source)
    assert listing(tmp_path) == before


def test_too_little_room_is_said_and_nothing_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = listing(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(RewriteRefused, match="free bytes"):
        in_place(source)
    assert listing(tmp_path) == before


def test_a_lossy_plan_is_never_made_in_place(tmp_path: Path) -> None:
    model = load_one(tiny_onnx.untied(tmp_path / "m.onnx"))
    lossy = plan(look(model), Choices(("io",), allow_lossy=True))
    with pytest.raises(RewriteRefused, match="only a plan that changes no value"):
        apply_in_place(model, lossy)


def test_links_are_replaced_and_what_they_led_to_stays(fixtures_dir: Path, tmp_path: Path) -> None:
    """As in the cache of the Hub: two snapshots whose files are links to the same blobs."""
    blobs = tmp_path / "blobs"
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_lost", blobs)
    for snapshot in ("one", "two"):
        (tmp_path / snapshot).mkdir()
        for file in blobs.iterdir():
            (tmp_path / snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    before = {name: listing(tmp_path / name) for name in ("blobs", "two")}
    in_place(tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors").is_symlink()
    assert (tmp_path / "one" / "config.json").is_symlink()
    assert {name: listing(tmp_path / name) for name in ("blobs", "two")} == before
    # without one of two tables of 1,500 × 64 numbers of 4 bytes
    saved = (tmp_path / "two" / "model.safetensors").stat().st_size - (
        tmp_path / "one" / "model.safetensors"
    ).stat().st_size
    assert 384_000 <= saved < 384_200


def test_another_name_of_the_same_file_keeps_what_it_has(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    (tmp_path / "backup").mkdir()
    os.link(source, tmp_path / "backup" / "m.onnx")
    before = source.read_bytes()
    in_place(source)
    assert (tmp_path / "backup" / "m.onnx").read_bytes() == before
    assert source.stat().st_nlink == 1


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o755])
def test_permissions_are_kept(mode: int, tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    source.chmod(mode)
    in_place(source)
    assert source.stat().st_mode & 0o777 == mode


def test_a_folder_that_may_not_be_written_is_said_before_anything_is(tmp_path: Path) -> None:
    """In a process of an ordinary user: for root no folder is closed."""
    with tempfile.TemporaryDirectory() as outside:
        home = Path(outside)
        source = tiny_onnx.lost(home / "m.onnx")
        home.chmod(0o555)
        before = listing(home)
        script = (
            "import os, sys\nfrom tieaudit.apply import apply_in_place\nfrom tieaudit.load import load_one\n"
            "from tieaudit.plan import Choices, plan\nfrom tieaudit.scan import look\nmodel = load_one(sys.argv[1])\n"
            "made = plan(look(model), Choices())\nos.geteuid() or os.setuid(65534)\napply_in_place(model, made)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True, check=False)
        assert "expected a folder that may be written, found one that may not; nothing was replaced" in done.stderr
        assert listing(home) == before
        home.chmod(0o755)


def test_a_data_file_that_another_model_reads_is_not_changed_under_it(tmp_path: Path) -> None:
    """Two graphs over one data file, of which the user named one."""
    import onnx

    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    shutil.copy(source, tmp_path / "other.onnx")
    assert onnx.load(tmp_path / "other.onnx", load_external_data=False).graph.initializer[0].external_data
    before = listing(tmp_path)
    with pytest.raises(RewriteRefused, match=r"m\.onnx\.data: .*other\.onnx reads it too"):
        in_place(source)
    assert listing(tmp_path) == before


def test_a_stranger_where_a_new_file_would_go_is_not_replaced(tmp_path: Path) -> None:
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        tiny_onnx.lost(tmp_path / name)
    (tmp_path / "tieaudit.receipt.json").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(RewriteRefused, match="the receipt would take the place of another file"):
        in_place(tmp_path)
    assert listing(tmp_path) == before


def test_a_repository_keeps_its_own_files_and_its_folder(fixtures_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "repository"
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_lost", home)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=home, check=True)
    (home / ".gitattributes").write_text("*.safetensors -text\n")
    git, inode = listing(home / ".git"), home.stat().st_ino
    in_place(home)
    assert (listing(home / ".git"), home.stat().st_ino) == (git, inode)
    changed = subprocess.run(["git", "status", "--short"], cwd=home, capture_output=True, text=True, check=True).stdout
    assert changed.splitlines() == [
        "A  config.json",
        "AM model.safetensors",
        "?? .gitattributes",
        "?? tieaudit.receipt.json",
    ]


@pytest.mark.parametrize("kind", ["folder", "parts"])
def test_what_somebody_else_does_beside_the_model_meanwhile_stays(
    kind: str, fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "repository"
    source = fixtures_dir / ("gpt_decoder/hf_lost" if kind == "folder" else "bart_seq2seq/parts_lost")
    shutil.copytree(source, home)
    (home / "src").mkdir()
    for name in ("src/train.py", "tokenizer.json", "old.txt"):
        (home / name).write_text("before")

    def meanwhile(*args: object) -> object:
        (home / "src" / "train.py").write_text("an hour of editing")
        (home / "src" / "new.bin").write_bytes(b"precious")
        (home / "tokenizer.json").write_text("edited")
        (home / "old.txt").unlink()
        return exchange(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.import_module("tieaudit.apply"), "exchange", meanwhile)
    in_place(home)
    assert (home / "src" / "train.py").read_text() == "an hour of editing"
    assert (home / "src" / "new.bin").read_bytes() == b"precious"
    assert (home / "tokenizer.json").read_text() == "edited"
    assert not (home / "old.txt").exists()
    assert max((tie.n_bytes_saved for tie in look(load_one(home)).found.ties), default=0) < 1024  # and it is mended


def test_settings_that_change_while_the_model_is_proved_are_not_overwritten(
    fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "m"
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_lost", home)
    configured(home, tie_word_embeddings=True)
    stage = importlib.import_module("tieaudit.apply")
    prove = stage.prove_apart

    def meanwhile(asked: object) -> object:
        configured(home, temperature=0.5)
        return prove(asked)

    monkeypatch.setattr(stage, "prove_apart", meanwhile)
    before = (home / "model.safetensors").read_bytes()
    with pytest.raises(RewriteRefused, match="changed meanwhile"):
        in_place(home)
    assert json.loads((home / "config.json").read_text())["temperature"] == 0.5
    assert (home / "model.safetensors").read_bytes() == before


def test_what_was_made_in_place_is_not_undone(tmp_path: Path) -> None:
    receipt = in_place(tiny_onnx.lost(tmp_path / "m.onnx"))
    before = listing(tmp_path)
    with pytest.raises(RewriteRefused, match="whose originals are not kept"):
        undo(receipt)
    assert listing(tmp_path) == before
    (tmp_path / "m.onnx").write_bytes(b"other")
    assert check_receipt(receipt) == [f"output {tmp_path / 'm.onnx'}: changed since the receipt was written"]


def interrupted_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Model, dict[str, str]]:
    """A model with external data, of whose files one was replaced when the run died.

    The place of its journal, the model as it was read before, and its files."""
    source = tiny_onnx.lost(home / "m.onnx", external=True)
    model, before = load_one(source), listing(home)
    module = sys.modules["tieaudit.exchange"]
    real, calls = module._make, []

    def dies(book: journal.Journal, number: int, step: journal.Step) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise SystemExit
        real(book, number, step)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_make", dies)
        patched.setattr(journal, "roll_back", lambda book: sys.exit())
        with pytest.raises(SystemExit):
            in_place(source)
    return journal.interrupted(home)[0], model, before


def test_an_interrupted_replacement_is_noticed_put_back_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, before = interrupted_at(tmp_path, monkeypatch)
    assert {name: listing(tmp_path)[name] == before[name] for name in before} == {"m.onnx": True, "m.onnx.data": False}
    with pytest.raises(RewriteRefused, match="was begun before and has not ended"):
        check_replaceable(model)
    assert journal.interrupted(tmp_path / "other.onnx") == []
    assert journal.recover(tmp_path / "m.onnx") == [
        f"{tmp_path}: a replacement was interrupted; 1 file put back, everything is as it was before it"
    ]
    assert listing(tmp_path) == before
    assert journal.recover(tmp_path) == []


def test_a_file_that_somebody_changed_since_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(tmp_path, monkeypatch)
    (tmp_path / "m.onnx").write_bytes(b"mine by now")
    before = listing(tmp_path)
    with pytest.raises(RewriteRefused, match=r"m\.onnx: expected what it was .* found something else"):
        journal.recover(tmp_path)
    assert listing(tmp_path) == before


def test_a_replacement_that_may_be_at_work_is_left_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _, _ = interrupted_at(tmp_path, monkeypatch)
    before = listing(tmp_path)
    monkeypatch.setattr(journal, "this_machine", lambda: "another")
    with pytest.raises(RewriteRefused, match="may be at work"):
        journal.recover(tmp_path)
    assert listing(tmp_path) == before
    ahead = time.time() + 10**7
    os.utime(place / "journal.json", (ahead, ahead))  # by a clock that was wrong then, or is now
    with pytest.raises(RewriteRefused, match=r"still to come by this clock.*") as refused:
        journal.recover(tmp_path)
    assert "has an older time" in refused.value.hint
    assert listing(tmp_path) == before
    os.utime(place / "journal.json", (0, 0))  # nothing replaces files for decades
    assert len(journal.recover(tmp_path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        '{"schema": "other", "machine": "", "process": 1, "steps": []}',
        '{"schema": "tieaudit/replacing/1", "machine": "", "process": 1, "steps": [{"name": "../victim"}]}',
        '{"schema": "tieaudit/replacing/1", "machine": "", "process": 1, "steps": '
        '[{"name": "../victim", "before": null, "after": "x"}]}',
        '{"schema": "tieaudit/replacing/1", "machine": "", "process": 1, "steps": '
        '[{"name": "/etc/passwd", "before": null, "after": "x"}]}',
        '{"schema": "tieaudit/replacing/1", "machine": "", "process": 1, "steps": '
        '[{"name": "away/victim", "before": null, "after": "x"}]}',
    ],
)
def test_a_forged_journal_touches_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep me")
    home = tmp_path / "home"
    home.mkdir()
    (home / "away").symlink_to(tmp_path)
    place = home / journal.name_of(home / "m.onnx")
    place.mkdir()
    (place / "journal.json").write_text(content)
    os.utime(place / "journal.json", (0, 0))
    before = listing(tmp_path)
    with pytest.raises(CorruptFile, match="expected the journal of a replacement"):
        journal.recover(home)
    assert listing(tmp_path) == before


def test_a_model_without_files_is_not_replaced(tmp_path: Path) -> None:
    from tieaudit.change import Proof, Written
    from tieaudit.toy import toy

    model = toy({"a": np.ones((2, 2), np.float32)}).model
    with pytest.raises(RewriteRefused, match="expected a model in files"):
        exchange(model, Plan("", "", (), (), 0, True), Written(()), Proof(()), tmp_path)
