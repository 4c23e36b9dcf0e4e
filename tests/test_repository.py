"""Which models a run is about in a repository as it is: ignored, excluded, changed, named; pointers and caches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tieaudit.errors import UsageError, WeightsNotHere
from tieaudit.load import locate
from tieaudit.repository import Gathered, gather

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
TABLE = np.arange(48, dtype=np.float32).reshape(16, 3)


def git(folder: Path, *words: str) -> str:
    settings = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    )
    done = subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path) -> str:
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "a")
    return git(folder, "rev-parse", "HEAD")


def onnx_file(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny_onnx.lost(path, **options)


def folder_of(folder: Path, **shards: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder of one file, or of shards beside an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    if not shards:
        save_file({EMBED: TABLE}, folder / "model.safetensors")
    names = {stem: f"model-{stem}-of-00002.safetensors" for stem in shards}
    for stem, tensors in shards.items():
        save_file(tensors, folder / names[stem])
    if shards:
        found = {name: names[stem] for stem, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    return folder


def sharded(folder: Path) -> Path:
    return folder_of(folder, **{"00001": {EMBED: TABLE}, "00002": {HEAD: TABLE}})


def found(root: Path, *paths: str, **options: object) -> list[str]:
    """Models by their paths below the root; nothing may be in error."""
    gathered = gather([str(root / path) for path in paths], root=root, **options)  # type: ignore[arg-type]
    assert gathered.errors == ()
    return [str(source.path.relative_to(root)) for source in gathered.sources]


def skipped(gathered: Gathered) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in gathered.skipped}


# ---- folders ----


def test_without_paths_the_whole_root_is_searched_and_complete(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a" / "cat.onnx")
    folder_of(tmp_path / "b")
    gathered = gather([], root=tmp_path)
    assert [str(source.path) for source in gathered.sources] == [str(tmp_path / "a" / "cat.onnx"), str(tmp_path / "b")]
    assert gathered.complete
    assert gather([str(tmp_path)], root=tmp_path / "a").complete
    assert not gather([str(tmp_path / "a")], root=tmp_path).complete
    assert not gather([str(tmp_path / "a" / "cat.onnx")], root=tmp_path).complete


def test_a_search_finds_what_a_scan_of_the_folder_finds(fixtures_dir: Path) -> None:
    sources, errors = locate([str(fixtures_dir)])
    gathered = gather([], root=fixtures_dir, respect_gitignore=False)
    assert len(sources) > 20
    assert {(s.path, s.files, s.format.name) for s in gathered.sources} == {
        (s.path, s.files, s.format.name) for s in sources
    }
    assert [message for _, message in gathered.errors] == [message for _, message in errors]


def test_paths_are_named_from_the_root_however_they_were_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file(tmp_path / "a" / "cat.onnx")
    monkeypatch.chdir(tmp_path)
    spelt = ["a/cat.onnx", "./a/../a/cat.onnx", str(tmp_path / "a" / "cat.onnx"), "a", "a/*.onnx"]
    gathered = gather(spelt, root=Path("."))
    assert [str(source.path) for source in gathered.sources] == ["a/cat.onnx"]


def test_what_is_no_place_for_models_is_not_searched(tmp_path: Path) -> None:
    for place in (".git/x", ".cache", "node_modules/y", ".venv/lib", "__pycache__", ".m.tieaudit-0"):
        onnx_file(tmp_path / place / "m.onnx")
    onnx_file(tmp_path / "env" / "lib" / "m.onnx")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    onnx_file(tmp_path / "here" / "m.onnx")
    (tmp_path / "here" / "up").symlink_to(tmp_path)
    assert found(tmp_path) == ["here/m.onnx"]


# ---- ignored and excluded ----


def test_git_s_ignore_files_of_all_levels_are_respected_as_git_does(tmp_path: Path) -> None:
    names = "out/a.onnx b_old.onnx keep_old.onnx sub/c_old.onnx sub/d.onnx sub/deep/e.onnx x/top.onnx top.onnx own.onnx"
    for name in names.split():
        onnx_file(tmp_path / name)
    (tmp_path / ".gitignore").write_text("out/\n*_old.onnx\n!keep_old.onnx\n/top.onnx\n[z-a]\n")
    (tmp_path / "sub" / ".gitignore").write_text("!c_old.onnx\ndeep\n")
    git(tmp_path, "init", "-q")
    (tmp_path / ".git" / "info" / "exclude").write_text("own.onnx\n")
    expected = ["keep_old.onnx", "sub/c_old.onnx", "sub/d.onnx", "x/top.onnx"]
    assert found(tmp_path) == expected
    listed = git(tmp_path, "ls-files", "--others", "--exclude-standard").split()  # git itself is the oracle
    assert sorted(name for name in listed if name.endswith(".onnx")) == expected
    assert len(found(tmp_path, respect_gitignore=False)) == 9
    # from a subfolder, the files above it still count
    assert found(tmp_path / "sub") == ["c_old.onnx", "d.onnx"]
    assert found(tmp_path / "x") == ["top.onnx"]


def test_an_ignored_folder_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file(tmp_path / "out" / "a.onnx")
    (tmp_path / ".gitignore").write_text("out/\n")
    entered: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(Path(path).name) or scandir(path))  # type: ignore[func-returns-value]
    assert found(tmp_path) == []
    assert "out" not in entered
    assert tmp_path.name in entered


def test_what_is_named_is_looked_at_though_git_ignores_it_but_not_if_the_policy_excludes_it(tmp_path: Path) -> None:
    onnx_file(tmp_path / "out" / "a.onnx")
    onnx_file(tmp_path / "out" / "b_old.onnx")
    (tmp_path / ".gitignore").write_text("out/\n")
    (tmp_path / "out" / ".gitignore").write_text("*_old.onnx\n")
    git(tmp_path, "init", "-q")
    assert found(tmp_path, "out/a.onnx") == ["out/a.onnx"]
    assert found(tmp_path, "out") == ["out/a.onnx"]
    gathered = gather([str(tmp_path / "out" / "a.onnx"), str(tmp_path / "out")], root=tmp_path, exclude=["/out/"])
    assert gathered.sources == () == gathered.errors
    assert skipped(gathered) == {"a.onnx": "excluded by the policy", "out": "excluded by the policy"}


def test_excludes_are_patterns_of_gitignore_from_the_root_with_negation(tmp_path: Path) -> None:
    for name in ("a/x.onnx", "a/y.onnx", "b/a/x.onnx", "b/z.onnx"):
        onnx_file(tmp_path / name)
    assert found(tmp_path, exclude=["/a/*", "!/a/y.onnx", "z.*"]) == ["a/y.onnx", "b/a/x.onnx"]
    with pytest.raises(UsageError, match=r"exclude: expected a pattern.*\[z-a\]"):
        gather([], root=tmp_path, exclude=["[z-a]"])


def test_an_excluded_model_does_not_come_back_through_its_data_file(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx", external=True)
    assert found(tmp_path, "a.onnx.data", exclude=["*.onnx"]) == []
    assert found(tmp_path, "a.onnx.data") == ["a.onnx"]


def test_an_ignore_file_that_is_a_pipe_or_a_link_is_not_opened(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx")
    os.mkfifo(tmp_path / ".gitignore")
    assert found(tmp_path) == ["a.onnx"]
    (tmp_path / ".gitignore").unlink()
    (tmp_path / "rules").write_text("*.onnx\n")
    (tmp_path / ".gitignore").symlink_to("rules")  # git does not follow such a link either
    assert found(tmp_path) == ["a.onnx"]


# ---- what is named ----


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_shard_an_index_and_a_config_mean_their_folder(tmp_path: Path, name: str) -> None:
    sharded(tmp_path / "m")
    assert found(tmp_path, f"m/{name}") == ["m"]


@pytest.mark.parametrize("name", ["m.onnx.data", "weights.bin", "data/w.raw"])
def test_a_file_of_external_data_means_the_model_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    data = tmp_path / name
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(TABLE.tobytes())
    tensor = TensorProto(name="w", data_type=1, dims=[16, 3], data_location=1)
    tensor.external_data.add(key="location", value=name)
    graph = helper.make_graph([], "g", [], [], [tensor])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert found(tmp_path, name) == ["m.onnx"]
    gathered = gather([str(tmp_path / "other.bin")], root=tmp_path)
    assert "no such file" in gathered.errors[0][1]


def test_what_is_named_and_is_no_model_is_skipped_with_a_reason_and_what_is_missing_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path / "m")
    for name in ("README.md", "m/tokenizer.json", "m/generation_config.json", "empty/config.json", "b.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}')
    names = ["README.md", "m/tokenizer.json", "m/generation_config.json", "empty/config.json", "b.bin", "gone.onnx"]
    gathered = gather([str(tmp_path / name) for name in names], root=tmp_path)
    assert gathered.sources == ()
    assert [(Path(path).name, message) for path, message in gathered.errors] == [
        ("gone.onnx", f"{tmp_path / 'gone.onnx'}: no such file or folder")
    ]
    reasons = skipped(gathered)
    assert list(reasons) == ["README.md", "tokenizer.json", "generation_config.json", "config.json", "b.bin"]
    assert reasons["config.json"] == "a configuration without weights"
    assert all(reasons.values())


def test_one_bad_index_hides_no_other_model(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors.index.json").write_text("{")
    (tmp_path / "good").mkdir()
    save_file({"w": TABLE}, tmp_path / "good" / "m.safetensors")
    gathered = gather([], root=tmp_path)
    assert [source.path.name for source in gathered.sources] == ["m.safetensors"]
    ((path, message),) = gathered.errors
    assert "bad" in path and "\n" not in message


def test_one_part_of_an_export_means_the_whole_export_but_no_ignored_or_unrelated_file(tmp_path: Path) -> None:
    names = ("encoder_model", "decoder_model", "decoder_with_past_model", "cat", "encoder_model_int8")
    for name in names:
        onnx_file(tmp_path / "e" / f"{name}.onnx")
    (tmp_path / ".gitignore").write_text("*past*\n")
    first = commit(tmp_path)
    tiny_onnx.untied(tmp_path / "e" / "encoder_model.onnx")
    whole = gather([], root=tmp_path)
    for gathered in (
        gather([str(tmp_path / "e" / "encoder_model.onnx")], root=tmp_path),
        gather([], root=tmp_path, since=first),
    ):
        (source,) = gathered.sources
        assert source in whole.sources
        assert [file.stem for file in source.files] == ["decoder_model", "encoder_model"]
    past = str(tmp_path / "e" / "decoder_with_past_model.onnx")
    (source,) = gather([past], root=tmp_path).sources
    assert [file.stem for file in source.files] == ["decoder_model", "decoder_with_past_model", "encoder_model"]


# ---- what changed ----


def test_only_models_of_changed_new_and_deleted_files_are_looked_at(tmp_path: Path) -> None:
    for name in ("same", "edited", "reshaped"):
        sharded(tmp_path / name)
    for name in ("same.onnx", "removed.onnx", "moved.onnx", "kept.onnx"):
        onnx_file(tmp_path / "o" / name, external=name == "kept.onnx")
    (tmp_path / ".gitignore").write_text("ignored.onnx\n")
    first = commit(tmp_path)
    (tmp_path / "edited" / "config.json").write_text(json.dumps({**LLAMA, "a": 1}))
    (tmp_path / "reshaped" / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "o" / "removed.onnx").unlink()
    (tmp_path / "o" / "moved.onnx").rename(tmp_path / "o" / "here.onnx")
    (tmp_path / "o" / "kept.onnx.data").unlink()
    onnx_file(tmp_path / "new.onnx")
    onnx_file(tmp_path / "ignored.onnx")
    (tmp_path / "README.md").write_text("new")
    expected = ["edited", "new.onnx", "o/here.onnx", "o/kept.onnx", "reshaped"]
    assert found(tmp_path, since=first) == expected
    gathered = gather([], root=tmp_path, since=first)
    assert gathered.skipped == () and not gathered.complete
    assert found(tmp_path, "o", since=first) == ["o/here.onnx", "o/kept.onnx"]
    assert found(tmp_path, "same", "o/same.onnx", since=first) == []
    commit(tmp_path)
    assert found(tmp_path, since=first) == expected
    assert found(tmp_path, since="HEAD~1") == expected
    assert found(tmp_path, since="HEAD") == []


def test_a_missing_path_is_an_error_unless_it_is_what_was_deleted(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    first = commit(tmp_path)
    gone = "m/model-00001-of-00002.safetensors"
    (tmp_path / gone).unlink()
    assert found(tmp_path, gone, since=first) == ["m"]
    gathered = gather([str(tmp_path / "never.onnx")], root=tmp_path, since=first)
    assert "no such file or folder, and it did not change" in gathered.errors[0][1]


def test_shards_without_a_configuration_mean_what_is_left_of_them(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": TABLE}, tmp_path / f"m-0000{number}-of-00002.safetensors")
    first = commit(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    assert found(tmp_path, since=first) == ["m-00001-of-00002.safetensors"]


def test_changes_are_seen_from_a_subfolder_and_through_a_linked_root(tmp_path: Path) -> None:
    top = tmp_path / "top"
    onnx_file(top / "sub" / "a.onnx")
    onnx_file(top / "b.onnx")
    first = commit(top)
    for name in ("sub/a.onnx", "b.onnx"):
        tiny_onnx.untied(top / name)
    assert found(top / "sub", since=first) == ["a.onnx"]
    (tmp_path / "link").symlink_to(top / "sub")
    assert found(tmp_path / "link", since=first) == ["a.onnx"]
    with pytest.raises(UsageError, match="lies outside of"):
        gather([str(top / "b.onnx")], root=top / "sub", since=first)


def test_a_linked_worktree_knows_what_its_repository_excludes(tmp_path: Path) -> None:
    top = tmp_path / "top"
    onnx_file(top / "a.onnx")
    first = commit(top)
    git(top, "worktree", "add", "-q", str(tmp_path / "tree"))
    onnx_file(tmp_path / "tree" / "b.onnx")
    onnx_file(tmp_path / "tree" / "own.onnx")
    (top / ".git" / "info" / "exclude").write_text("own.onnx\n")
    assert found(tmp_path / "tree") == ["a.onnx", "b.onnx"]
    assert found(tmp_path / "tree", since=first) == ["b.onnx"]


def test_a_changed_submodule_means_the_models_inside(tmp_path: Path) -> None:
    inner, top = tmp_path / "inner", tmp_path / "top"
    onnx_file(inner / "a.onnx")
    commit(inner)
    onnx_file(top / "b.onnx")
    first = commit(top)
    git(top, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "mod")
    assert found(top, since=first) == ["mod/a.onnx"]


def test_hidden_places_stay_hidden_when_their_files_change(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx")
    first = commit(tmp_path)
    onnx_file(tmp_path / ".hidden" / "m.onnx")
    assert found(tmp_path, since=first) == []


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("nowhere", "no commit 'nowhere'"),
        ("--output=stolen", "expected a commit, a branch or a tag, found '--output=stolen'"),
        ("-O", "expected a commit"),
        ("HEAD\nHEAD", "expected a commit"),
        ("HEAD\0", "expected a commit"),
        ("HEAD --output=stolen", "no commit"),
        ("HEAD:a.onnx", "no commit"),
        ("", "expected a commit"),
    ],
)
def test_a_revision_that_is_none_is_one_line_and_never_an_option(tmp_path: Path, revision: str, said: str) -> None:
    onnx_file(tmp_path / "a.onnx")
    commit(tmp_path)
    with pytest.raises(UsageError) as error:
        gather([], root=tmp_path, since=revision)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "stolen").exists()


def test_a_shallow_clone_says_how_to_get_the_history(tmp_path: Path) -> None:
    onnx_file(tmp_path / "top" / "a.onnx")
    first = commit(tmp_path / "top")
    commit(tmp_path / "top")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{tmp_path / 'top'}", "clone")
    with pytest.raises(UsageError, match=r"no commit .*\(this clone is shallow: .*fetch-depth: 0"):
        gather([], root=tmp_path / "clone", since=first)


def test_no_repository_and_no_git_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file(tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="not a git repository"):
        gather([], root=tmp_path, since="HEAD")
    git(tmp_path, "init", "-q", "--bare", "bare.git")
    with pytest.raises(UsageError, match="bare repository"):
        gather([], root=tmp_path / "bare.git", since="HEAD")
    with pytest.raises(UsageError, match="is not there"):
        gather([], root=tmp_path / "gone", since="HEAD")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="git is not there"):
        gather([], root=tmp_path, since="HEAD")


def test_no_program_that_a_repository_configures_is_run_and_the_index_is_not_written(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx")
    first = commit(tmp_path)
    script = tmp_path / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "core.pager"):
        git(tmp_path, "config", key, str(script))
    shutil.copy(tmp_path / "a.onnx", tmp_path / "b.onnx")
    os.utime(tmp_path / "a.onnx", (1, 1))  # stale for git, which would refresh its index
    before = (tmp_path / ".git" / "index").read_bytes()
    assert found(tmp_path, since=first) == ["b.onnx"]
    assert (tmp_path / ".git" / "index").read_bytes() == before
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [b"a\nb.onnx", b"\xff\xfe.onnx", b"--output=x.onnx", b" .onnx", b":(top)x.onnx"])
def test_any_file_name_is_found_walked_named_and_changed(tmp_path: Path, name: bytes) -> None:
    onnx_file(tmp_path / "a.onnx")
    first = commit(tmp_path)
    spelt = os.fsdecode(name)
    shutil.copy(tmp_path / "a.onnx", tmp_path / spelt)
    assert sorted(found(tmp_path)) == sorted(["a.onnx", spelt])
    assert found(tmp_path, spelt) == [spelt]
    assert found(tmp_path, since=first) == [spelt]


# ---- pointers ----

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
ANNEX = "/annex/objects/SHA256E-s123--0.onnx\n"
XET = "# xet version 0\nfilesize = 123456\nhash = '0'\n"


@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors", "m.pt", "m.ckpt", "pytorch_model.bin", "m.pt2"])
@pytest.mark.parametrize(("text", "said"), [(LFS, "git-LFS"), (ANNEX, "git-annex"), (XET, "Git-Xet")])
def test_a_pointer_in_place_of_a_model_is_a_model_whose_weights_are_elsewhere(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    for paths in ([], [str(tmp_path / name)]):
        (source,) = gather(paths, root=tmp_path).sources
        with pytest.raises(WeightsNotHere, match=said):
            source.load()


def test_the_size_of_what_a_pointer_stands_for_is_said(tmp_path: Path) -> None:
    for name, text in (("a.onnx", LFS), ("b.onnx", XET)):
        (tmp_path / name).write_text(text)
        (source,) = gather([str(tmp_path / name)], root=tmp_path).sources
        with pytest.raises(WeightsNotHere, match="pointer to 123,456 bytes"):
            source.load()


def test_a_pointer_as_data_file_leaves_its_model_without_weights(tmp_path: Path) -> None:
    onnx_file(tmp_path / "m.onnx", external=True)
    (tmp_path / "m.onnx.data").write_text(LFS)
    (source,) = gather([], root=tmp_path).sources
    with pytest.raises(WeightsNotHere, match="git-LFS pointer"):
        source.load()
    (tmp_path / "m.onnx.data").unlink()
    (tmp_path / "m.onnx.data.dvc").write_text("outs:\n- md5: 0\n  size: 9\n  hash: md5\n  path: m.onnx.data\n")
    assert found(tmp_path, "m.onnx.data.dvc") == ["m.onnx"]
    with pytest.raises(WeightsNotHere, match="dvc pull"):
        source.load()


def test_a_pointer_of_no_model_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text(LFS)
    gathered = gather([str(tmp_path / "photo.png")], root=tmp_path)
    assert skipped(gathered) == {"photo.png": "a git-LFS pointer to 123,456 bytes, and its name is none of a model"}


@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors", "m.pt"])
def test_what_dvc_keeps_is_found_by_its_note_and_git_s_ignore_file_does_not_hide_it(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.dvc").write_text(f"outs:\n- md5: 0\n  size: 9\n  path: {name}\n")
    (tmp_path / ".gitignore").write_text(f"/{name}\n")
    first = commit(tmp_path)
    for paths in ((), (f"{name}.dvc",), (name,)):
        assert found(tmp_path, *paths) == [name]
    with pytest.raises(WeightsNotHere, match="dvc pull"):
        gather([], root=tmp_path).sources[0].load()
    (tmp_path / f"{name}.dvc").write_text(f"outs:\n- md5: 1\n  size: 9\n  path: {name}\n")
    assert found(tmp_path, since=first) == [name]
    if name == "m.onnx":
        onnx_file(tmp_path / name)
        assert found(tmp_path) == found(tmp_path, since=first) == found(tmp_path, f"{name}.dvc") == [name]
        gather([], root=tmp_path).sources[0].load()


def test_a_folder_that_dvc_keeps_is_searched_where_it_is_and_named_where_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "all.dvc").write_text("outs:\n- md5: 0.dir\n  nfiles: 2\n  path: all\n")
    (tmp_path / ".gitignore").write_text("/all\n")
    gathered = gather([], root=tmp_path)
    assert skipped(gathered) == {
        "all.dvc": "cannot tell: DVC keeps all, which no model is known by; run `dvc pull` to see"
    }
    onnx_file(tmp_path / "all" / "a.onnx")
    assert found(tmp_path) == found(tmp_path, "all.dvc") == ["all/a.onnx"]


def test_a_note_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    onnx_file(tmp_path / "outside.onnx")
    (tmp_path / "in").mkdir()
    for text in ("outs:\n- path: ../outside.onnx\n", f"outs:\n- path: {tmp_path}/outside.onnx\n"):
        (tmp_path / "in" / "m.dvc").write_text(text)
        assert found(tmp_path / "in", "m.dvc") == []
    (tmp_path / "in" / "m.dvc").write_text("wdir: ..\nouts:\n- path: outside.onnx\n")
    assert found(tmp_path / "in", "m.dvc") == []


# ---- the cache of the Hub ----


def cached(home: Path, revision: str, name: str = "model.safetensors", *, blob: bool = True) -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs."""
    snapshot, blobs = home / "models--x--y" / "snapshots" / revision, home / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    (blobs / "c0").write_text(json.dumps(LLAMA))
    save_file({EMBED: TABLE}, blobs / "ab")
    if not blob:
        (blobs / "ab").unlink()
    for file, target in (("config.json", "c0"), (name, "ab")):
        (snapshot / file).symlink_to(Path("../../blobs") / target)
    return snapshot


def test_every_snapshot_of_a_cache_is_a_model_and_no_blob_is(tmp_path: Path) -> None:
    cached(tmp_path, "1111")
    cached(tmp_path, "2222")
    home = "models--x--y/snapshots"
    for paths in ((), ("models--x--y",)):
        assert found(tmp_path, *paths) == [f"{home}/1111", f"{home}/2222"]
    assert found(tmp_path, f"{home}/2222/model.safetensors") == [f"{home}/2222"]
    model = gather([str(tmp_path / home / "1111")], root=tmp_path).sources[0].load()
    assert model.weights_here and [one.name for one in model.weights if not one.absent] == [EMBED]
    gathered = gather([str(tmp_path / "models--x--y" / "blobs" / "ab")], root=tmp_path)
    assert skipped(gathered) == {"ab": "a blob of a Hugging Face cache: name the snapshot that leads to it"}


def test_a_snapshot_whose_blob_is_missing_is_a_model_without_weights(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "1111", blob=False)
    for paths in ([], [str(snapshot / "model.safetensors")], [str(snapshot)]):
        (source,) = gather(paths, root=tmp_path).sources
        model = source.load()
        assert not model.weights_here
        assert model.metadata["weights"] == "not here: model.safetensors (a link to a file that is not there)"


def test_a_loop_of_links_and_a_link_that_leads_nowhere_do_not_stop_a_search(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx")
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    (tmp_path / "nowhere.txt").symlink_to("gone")
    (tmp_path / "nowhere.onnx").symlink_to("gone")
    assert found(tmp_path) == ["a.onnx", "nowhere.onnx"]
    with pytest.raises(WeightsNotHere, match="a link to a file that is not there"):
        gather([], root=tmp_path).sources[1].load()


# ---- what may not be read or written ----


def test_nothing_is_written_and_a_read_only_folder_is_read(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    first = commit(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for options in ({}, {"since": first}):
            for source in gather([], root=tmp_path, **options).sources:  # type: ignore[arg-type]
                source.load()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o755)


def test_a_folder_that_may_not_be_read_is_one_line_and_the_search_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_file(tmp_path / "a.onnx")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the superuser, as whom tests may run, is refused nothing
    gathered = gather([], root=tmp_path)
    assert [source.path.name for source in gathered.sources] == ["a.onnx"]
    assert gathered.errors == ((str(tmp_path / "secret"), f"{tmp_path / 'secret'}: cannot be read: Permission denied"),)
    assert not gathered.complete


def test_the_work_grows_with_the_files_and_not_with_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in listings of folders, which time on a busy machine is not: each of 600 data files is looked up."""
    first_data = onnx_file(tmp_path / "m" / "a.onnx", external=True)
    model = onnx.load(str(first_data), load_external_data=False)
    for number in range(300):
        onnx.save(model, str(tmp_path / "m" / f"{number}.onnx"))
        (tmp_path / "m" / f"{number}.raw").write_bytes(b"x")
        save_file({"w": TABLE}, tmp_path / "m" / f"{number}.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    listed: list[str] = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path.name) or iterdir(path))  # type: ignore[func-returns-value]
    names = [str(path) for path in sorted((tmp_path / "m").glob("*.*"))]
    gathered = gather(names, root=tmp_path)
    assert len(gathered.skipped) == 300
    assert len(listed) < 60
