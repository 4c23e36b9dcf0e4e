"""Cases of transformers (and of tools around it) that are about a folder, and what tieaudit says of it.

TF: huggingface/transformers, OLV: microsoft/Olive, IS: issue threads, LOAD: what transformers 4.57 and 5.23 were
measured to do. The installed classes are not asked here: the data files answer. See docs/peer-cases.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peer_models as peers
import pytest

from tieaudit.find import find
from tieaudit.formats.huggingface import read
from tieaudit.formats.huggingface.defaults import table
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one
from tieaudit.scan import scan
from tieaudit.storage import MemoryStorage

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 40}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "tie_word_embeddings": True}


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


TABLE, OTHER, ROW = random(40, 16), random(40, 16, seed=1), random(16, seed=2)


@pytest.fixture(autouse=True)
def _no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "ask_class", lambda *_: {"error": "transformers is not installed"})


def folder(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    entries = [NewEntry(name, "float32", v.shape, MemoryStorage(v.tobytes(), name)) for name, v in tensors.items()]
    write_safetensors(entries, {"format": "pt"} | dict(metadata or {}), path / "model.safetensors")
    return path


def named(path: Path, code: str) -> set[str]:
    """Every id that a finding of this rule names."""
    return {id for finding in scan(load_one(path)).findings if finding.code == code for id in finding.ids}


def test_TF_2_a_tied_folder_without_its_alias_is_whole_and_counts_once(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", LLAMA, {EMBED: TABLE, NORM: ROW})
    (tie,) = (tie for tie in find(load_one(path)).ties if tie.origin == "absent")
    assert set(tie.ids) == {EMBED, HEAD}
    assert peers.codes(path) == []
    assert scan(load_one(path)).summary.n_parameters == 40 * 16 + 16  # not 1,296: the head is the embedding


def test_TF_4_a_declared_tie_is_held_against_the_bytes_of_every_member(tmp_path: Path) -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    equal = folder(tmp_path / "equal", T5, dict.fromkeys(names, TABLE))
    assert named(equal, "TIE102") == set(names)
    broken = folder(tmp_path / "broken", T5, {**dict.fromkeys(names, TABLE), HEAD: OTHER})
    assert HEAD in named(broken, "TIE101")
    # two names that nothing declares are a tie of their own, which a saver would not restore
    extra = {f"model.layers.{layer}.mlp.up_proj.weight": OTHER for layer in (0, 1)}
    hidden = folder(tmp_path / "hidden", LLAMA, {EMBED: TABLE, NORM: ROW, **extra})
    assert named(hidden, "TIE103") == set(extra)


@pytest.mark.parametrize(("config", "missing"), [(LLAMA, False), (UNTIED, True)])
def test_TF_5_OLV_9_an_alias_is_missing_only_where_nothing_restores_it(
    tmp_path: Path, config: dict[str, Any], missing: bool
) -> None:
    path = folder(tmp_path / "m", config, {EMBED: TABLE, NORM: ROW})
    assert peers.codes(path) == (["TIE105"] if missing else [])
    assert named(path, "TIE105") == ({HEAD} if missing else set())


def test_TF_7_a_checkpoint_of_the_base_model_ties_the_head_to_its_unprefixed_embedding(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    model = load_one(folder(tmp_path / "m", config, {"wte.weight": TABLE, "ln_f.weight": ROW}))
    (tie,) = (tie for tie in find(model).ties if tie.origin == "absent")
    assert tie.ids == ("wte.weight", HEAD)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"]
)
def test_TF_8_lists_of_version_4_and_mappings_of_version_5_mean_the_same_groups(architecture: str) -> None:
    def classes(version: int) -> set[frozenset[str]]:
        ties = table(version)["classes"][architecture]["ties"]
        return {frozenset(tie["members"]) for tie in ties}

    largest = [max(classes(version), key=len) for version in (4, 5)]
    assert {name for group in classes(4) for name in group} == {name for group in classes(5) for name in group}
    assert largest[0] <= largest[1] or largest[1] <= largest[0]


def test_OLV_11_a_tie_that_was_broken_at_one_end_only_is_reported_and_not_mended(tmp_path: Path) -> None:
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    path = folder(tmp_path / "m", T5, {"shared.weight": OTHER, **dict.fromkeys(names, TABLE)})
    assert "shared.weight" in named(path, "TIE101")
    result = peers.cli("apply", path, "--scheme", "dedup", "--format", "json")
    shares = [edit["members"] for edit in json.loads(result.output)["plan"]["edits"]]
    assert not any(member["id"] == "shared.weight" for members in shares for member in members)


def test_IS_6_LOAD_3_a_tie_stored_under_its_alias_only_is_named_for_the_older_loader(tmp_path: Path) -> None:
    # transformers 5 fills the embedding from it, 4.57 leaves it without values
    path = folder(tmp_path / "m", LLAMA, {HEAD: TABLE, NORM: ROW})
    assert peers.codes(path) == ["TIE106"]


def test_IS_6_LOAD_4_a_name_that_only_an_alias_map_mentions_is_missing(tmp_path: Path) -> None:
    one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    path = folder(tmp_path / "m", LLAMA, {EMBED: TABLE, NORM: ROW, one: OTHER}, {two: one})
    assert two in named(path, "TIE105")  # both versions initialise it randomly


def test_IS_13_a_head_stored_beside_its_equal_embedding_is_reported_and_one_is_kept(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: TABLE, NORM: ROW})
    assert peers.codes(path) == ["TIE102"]
    result = peers.cli("apply", path, "--scheme", "dedup", "--format", "json")
    (edit,) = json.loads(result.output)["plan"]["edits"]
    assert [member["id"] for member in edit["members"]] == [EMBED, HEAD]  # the first one keeps its name


def test_LOAD_1_a_declared_tie_over_another_head_is_broken_and_stays(tmp_path: Path) -> None:
    # 4.57 discards the head of the file, 5.23 unties and keeps it: one folder, two models
    path = folder(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: OTHER, NORM: ROW})
    assert peers.codes(path) == ["TIE101"]
    result = peers.cli("apply", path, "--scheme", "dedup", "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists(), result.output


def test_LOAD_2_without_the_flag_the_default_of_the_class_decides(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    path = folder(tmp_path / "m", config, {EMBED: TABLE, HEAD: TABLE, NORM: ROW})
    (one,) = load_one(path).declarations
    assert not one.active  # Llama's own default is false, whatever that of other classes is
    assert peers.codes(path) == ["TIE104"]


def test_LOAD_5_one_changed_bit_breaks_a_declared_tie(tmp_path: Path) -> None:
    changed = TABLE.copy()
    changed.view(np.uint32)[39, 15] ^= 1
    assert np.allclose(changed, TABLE)  # the naive answer
    path = folder(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: changed, NORM: ROW})
    assert peers.codes(path) == ["TIE101"]
