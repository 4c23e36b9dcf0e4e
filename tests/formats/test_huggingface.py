"""Hugging Face folders without an installed class: their files, what is declared, what may change, what is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.change import Edit, Plan, Share, Unshare
from tieaudit.errors import CorruptFile, RewriteRefused, UnreadableModel
from tieaudit.formats.huggingface import huggingface, read
from tieaudit.formats.huggingface.asking import Asker
from tieaudit.formats.huggingface.defaults import table
from tieaudit.formats.huggingface.spell import with_value
from tieaudit.formats.safetensors.header import read_header
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.model import Declaration, Member, Model
from tieaudit.storage import MemoryStorage
from tieaudit.view import TRANSPOSED

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 3}
TABLE, OTHER = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]


@pytest.fixture(autouse=True)
def _no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the data files answer; the installed classes have a test file of their own."""
    monkeypatch.setattr(read, "ask_class", lambda *_: {"error": "transformers is not installed"})


def write(path: Path, tensors: dict[str, list[float]], metadata: dict[str, str] | None = None) -> None:
    entries = []
    for name, values in tensors.items():
        shape = (3, 2) if len(values) == 6 else (len(values),)
        data = np.array(values, "<f4").tobytes()
        entries.append(NewEntry(name, "float32", shape, MemoryStorage(data, name)))
    write_safetensors(entries, {"format": "pt"} if metadata is None else metadata, path)


def folder_of(folder: Path, config: dict[str, Any], tensors: dict[str, list[float]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write(folder / "model.safetensors", tensors)
    return folder


def load(path: Path) -> Model:
    ((folder, files),) = huggingface.group([path])
    return huggingface.load(folder, files)


def declared(model: Model) -> Declaration:
    (one,) = model.declarations
    return one


def change(model: Model, dest: Path, *edits: Edit, target: str = "transformers-5") -> Model:
    assert huggingface.edit is not None
    dest.mkdir()
    huggingface.edit(model, Plan(model.path, target, ("test",), edits, 0, True), dest)
    return load(dest)


def share(*ids: str) -> Share:
    return Share(tuple(Member(id) for id in ids))


def refusal(model: Model, edit: Edit, target: str = "transformers-5") -> str | None:
    assert huggingface.can_realise is not None
    return huggingface.can_realise(model, edit, target)


def switched(model: Model, ids: tuple[str, ...], tied: bool, target: str = "transformers-5") -> Any:
    assert huggingface.switch is not None
    return huggingface.switch(model, ids, tied, target)


def bytes_of(model: Model, name: str) -> bytes:
    storage = model.by_id[name].storage
    assert storage is not None
    return storage.read_ranges([(0, storage.n_bytes)])[0]


# ---- which files ----


def test_config_index_and_shard_all_mean_their_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE})
    for path in (folder, folder / "config.json", folder / "model.safetensors"):
        assert huggingface.owns(path)
        assert [owner for owner, _ in huggingface.group([path])] == [folder]


def test_folder_of_onnx_files_with_a_config_is_not_owned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert not huggingface.owns(tmp_path)


def test_weights_of_other_frameworks_only_say_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF")
    assert huggingface.owns(tmp_path)
    with pytest.raises(UnreadableModel, match=r"found only tf_model\.h5.*save_pretrained"):
        huggingface.load(tmp_path, ())


def test_lfs_pointers_say_that_the_weights_are_not_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert huggingface.owns(tmp_path)
    model = load(tmp_path)
    assert model.metadata["weights"] == "not here: model.safetensors (a git-LFS pointer to 9 bytes)"
    assert not any(weight.absent for weight in model.weights)


def test_variants_are_alternatives_and_not_loaded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE})
    write(folder / "model.fp16.safetensors", {EMBED: TABLE})
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    model = load(folder)
    assert model.metadata["alternatives"] == "model.fp16.safetensors, pytorch_model.bin"
    assert [weight.name for weight in model.weights if not weight.absent] == [EMBED]


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    write(tmp_path / "model-00001-of-00002.safetensors", {EMBED: TABLE})
    with pytest.raises(CorruptFile, match=r"expected the index model.safetensors.index.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "expected JSON"), ("[]", "found list"), ("{", "expected JSON"), ('{"a":' * 100000, "nested too deeply"),
     ("\udcff", "expected JSON"), ('{"n": ' + "9" * 5000 + "}", "expected JSON")],
)  # fmt: skip
def test_broken_config_is_one_clear_line(tmp_path: Path, text: str, reason: str) -> None:
    write(tmp_path / "model.safetensors", {EMBED: TABLE})
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptFile, match=reason):
        load(tmp_path)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {**LLAMA, "time_step_limit": [0.0, float("inf")]}, {EMBED: TABLE})
    assert "Infinity" in (folder / "config.json").read_text()
    assert declared(load(folder)).active


# ---- what is declared ----


def test_absent_head_of_a_tied_class_is_realised_by_absence(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, NORM: [1.0, 2.0]}))
    one = declared(model)
    assert one.members == (EMBED, HEAD)
    assert (one.active, one.restores, one.condition) == (True, True, "config.json:tie_word_embeddings")
    assert one.honoured_by == ("transformers 5", "transformers 4")
    head = model.by_id[HEAD]
    assert (head.absent, head.shape, head.dtype, head.parameter) == (True, (3, 2), "float32", True)
    assert (model.hints[EMBED], model.hints[HEAD]) == ("token_embedding", "output_head")
    assert model.metadata["transformers"].startswith("not asked: the data file of transformers 5.")


@pytest.mark.parametrize(
    ("flag", "active"),
    [(True, True), (False, False), (None, False)],  # Llama's own default is false in both versions
)
def test_flag_decides_and_its_absence_means_the_class_default(tmp_path: Path, flag: bool | None, active: bool) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    if flag is not None:
        config["tie_word_embeddings"] = flag
    one = declared(load(folder_of(tmp_path / "m", config, {EMBED: TABLE, HEAD: TABLE})))
    assert one.active is active
    if flag is None:
        assert "not in the file, the class default is false" in one.because


def test_t5_is_tied_whatever_the_flag_says_under_5_and_by_the_flag_under_4(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "tie_word_embeddings": False}
    one = declared(load(folder_of(tmp_path / "m", config, {"shared.weight": TABLE, HEAD: OTHER})))
    assert one.members[0] == "shared.weight"
    assert set(one.members) == {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD}
    assert (one.active, one.condition, one.honoured_by) == (True, "", ("transformers 5",))
    assert "whatever tie_word_embeddings says; but transformers 4.57" in one.because


def test_bart_without_the_flag_unties_all_three_under_5_only(tmp_path: Path) -> None:
    config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart", "tie_word_embeddings": False}
    tensors = {f"model.{part}.weight": TABLE for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")}
    one = declared(load(folder_of(tmp_path / "m", config, {**tensors, HEAD: TABLE})))
    assert (one.active, one.condition) == (False, "config.json:tie_word_embeddings")
    four = table(4)["classes"]["BartForConditionalGeneration"]["ties"]
    assert {tuple(tie["members"]): tie["flag"] for tie in four if tie["flag"] is None} == {
        ("model.shared.weight", "model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"): None
    }


def test_flag_is_read_at_the_level_where_the_class_reads_it(tmp_path: Path) -> None:
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
              "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}  # fmt: skip
    embed = "model.language_model.embed_tokens.weight"
    one = declared(load(folder_of(tmp_path / "m", config, {embed: TABLE, HEAD: OTHER})))
    assert table(5)["classes"]["Mistral3ForConditionalGeneration"]["ties"][0]["flag"] == one.condition.split(":")[1]
    level = config["text_config"] if "text_config" in one.condition else config
    assert isinstance(level, dict)
    assert one.active is level["tie_word_embeddings"]


def test_checkpoint_of_the_base_model_is_understood_without_its_prefix(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    one = declared(load(folder_of(tmp_path / "m", config, {"wte.weight": TABLE, "ln_f.weight": [1.0]})))
    assert one.members == ("wte.weight", "lm_head.weight")
    assert one.active  # GPT-2's default in both versions


def test_unknown_class_is_guessed_by_its_names_and_says_so(tmp_path: Path) -> None:
    config = {"architectures": ["NobodyForCausalLM"], "model_type": "nobody", "tie_word_embeddings": True}
    model = load(folder_of(tmp_path / "m", config, {EMBED: TABLE, HEAD: TABLE}))
    assert declared(model).active
    assert not declared(model).restores
    assert any("guessed from the usual names" in note for note in model.notes)
    assert "nothing restores a tie" in str(refusal(model, share(EMBED, HEAD)))


def test_alias_map_of_a_folder_restores_nothing(tmp_path: Path) -> None:
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    folder = folder_of(tmp_path / "m", {**LLAMA, "tie_word_embeddings": False}, {EMBED: OTHER, HEAD: TABLE, a: TABLE})
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", {EMBED: OTHER, HEAD: TABLE, a: TABLE}, {"format": "pt", b: a})
    model = load(folder)
    alias = next(one for one in model.declarations if b in one.members)
    assert (alias.active, alias.restores, model.by_id[b].absent) == (True, False, True)


# ---- what can be changed ----


def test_declared_equal_pair_can_be_shared_and_the_canonical_name_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", LLAMA, {HEAD: TABLE, EMBED: TABLE, NORM: [1.0, 2.0]})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    model = load(folder)
    assert refusal(model, share(HEAD, EMBED)) is None
    after = change(model, tmp_path / "out", share(HEAD, EMBED))
    assert [weight.name for weight in after.weights if not weight.absent] == [EMBED, NORM]
    assert bytes_of(after, EMBED) == bytes_of(model, HEAD)
    assert read_header(tmp_path / "out" / "model.safetensors").metadata == {"format": "pt"}
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not (tmp_path / "out" / ".git").exists()


def test_undeclared_equal_pair_is_refused_because_it_would_come_back_random(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: OTHER, **{name: TABLE for name in names}}))
    reason = str(refusal(model, share(*names)))
    assert reason.startswith(f"transformers would initialise {names[1]} randomly: the class LlamaForCausalLM")
    with pytest.raises(RewriteRefused, match="randomly"):
        change(model, tmp_path / "out", share(*names))


def test_undeclared_member_beside_a_declared_pair_is_refused(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: TABLE, "model.other.weight": TABLE}))
    assert "randomly" in str(refusal(model, share(EMBED, HEAD, "model.other.weight")))


def test_transposed_tie_is_refused(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: TABLE}))
    assert "transposed" in str(refusal(model, Share((Member(EMBED), Member(HEAD, TRANSPOSED)))))


def test_quantised_pair_is_refused_because_its_scales_would_stay_behind(tmp_path: Path) -> None:
    scales = {"lm_head.weight_scale": [0.5], "model.embed_tokens.weight_scale": [0.5]}
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: TABLE, **scales}))
    assert "is quantised: " in str(refusal(model, share(EMBED, HEAD)))


def test_declared_but_switched_off_needs_the_flag_and_gets_it(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", {**LLAMA, "tie_word_embeddings": False}, {EMBED: TABLE, HEAD: TABLE}))
    assert str(refusal(model, share(EMBED, HEAD))).startswith("needs flag: ")
    settings = switched(model, (EMBED, HEAD), True)
    assert [(one.file, one.key, one.value) for one in settings] == [("config.json", ("tie_word_embeddings",), True)]
    after = change(model, tmp_path / "out", *settings, share(EMBED, HEAD))
    assert declared(after).active
    assert after.by_id[HEAD].absent
    with pytest.raises(RewriteRefused, match="needs flag"):
        change(model, tmp_path / "without", share(EMBED, HEAD))


def test_flag_is_not_switched_on_where_it_would_tie_unequal_weights_too(tmp_path: Path) -> None:
    config = {"architectures": ["BertLMHeadModel"], "model_type": "bert", "tie_word_embeddings": False}
    table_name, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    biases = {"cls.predictions.bias": [1.0, 2.0, 3.0], "cls.predictions.decoder.bias": [1.0, 2.0, 4.0]}
    model = load(folder_of(tmp_path / "m", config, {table_name: TABLE, decoder: TABLE, **biases}))
    assert "would also tie cls.predictions.decoder.bias to cls.predictions.bias" in switched(
        model, (table_name, decoder), True
    )


def test_flag_is_not_switched_off_where_an_absent_weight_would_become_random(tmp_path: Path) -> None:
    config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart", "tie_word_embeddings": True}
    model = load(folder_of(tmp_path / "m", config, {"model.shared.weight": TABLE, HEAD: OTHER}))
    reason = switched(model, ("model.shared.weight", HEAD), False)
    assert "would initialise" in reason
    assert "model.encoder.embed_tokens.weight" in reason


def test_t5_has_no_setting_that_unties_it_under_5(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "tie_word_embeddings": True}
    model = load(folder_of(tmp_path / "m", config, {"shared.weight": TABLE, HEAD: OTHER}))
    assert "no setting changes this" in switched(model, ("shared.weight", HEAD), False)


def test_transformers_4_restores_only_from_the_embedding(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {HEAD: TABLE, NORM: [1.0, 2.0]}))
    assert refusal(model, share(HEAD, EMBED)) is None
    assert "restores only from that name" in str(refusal(model, share(HEAD, EMBED), "transformers-4"))


def test_untying_writes_the_copy_and_clears_the_flag_and_never_leaves_one_random(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, NORM: [1.0, 2.0]}))
    settings = switched(model, (EMBED, HEAD), False)
    after = change(model, tmp_path / "out", *settings, Unshare(EMBED, HEAD))
    assert bytes_of(after, HEAD) == bytes_of(after, EMBED) == bytes_of(model, EMBED)
    assert not declared(after).active
    with pytest.raises(RewriteRefused, match=r"initialise lm_head.weight randomly"):
        change(model, tmp_path / "flag_only", *settings)


def test_planned_value_is_written_under_the_kept_name(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: OTHER}))
    value = np.array([9.0] * 6, "<f4").tobytes()
    edit = Share((Member(HEAD), Member(EMBED)), MemoryStorage(value, "merged"))
    assert bytes_of(change(model, tmp_path / "out", edit), EMBED) == value
    # without a value the first member's own bytes win, though the embedding's name stays
    assert bytes_of(change(model, tmp_path / "head", share(HEAD, EMBED)), EMBED) == bytes_of(model, HEAD)


# ---- shards ----


def sharded(folder: Path) -> Path:
    """Three shards: the head alone in the last one, the norm alone in the middle one."""
    folder_of(folder, LLAMA, {})
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00003.safetensors": {EMBED: TABLE}, "model-00002-of-00003.safetensors": {NORM: [1.0]},
             "model-00003-of-00003.safetensors": {HEAD: TABLE}}  # fmt: skip
    for name, tensors in files.items():
        write(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_parameters": 7, "total_size": 52, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n")
    return folder


def test_emptied_shard_goes_and_the_index_is_right_and_other_shards_stay_as_they_are(tmp_path: Path) -> None:
    folder, out = sharded(tmp_path / "m"), tmp_path / "out"
    after = change(load(folder), out, share(EMBED, HEAD))
    assert after.by_id[HEAD].absent
    assert not (out / "model-00003-of-00003.safetensors").exists()
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    text = (out / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    # 13 stored elements before, 7 of the live model: only the bytes change, 6 × 4 fewer
    assert index["metadata"] == {"total_parameters": 7, "total_size": 28, "note": "kept"}
    assert index["weight_map"] == {EMBED: "model-00001-of-00003.safetensors", NORM: "model-00002-of-00003.safetensors"}
    assert text.startswith('{\n    "metadata"')
    assert text.endswith("}\n")


def test_untied_copy_joins_its_source_s_shard_and_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    tied = change(load(folder), tmp_path / "tied", share(EMBED, HEAD))
    after = change(tied, tmp_path / "out", *switched(tied, (EMBED, HEAD), False), Unshare(EMBED, HEAD))
    assert bytes_of(after, HEAD) == bytes_of(after, EMBED)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"][HEAD] == index["weight_map"][EMBED]
    assert index["metadata"]["total_size"] == 52


def test_links_of_a_hub_cache_are_written_out_as_files(tmp_path: Path) -> None:
    blobs = folder_of(tmp_path / "blobs", LLAMA, {EMBED: TABLE, HEAD: TABLE})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        os.symlink(file, snapshot / file.name)
    change(load(snapshot / "model.safetensors"), tmp_path / "out", share(EMBED, HEAD))
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_source_that_changed_since_it_was_read_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", LLAMA, {EMBED: TABLE, HEAD: TABLE})
    model = load(folder)
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", {HEAD: TABLE, EMBED: TABLE})
    with pytest.raises(CorruptFile, match="moved since it was read"):
        change(model, tmp_path / "out", share(EMBED, HEAD))


# ---- the text of config.json ----

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=3), values, max_size=4),
    st.lists(st.sampled_from(["a", "b", "tie"]), min_size=1, max_size=3),
    st.sampled_from([None, 2, "\t"]),
)
def test_setting_a_value_changes_that_value_only(config: dict[str, Any], path: list[str], indent: Any) -> None:
    text = json.dumps(config, indent=indent)
    expected = json.loads(text)
    level = expected
    for key in path[:-1]:
        if not isinstance(level.get(key), dict):
            level[key] = {}
        level = level[key]
    level[path[-1]] = True
    assert json.loads(with_value(text, tuple(path), True)) == expected
    assert list(json.loads(with_value(text, tuple(path), True))) == list(expected)


def test_every_other_byte_of_the_config_stays() -> None:
    text = '{\n  "eps": 1e-05,  "rate": 1.50,\n  "tie": false,\n  "big": 12345678901234567890\n}\n'
    assert with_value(text, ("tie",), True) == text.replace("false", "true")
    assert with_value(text, ("new",), True) == text.replace("890\n}", '890,\n  "new": true\n}')


# ---- the process that is asked ----


def asker(script: str, timeout: float = 5.0) -> Asker:
    return Asker((sys.executable, "-c", script), timeout)


def test_child_that_dies_is_an_answer_and_the_next_question_starts_a_new_one() -> None:
    one = asker("import sys\nfor l in sys.stdin:\n  if 'die' in l: sys.exit(3)\n  print('{\"ok\": 1}', flush=True)")
    assert one.ask({"q": 1}) == {"ok": 1}
    assert "ended without an answer" in one.ask({"q": "die"})["error"]
    assert one.ask({"q": 2}) == {"ok": 1}
    one.close()


def test_child_that_hangs_is_given_up_in_time_even_if_it_reads_nothing() -> None:
    one = asker("import time; time.sleep(60)", timeout=0.5)
    assert "no answer about the model class within" in one.ask({"q": "x" * 5_000_000})["error"]


def test_child_that_talks_nonsense_is_no_answer() -> None:
    for line in ("not json", "[1]"):
        one = asker(f"import sys\nsys.stdin.readline()\nprint({line!r}, flush=True)")
        assert "error" in one.ask({"q": 1})
        one.close()
