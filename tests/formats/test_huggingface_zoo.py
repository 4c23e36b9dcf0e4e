"""Folders of real classes, built small by transformers itself: what the installed class says, and what it loads again.

The truth is the library's: which names are one Parameter, how many elements `parameters()` has, what `from_pretrained`
loads. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tieaudit.change import Edit, Plan, Share
from tieaudit.formats.huggingface import huggingface
from tieaudit.formats.huggingface.defaults import from_table
from tieaudit.formats.huggingface.read import know
from tieaudit.formats.safetensors.sharded import read_checkpoint
from tieaudit.model import Member, Model, classes

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytest.importorskip("safetensors.torch")

SMALL = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": ("LlamaForCausalLM", {**LAYERS, "num_key_value_heads": 2}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}),
    "bart": ("BartForConditionalGeneration", {**SIDES, "decoder_start_token_id": 1}),
    "marian": ("MarianMTModel", {**SIDES, "decoder_start_token_id": 1, "decoder_vocab_size": 101}),
    "bert": ("BertForMaskedLM", LAYERS),
    "albert": ("AlbertForMaskedLM", {**LAYERS, "embedding_size": 8}),
    "mixtral": ("MixtralForCausalLM", {**LAYERS, "num_key_value_heads": 2, "num_local_experts": 2}),
}


def configuration(arch: str, tied: bool) -> Any:
    _, settings = ARCHITECTURES[arch]
    config = transformers.AutoConfig.for_model(arch, **{**SMALL, **settings})
    config.tie_word_embeddings = tied
    return config


def built(arch: str, tied: bool = True) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURES[arch][0])(configuration(arch, tied)).eval()
    with torch.no_grad():  # no two tensors equal by their initialisation
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    if tied:
        model.tie_weights()
    return model


def groups_of(model: Any) -> list[list[str]]:
    by_object: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in by_object.values() if len(names) > 1)


def n_unique(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def folders(arch: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """tied/ as save_pretrained writes it, lost/ with every name written out, untied/ flag off; and the live model."""
    from safetensors.torch import save_file

    home = tmp_path_factory.mktemp(arch)
    live = built(arch)
    live.save_pretrained(home / "tied")
    (home / "lost").mkdir()
    state = {name: tensor.clone().contiguous() for name, tensor in live.state_dict().items()}
    save_file(state, home / "lost" / "model.safetensors", metadata={"format": "pt"})
    live.config.save_pretrained(home / "lost")
    built(arch, tied=False).save_pretrained(home / "untied")
    return home, live


def load(path: Path) -> Model:
    ((folder, files),) = huggingface.group([path])
    return huggingface.load(folder, files)


def bytes_of(model: Model, id: str) -> bytes:
    storage = model.by_id[id].storage
    assert storage is not None
    return storage.read_ranges([(0, storage.n_bytes)])[0]


def equal_groups(model: Model) -> list[list[str]]:
    by_value: dict[tuple[object, ...], list[str]] = {}
    for weight in model.weights:
        if not weight.absent and weight.parameter:
            by_value.setdefault((weight.dtype, weight.shape, bytes_of(model, weight.id)), []).append(weight.id)
    return sorted(sorted(ids) for ids in by_value.values() if len(ids) > 1)


def n_counted(model: Model) -> int:
    """A class counts once if absent, or declared and equal."""
    equal = equal_groups(model)
    groups: list[list[str]] = []
    for declaration in model.declarations:
        if declaration.active:
            groups += [[*shared, *absent] for shared, absent in _parts(model, declaration.members, equal)]
    first = {id: ids[0] for ids in classes(groups) for id in ids}
    sizes = {first.get(w.id, w.id): w.n_elements for w in model.weights if w.parameter}
    return sum(sizes.values())


def _parts(model: Model, ids: tuple[str, ...], equal: list[list[str]]) -> list[tuple[list[str], list[str]]]:
    absent = [id for id in ids if model.by_id[id].absent]
    stored = [id for id in ids if id not in absent]
    parts = [[id for id in stored if id in group] for group in equal] or [[]]
    single = [[id] for id in stored if not any(id in group for group in equal)]
    found = [part for part in (*parts, *single) if part]
    return [(part, absent if number == 0 else []) for number, part in enumerate(found)]


def test_lost_folder_shows_exactly_the_ties_of_the_library(folders: tuple[Path, Any]) -> None:
    home, live = folders
    model = load(home / "lost")
    assert equal_groups(model) == groups_of(live)
    assert sorted(sorted(one.members) for one in model.declarations if one.active) == groups_of(live)
    assert all(one.restores for one in model.declarations if one.active)


def test_parameters_are_counted_as_the_live_model_counts_them(folders: tuple[Path, Any]) -> None:
    home, live = folders
    assert n_counted(load(home / "tied")) == n_unique(live)
    assert n_counted(load(home / "lost")) == n_unique(live)
    loaded = getattr(transformers, type(live).__name__).from_pretrained(home / "untied")
    assert n_counted(load(home / "untied")) == n_unique(loaded)


def test_tied_folder_is_healthy_by_absence(folders: tuple[Path, Any]) -> None:
    home, live = folders
    model = load(home / "tied")
    assert model.metadata["transformers"] == transformers.__version__
    assert model.metadata["n_parameters_live"] == str(n_unique(live))
    active = [one for one in model.declarations if one.active]
    assert len(active) == len(groups_of(live))
    for one in active:
        assert sum(not model.by_id[id].absent for id in one.members) == 1


def test_embedding_and_head_are_named_by_the_class(folders: tuple[Path, Any]) -> None:
    home, _ = folders
    model = load(home / "untied")
    kinds = {kind: id for id, kind in model.hints.items() if not model.by_id[id].absent}
    assert kinds["output_head"].split(".")[-2] in ("lm_head", "decoder")
    assert "embed" in kinds["token_embedding"] or kinds["token_embedding"].split(".")[-2] in ("wte", "shared")


def test_buffers_are_no_parameters(folders: tuple[Path, Any]) -> None:
    home, live = folders
    model = load(home / "lost")
    names = {name for name, _ in live.named_parameters(remove_duplicate=False)}
    assert {weight.name for weight in model.weights if weight.parameter} == names


def test_shared_folder_loads_tied_with_the_same_values(folders: tuple[Path, Any], tmp_path: Path) -> None:
    home, live = folders
    model = load(home / "lost")
    edits: list[Edit] = []
    for group in equal_groups(model):
        edits.append(Share(tuple(Member(id) for id in group)))
        assert huggingface.can_realise is not None
        assert huggingface.can_realise(model, edits[-1], "transformers-5") is None
    assert huggingface.edit is not None
    written = huggingface.edit(model, Plan(model.path, "transformers-5", ("dedup",), tuple(edits), 0, True), tmp_path)
    loaded, info = getattr(transformers, type(live).__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert groups_of(loaded) == groups_of(live)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in live.state_dict().items())
    dropped = sum(model.by_id[id].n_bytes for id in written.renamed)
    saved = (home / "lost" / "model.safetensors").stat().st_size - (tmp_path / "model.safetensors").stat().st_size
    assert 0 < dropped <= saved < dropped + 1000  # the rest is header text


def test_data_file_says_the_same_as_the_class(folders: tuple[Path, Any]) -> None:
    home, _ = folders
    major = 4 if transformers.__version__.startswith("4.") else 5
    for variant in ("tied", "lost", "untied"):
        config = json.loads((home / variant / "config.json").read_text())
        checkpoint = read_checkpoint(home / variant / "model.safetensors")
        asked = know(config, checkpoint).best
        assert asked.asked
        table = from_table(major, config["architectures"][0], copy.deepcopy(config), checkpoint.entries)
        assert table is not None
        here = {(tuple(map(asked.stored_name, tie.members)), tie.active) for tie in asked.ties}
        assert {(tie.members, tie.active) for tie in table.ties} == here
