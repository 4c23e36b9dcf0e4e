"""Schemes on files: aliases in a checkpoint, equal values where no loader would restore a tie, and what loaders do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tieaudit import regional, structural  # noqa: E402
from tieaudit.change import Equalise, Share, Written  # noqa: E402
from tieaudit.errors import RewriteRefused  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.scan import scan  # noqa: E402

N_LAYERS, D, F, V = 4, 8, 12, 20


def layer(number: int) -> str:
    return f"model.layers.{number}."


LEAVES = {"self_attn.q_proj.weight": (D, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
PER_LAYER = D * D + 2 * D * F


def state() -> dict[str, torch.Tensor]:
    """Plain tensors under the names of a decoder."""
    generator = torch.Generator().manual_seed(0)
    found = {"model.embed_tokens.weight": torch.randn(V, D, generator=generator)}
    for number in range(N_LAYERS):
        for leaf, shape in LEAVES.items():
            found[layer(number) + leaf] = torch.randn(shape, generator=generator)
    return found


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return (sum((one.double() for one in tensors[1:]), tensors[0].double()) / len(tensors)).float()


def cycled(tensors: dict[str, torch.Tensor], m: int = 2) -> dict[str, torch.Tensor]:
    """What cycle:m makes of them, worked out here: layers m apart get their mean."""
    found = dict(tensors)
    for number in range(N_LAYERS):
        for leaf in LEAVES:
            found[layer(number) + leaf] = mean([tensors[layer(n) + leaf] for n in range(number % m, N_LAYERS, m)])
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sharded(folder: Path, tensors: dict[str, torch.Tensor], ending: str) -> Path:
    """Two files, layers 0 and 1 in the first, and their index."""
    names = [f"model-0000{number}-of-00002.{ending}" for number in (1, 2)]
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        halves[int("layers.2" in name or "layers.3" in name)][name] = tensor
    for file, half in zip(names, halves, strict=True):
        if ending == "safetensors":
            safetensors.save_file(half, folder / file, metadata={"format": "pt"})
        else:
            torch.save(half, folder / file)
    weight_map = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    n_bytes = sum(4 * tensor.numel() for tensor in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}, indent=2))
    return index


# checkpoints --------------------------------------------------------------------------------------------------------


def test_a_depth_scheme_on_a_checkpoint_writes_aliases_with_the_merged_values(tmp_path: Path) -> None:
    tensors = state()
    torch.save(tensors, tmp_path / "model.pt")
    done = tieaudit.apply(tmp_path / "model.pt", to=tmp_path / "tied.pt", scheme="cycle:2", allow_lossy=True)
    found = torch.load(tmp_path / "tied.pt")
    assert same(found, cycled(tensors))
    places = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(places) == 1 + 2 * len(LEAVES)
    assert done.plan.n_bytes_saved == 4 * 2 * PER_LAYER
    assert all(isinstance(edit, Share) for edit in done.plan.edits)


def test_a_residual_has_no_place_in_a_checkpoint_and_is_refused(tmp_path: Path) -> None:
    tensors = {**state(), "lm_head.weight": torch.randn(V, D)}
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(RewriteRefused, match="a live module ha"):
        tieaudit.apply(
            tmp_path / "model.pt", to=tmp_path / "tied.pt", scheme="io", allow_lossy=True, merge="low-rank:2"
        )
    assert not (tmp_path / "tied.pt").exists()


def test_files_of_a_checkpoint_cannot_share_a_storage_and_get_equal_values(tmp_path: Path) -> None:
    tensors, home = state(), tmp_path / "shards"
    home.mkdir()
    index = sharded(home, tensors, "bin")
    plan = tieaudit.plan(index, scheme="cycle:2", allow_lossy=True)
    assert {type(edit) for edit in plan.edits} == {Equalise}
    assert plan.n_bytes_saved == 0
    assert any("files cannot share a storage" in note for note in plan.notes)
    near = tieaudit.plan(index, scheme="sequence:2", allow_lossy=True)  # layers 0 and 1 lie in one file
    assert {type(edit) for edit in near.edits} == {Share}
    assert near.n_bytes_saved == 4 * 2 * PER_LAYER


# safetensors without a class ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A module with exactly these names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor)))


def test_a_lone_safetensors_file_gets_equal_values_and_an_alias_map(tmp_path: Path) -> None:
    tensors = state()
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "made_by": "hand"})
    out = tmp_path / "tied.safetensors"
    done = tieaudit.apply(tmp_path / "model.safetensors", to=out, scheme="cycle:2", allow_lossy=True)
    assert done.plan.n_bytes_saved == 0
    assert same(safetensors.load_file(out), cycled(tensors))
    assert out.stat().st_size >= (tmp_path / "model.safetensors").stat().st_size
    with safetensors.safe_open(out, "pt") as opened:
        noted = opened.metadata()
    wanted = {layer(n) + leaf: layer(n - 2) + leaf for n in (2, 3) for leaf in LEAVES}
    assert noted == {**wanted, "format": "pt", "made_by": "hand"}
    module = Net(tensors)
    assert safetensors.load_model(module, out) == (set(), [])
    assert same({name: value.detach() for name, value in module.named_parameters()}, cycled(tensors))
    tied = Net(tensors)
    tied.get_submodule("model.layers.2.mlp.up_proj").weight = tied.get_submodule("model.layers.0.mlp.up_proj").weight
    with pytest.raises(RuntimeError, match="Unexpected key"):  # as the plan says
        safetensors.load_model(tied, out)
    assert any("Unexpected key" in note and "no loader reads it" in note for note in done.plan.notes)


def test_the_alias_map_leads_back_to_one_storage_in_a_checkpoint(tmp_path: Path) -> None:
    tensors = state()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    tieaudit.apply(tmp_path / "model.safetensors", to=tmp_path / "t.safetensors", scheme="cycle:2", allow_lossy=True)
    tieaudit.apply(tmp_path / "t.safetensors", to=tmp_path / "t.pt")
    found = torch.load(tmp_path / "t.pt")
    assert same(found, cycled(tensors))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1 + 2 * len(LEAVES)


def test_shards_with_an_index_note_the_aliases_in_the_index(tmp_path: Path) -> None:
    tensors, home = state(), tmp_path / "shards"
    home.mkdir()
    index = sharded(home, tensors, "safetensors")
    out = tmp_path / "tied"
    tieaudit.apply(index, to=out, scheme="cycle:2", allow_lossy=True)
    written = json.loads((out / index.name).read_text())
    assert written["metadata"][layer(2) + "mlp.up_proj.weight"] == layer(0) + "mlp.up_proj.weight"
    assert written["metadata"]["total_size"] == json.loads(index.read_text())["metadata"]["total_size"]
    assert written["weight_map"] == json.loads(index.read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(written["weight_map"].values())):
        found.update(safetensors.load_file(out / file))
    assert same(found, cycled(tensors))


def test_a_transposed_class_gets_its_value_in_both_layouts(tmp_path: Path) -> None:
    tensors = {"encode.weight": torch.randn(3, 6), "decode.weight": torch.randn(6, 3), "other": torch.randn(2)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    file = tmp_path / "ties.toml"
    file.write_text('[[group]]\nmatch = ["*code.weight"]\n')
    out = tmp_path / "tied.safetensors"
    tieaudit.apply(tmp_path / "model.safetensors", to=out, scheme=f"custom:{file}", allow_lossy=True)
    found = safetensors.load_file(out)
    assert torch.equal(found["encode.weight"], mean([tensors["encode.weight"], tensors["decode.weight"].T]))
    assert torch.equal(found["decode.weight"], found["encode.weight"].T)
    assert torch.equal(found["other"], tensors["other"])
    with safetensors.safe_open(out, "pt") as opened:
        assert not opened.metadata()  # a map of names cannot say that one lies transposed


def test_equal_tensors_are_left_alone_where_nothing_would_be_saved(tmp_path: Path) -> None:
    tensors = state()
    for leaf in LEAVES:
        tensors[layer(1) + leaf] = tensors[layer(0) + leaf].clone()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    plan = tieaudit.plan(tmp_path / "model.safetensors", scheme="dedup", allow_lossy=True)
    assert not plan.edits
    assert all("no class that would restore" in refusal.because for refusal in plan.refusals)
    (refusal,) = plan.refusals  # one reason, told once for all of them
    assert len(refusal.ids) == 2 * len(LEAVES)


def test_the_proof_compares_every_name_with_the_planned_value(tmp_path: Path) -> None:
    tensors = state()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    plan = tieaudit.plan(tmp_path / "model.safetensors", scheme="cycle:2", allow_lossy=True)
    before = load_one(tmp_path / "model.safetensors")
    wanted = cycled(tensors)
    wrong = layer(3) + "mlp.up_proj.weight"

    def problems(held: dict[str, torch.Tensor]) -> list[str]:
        (tmp_path / "after.safetensors").unlink(missing_ok=True)
        safetensors.save_file(held, tmp_path / "after.safetensors")
        after = load_one(tmp_path / "after.safetensors")
        return structural.check(before, after, plan, Written(("after.safetensors",))).problems

    assert problems(wanted) == []
    last_bit = wanted[wrong].clone()
    last_bit.view(torch.int32)[0, 0] ^= 1
    assert problems({**wanted, wrong: last_bit}) == [f"{wrong}: its bytes are not the planned ones"]
    del wanted[wrong]
    assert problems(wanted) == [f"{wrong}: expected the planned value under this name, found nothing stored"]


# folders ------------------------------------------------------------------------------------------------------------


def llama(folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=N_LAYERS, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0, **settings,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_transformers_loads_exactly_the_planned_model_from_a_folder(tmp_path: Path, container: str) -> None:
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "model", tmp_path / "tied"
    model = llama(source)
    if container == "bin":
        torch.save(model.state_dict(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    done = tieaudit.apply(source, to=out, scheme="cycle:2", allow_lossy=True)
    assert [level.outcome for level in done.proof.levels] == ["held", "held", "held"]
    assert done.proof.drift is not None
    assert done.proof.drift > 0
    assert done.plan.n_bytes_saved == 0
    said = " ".join(done.plan.notes)
    assert "no byte is saved" in said
    assert "into a parameter for each name" in said
    loaded = transformers.LlamaForCausalLM.from_pretrained(out, local_files_only=True)
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    for name, value in before.items():
        number = int(name.split(".")[2]) if ".layers." in name else None
        if number is None:
            assert torch.equal(after[name], value)
            continue
        rest = name.split(".", 3)[3]
        wanted = mean([before[f"model.layers.{n}.{rest}"].detach() for n in range(number % 2, N_LAYERS, 2)])
        assert torch.equal(after[name], wanted)
    assert len({value.data_ptr() for value in after.values()}) == len(after)  # an optimizer moves each once


def test_a_folder_with_equal_values_counts_the_parameters_that_transformers_holds(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    plan = tieaudit.plan(tmp_path / "model", scheme="albert", allow_lossy=True)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for edit in plan.edits:
        assert isinstance(edit, Equalise)
        value = mean([tensors[one.id] for one in edit.members])
        tensors.update({one.id: value.clone() for one in edit.members})
    noted = {one.id: edit.members[0].id for edit in plan.edits for one in edit.members[1:]}  # type: ignore[union-attr]
    safetensors.save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={**noted, "format": "pt"})
    read = load_one(tmp_path / "model")
    n_live = sum(p.numel() for p in model.parameters())
    assert scan(read).summary.n_parameters == n_live
    alone = replace(read, metadata={key: text for key, text in read.metadata.items() if key != "n_parameters_live"})
    assert scan(alone).summary.n_parameters == n_live  # without the class's own count


def test_what_the_class_can_tie_is_tied_and_stored_once(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    plan = tieaudit.plan(tmp_path / "model", scheme=("io", "cycle:2"), allow_lossy=True)
    kinds = [type(edit).__name__ for edit in plan.edits]
    assert kinds.count("Share") == 1
    assert kinds.count("SetConfig") == 1
    assert kinds.count("Equalise") == 18  # 2 sets of 9 tensors
    assert plan.n_bytes_saved == 4 * V * D


def test_a_folder_in_the_other_container_gets_equal_values_too(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    done = tieaudit.apply(
        tmp_path / "model",
        to=tmp_path / "tied",
        scheme="ffn",
        allow_lossy=True,
        container="torch",
        require="structural",
    )
    found = torch.load(tmp_path / "tied" / "pytorch_model.bin")
    ups = [model.state_dict()[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(N_LAYERS)]
    assert all(torch.equal(found[f"model.layers.{n}.mlp.up_proj.weight"], mean(ups)) for n in range(N_LAYERS))
    places = {found[f"model.layers.{n}.mlp.up_proj.weight"].untyped_storage().data_ptr() for n in range(N_LAYERS)}
    assert len(places) == N_LAYERS  # one storage would be two parameters over one memory, moved twice by an optimizer
    assert {type(edit) for edit in done.plan.edits} == {Equalise}


def test_unequal_layers_are_refused_without_leave(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    with pytest.raises(RewriteRefused, match="hold different tensors"):
        tieaudit.apply(tmp_path / "model", to=tmp_path / "tied", scheme="cycle:2")
    assert not (tmp_path / "tied").exists()


def test_a_loader_that_gives_a_name_another_value_than_is_stored_under_it_fails_the_regional_proof(
    tmp_path: Path,
) -> None:
    tensors = cycled(state())
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    plan = tieaudit.plan(tmp_path / "model.safetensors", scheme="albert", allow_lossy=True)
    after = load_one(tmp_path / "model.safetensors")
    digests = {weight.name: regional.loaded_digest(weight) for weight in after.weights}
    assert regional.not_as_stored(after, plan, digests) == []
    wrong = layer(3) + "mlp.up_proj.weight"
    said = regional.not_as_stored(after, plan, {**digests, wrong: digests[layer(0) + "mlp.up_proj.weight"]})
    assert said == [f"{wrong}: loads with other values than are stored under it"]
