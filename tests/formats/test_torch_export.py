"""Exported programs: what the archive says is what torch loads; ties are made and undone as torch itself does it."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")

from exported_files import (  # noqa: E402
    VOCABULARY,
    WIDTH,
    LanguageModel,
    TransposedHead,
    changed,
    ids,
    language_model,
    program,
    quietly,
    reloaded,
    saved,
)
from torch import nn  # noqa: E402
from torch_files import one_value, row_major_bytes, sharing  # noqa: E402

from tieaudit import structural  # noqa: E402
from tieaudit.cli import main  # noqa: E402
from tieaudit.cost import stored_bytes  # noqa: E402
from tieaudit.errors import UnreadableModel, UsageError  # noqa: E402
from tieaudit.find import find  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.model import Model, storage_of  # noqa: E402
from tieaudit.plan import Choices, plan  # noqa: E402
from tieaudit.rewrite import rewrite  # noqa: E402
from tieaudit.roles import roles  # noqa: E402
from tieaudit.storage import blocks  # noqa: E402
from tieaudit.summary import summary  # noqa: E402
from tieaudit.untouched import differences  # noqa: E402
from tieaudit.verdict import Subject  # noqa: E402

FOLDER = "data/weights/"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def tied(home: Path) -> Path:
    return language_model(home / "tied.pt2", True)


@pytest.fixture(scope="module")
def untied(home: Path) -> Path:
    return language_model(home / "untied.pt2", False)


@pytest.fixture(scope="module")
def equal(home: Path) -> Path:
    return language_model(home / "equal.pt2", False, equal=True)


@pytest.fixture(scope="module")
def transposed(home: Path) -> Path:
    torch.manual_seed(0)
    return saved(home / "transposed.pt2", program(TransposedHead(), ids()))


def aliased(model: Model) -> set[frozenset[str]]:
    return {frozenset(tie.ids) for tie in find(model).ties if tie.origin == "aliased" and len(tie.ids) > 1}


def kinds(model: Model, kind: str) -> set[str]:
    return {id for id, role in roles(model).items() if role.kind == kind}


def ran(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def rewritten(source: Path, target: Path, scheme: str, **choices: Any) -> Path:
    """The planned change written and proved structurally, without a child process that would run it."""
    model = load_one(source)
    found = find(model)
    what = plan(Subject(model, found, roles(model)), Choices((scheme,), **choices))
    assert what.edits, what.refusals
    folder = target.with_suffix(".folder")
    folder.mkdir()
    written, after = rewrite(model, what, folder)
    check = structural.check(model, after, what, written)
    assert check.problems == [] and differences(model, after, what, written, check) == []
    return (folder / source.name).rename(target)


def logits(path: Path) -> Any:
    module = quietly(reloaded(path).module)
    found = quietly(lambda: module(ids(3, 5)))
    return found["logits"] if isinstance(found, dict) else found


def readers(path: Path) -> dict[str, set[str]]:
    """Parameter → operations that read its input, as torch's own graph says."""
    exported = reloaded(path)
    names = exported.graph_signature.inputs_to_parameters
    return {
        names[node.name]: {getattr(user.target, "_opname", str(user.target)) for user in node.users}
        for node in exported.graph.nodes
        if node.name in names
    }


def places(path: Path) -> dict[str, int]:
    return {name: one.untyped_storage().data_ptr() for name, one in reloaded(path).state_dict.items()}


# reading


def test_every_weight_has_the_bytes_that_torch_loads(tied: Path) -> None:
    exported = reloaded(tied)
    held = {**exported.state_dict, **exported.constants}
    model = load_one(tied)
    assert {weight.name for weight in model.weights} == held.keys()
    for weight in model.weights:
        assert b"".join(blocks(storage_of(weight))) == row_major_bytes(held[weight.name]), weight.name
        assert weight.shape == tuple(held[weight.name].shape)


def test_the_signature_says_what_is_learned(tied: Path) -> None:
    signature = reloaded(tied).graph_signature
    model = load_one(tied)
    assert {w.name for w in model.weights if w.parameter} == set(signature.parameters)
    assert {w.name for w in model.weights if w.parameter is False} >= {*signature.buffers, "mask", "scale"}


def test_a_tied_module_is_one_tie_and_counts_once(tied: Path) -> None:
    model = load_one(tied)
    assert aliased(model) == {frozenset({"emb.weight", "head.weight"})}
    # 50·8 once, 16·8 positions, 8·8 + 8, 8 + 8; counted by name the embedding would be there twice: 1,016
    assert summary(model, find(model)).n_parameters == 400 + 128 + 72 + 16


def test_equal_parameters_of_a_program_are_two(equal: Path) -> None:
    model = load_one(equal)
    # the module had two parameters: sum(p.numel()) is 1,016, although 400 of them are stored twice
    assert summary(model, find(model)).n_parameters == 1016
    assert [set(tie.ids) for tie in find(model).ties if tie.origin == "measured"] == [{"emb.weight", "head.weight"}]


def test_a_layer_that_is_called_three_times_has_three_uses(tied: Path) -> None:
    uses = [use for use in load_one(tied).uses if use.weight == "layer.weight"]
    assert [(use.op, use.slot, use.call[-1]) for use in uses] == [
        ("linear", 1, "layer@0"), ("linear", 1, "layer@1"), ("linear", 1, "layer@2"),
    ]  # fmt: skip


def test_uses_are_those_of_torchs_own_graph(untied: Path) -> None:
    exported = reloaded(untied)
    names = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    direct = Counter(
        (names[node.name], user.name)
        for node in exported.graph.nodes
        if node.name in names
        for user in node.users
        if user.op == "call_function" and "wrap_with" not in str(user.target)
    )
    model = load_one(untied)
    found = Counter((use.weight, use.chain[0] if use.chain else use.node) for use in model.uses if not use.scope)
    assert {one for one in found if one[0] in names.values()} == set(direct)


def test_a_read_inside_a_nested_graph_is_found_there(untied: Path) -> None:
    nested = [node for node in reloaded(untied).graph.nodes if "wrap_with_set_grad_enabled" in str(node.target)]
    assert len(nested) == 1  # the model computes its angles under no_grad
    inside = [use for use in load_one(untied).uses if use.weight == "pos" and use.scope]
    assert [use.op for use in inside] == ["slice"]
    assert [use.op for use in load_one(untied).uses if use.weight == "pos" and not use.scope] == ["slice"]


class Scrambled(nn.Module):
    """The language model under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.d = nn.Embedding(16, WIDTH)

    def forward(self, input_ids: Any) -> Any:
        places = torch.arange(input_ids.shape[1])
        return torch.tanh(self.c(torch.relu(self.b(self.a(input_ids) + self.d(places)))) / 30).float() * 30


def test_roles_come_from_the_graph_whatever_the_names(home: Path) -> None:
    model = load_one(saved(home / "scrambled.pt2", program(Scrambled(), ids())))
    assert kinds(model, "token_embedding") == {"a.weight"}  # not d, which is looked up by positions
    assert kinds(model, "output_head") == {"c.weight"}
    assert kinds(model, "output_head_bias") == {"c.bias"}


class Continued(Scrambled):
    """Positions that begin where a caller says."""

    def forward(self, input_ids: Any, start: Any) -> Any:
        places = torch.arange(input_ids.shape[1]) + start
        return self.c(self.a(input_ids) + self.d(places))


def test_a_range_that_begins_at_an_input_is_a_position(home: Path) -> None:
    path = saved(home / "continued.pt2", program(Continued(), ids(), torch.tensor([3]), dynamic=False))
    assert kinds(load_one(path), "token_embedding") == {"a.weight"}  # not d, though `start` is an integer input


def test_roles_survive_a_decomposition_to_core_operations(home: Path) -> None:
    exported = program(Scrambled(), ids())
    model = load_one(saved(home / "core.pt2", quietly(exported.run_decompositions)))
    assert {use.op for use in model.uses} & {"addmm", "mm"}  # no linear is left
    assert kinds(model, "token_embedding") == {"a.weight"}
    assert kinds(model, "output_head") == {"c.weight"}


class Views(nn.Module):
    """One storage under many names: transposed, reshaped, sliced, and a neighbour that shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(48.0).reshape(6, 8)
        for name, view in {
            "whole": base, "turned": base.t(), "flat": base.view(-1), "cut": base[1:3], "odd": base[:, ::2],
            "even": base[:, 1::2], "three": base.view(2, 3, 8).permute(2, 0, 1),
        }.items():  # fmt: skip
            self.register_buffer(name, view)

    def forward(self, x: Any) -> Any:
        return x + sum(one.sum() for one in self.buffers())


def test_views_of_one_storage_are_told_apart_as_torch_holds_them(home: Path) -> None:
    path = saved(home / "views.pt2", program(Views(), torch.ones(2), dynamic=False))
    model = load_one(path)
    held = reloaded(path).state_dict
    assert aliased(model) == one_value(held) == {frozenset({"whole", "turned", "flat", "three"})}
    overlaps = {frozenset(pair) for one in find(model).overlaps for pair in [one.ids]}
    assert {name for ids_ in overlaps for name in ids_} == {name for pair in sharing(held) for name in pair}
    for weight in model.weights:
        assert b"".join(blocks(storage_of(weight))) == row_major_bytes(held[weight.name]), weight.name


def test_one_program_of_several_is_chosen_by_key(home: Path) -> None:
    from torch.export.pt2_archive._package import package_pt2

    torch.manual_seed(0)
    programs = {"first": program(LanguageModel(False), ids()), "second": program(TransposedHead(), ids())}
    path = home / "several.pt2"
    quietly(lambda: package_pt2(path, exported_programs=programs))
    assert {w.name for w in load_one(path, key="second").weights} == {"emb.weight", "out"}
    assert "head.weight" in load_one(path).by_id
    assert load_one(path).metadata["beside"] == "second"
    with pytest.raises(UsageError, match="no program is called 'third'"):
        load_one(path, key="third")
    refused = ran("apply", path, "--key", "second", "--to", home / "no.pt2")
    assert refused.exit_code == 2 and not (home / "no.pt2").exists()


def test_the_layout_of_older_files_is_read_without_unpickling(home: Path, tied: Path) -> None:
    from torch._export.serde.serialize import serialize

    parts = quietly(lambda: serialize(reloaded(tied)))
    path = home / "old.pt2"
    with zipfile.ZipFile(path, "w") as file:  # as torch.export.save did up to 2.7
        file.writestr("version", "8.20")
        file.writestr("serialized_exported_program.json", parts.exported_program)
        file.writestr("serialized_state_dict.pt", parts.state_dict)
        file.writestr("serialized_constants.pt", parts.constants)
        file.writestr("serialized_example_inputs.pt", parts.example_inputs)
    old, new = load_one(path), load_one(tied)
    assert {w.name: (w.shape, w.parameter) for w in old.weights} == {
        w.name: (w.shape, w.parameter) for w in new.weights
    }
    for weight in old.weights:
        assert b"".join(blocks(storage_of(weight))) == b"".join(blocks(storage_of(new.by_id[weight.id])))
    assert aliased(old) == aliased(new) == {frozenset({"emb.weight", "head.weight"})}
    refused = ran("apply", path, "--scheme", "untie", "--to", home / "no.pt2")
    assert refused.exit_code == 2 and "read only" in refused.output


def test_a_compiled_package_is_called_what_it_is(home: Path) -> None:
    path = home / "compiled.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("package/data/aotinductor/model/code.so", b"\x7fELF")
        file.writestr("package/archive_format", b"pt2")
    with pytest.raises(UnreadableModel, match="AOTInductor compiled to machine code"):
        load_one(path)


# rewriting


def test_equal_weights_become_one_that_the_graph_reads_for_both_roles(equal: Path, home: Path) -> None:
    target = home / "shared.pt2"
    rewritten(equal, target, "dedup")
    found, where = readers(target), places(target)
    assert found["emb.weight"] == {"embedding", "linear"} and found["head.weight"] == set()
    assert where["emb.weight"] == where["head.weight"] != where["layer.weight"]
    assert where.keys() == places(equal).keys()
    assert torch.equal(logits(equal), logits(target))


def test_the_result_is_what_torch_writes_for_a_tied_module(equal: Path, home: Path) -> None:
    target = home / "as_torch.pt2"
    rewritten(equal, target, "io")
    torch.manual_seed(0)
    module = LanguageModel(True)
    own = saved(home / "own.pt2", program(module, ids()))
    assert aliased(load_one(own)) == aliased(load_one(target))
    whole = quietly(lambda: torch.export.unflatten(reloaded(target)))
    assert whole.emb.weight is whole.head.weight
    assert sum(p.numel() for p in whole.parameters()) == 616  # 1,016 before


def test_a_transposed_copy_becomes_a_view_of_the_same_bytes(transposed: Path, home: Path) -> None:
    target = home / "turned.pt2"
    rewritten(transposed, target, "dedup")
    held = reloaded(target).state_dict
    assert held["emb.weight"].data_ptr() == held["out"].data_ptr()
    assert held["emb.weight"].stride() == held["out"].stride()[::-1]
    assert torch.equal(logits(transposed), logits(target))


def test_untying_gives_every_name_its_bytes_and_its_own_operations(tied: Path, home: Path) -> None:
    target = home / "apart.pt2"
    rewritten(tied, target, "untie")
    found = readers(target)
    assert found["emb.weight"] == {"embedding"} and found["head.weight"] == {"linear"}
    where = places(target)
    assert where["emb.weight"] != where["head.weight"]
    assert torch.equal(logits(tied), logits(target))


def test_tying_after_untying_gives_the_same_outputs_and_bytes(tied: Path, home: Path) -> None:
    apart, again = home / "u.pt2", home / "t.pt2"
    rewritten(tied, apart, "untie")
    rewritten(apart, again, "io")
    assert torch.equal(logits(tied), logits(again))
    assert aliased(load_one(again)) == aliased(load_one(tied))
    assert stored_bytes(load_one(again)) == stored_bytes(load_one(tied)) < stored_bytes(load_one(apart))


def test_different_weights_are_tied_only_knowingly(untied: Path, home: Path) -> None:
    refused = ran("apply", untied, "--scheme", "io", "--to", home / "no2.pt2")
    assert refused.exit_code == 2 and "different tensors" in refused.output
    target = rewritten(untied, home / "mean.pt2", "io", allow_lossy=True, merge="mean")
    before, after = reloaded(untied).state_dict, reloaded(target).state_dict
    mean = (before["emb.weight"] + before["head.weight"]) / 2
    assert torch.allclose(after["emb.weight"], mean) and torch.equal(after["emb.weight"], after["head.weight"])


def test_all_other_members_stay_byte_for_byte(equal: Path, home: Path) -> None:
    target = home / "others.pt2"
    rewritten(equal, target, "dedup")
    with zipfile.ZipFile(equal) as old, zipfile.ZipFile(target) as new:
        assert new.testzip() is None  # checksums are right
        gone = set(old.namelist()) - set(new.namelist())
        differing = {n for n in new.namelist() if old.read(n) != new.read(n)}
        config = json.loads(new.read("equal/data/weights/model_weights_config.json"))["config"]
    assert differing == {"equal/models/model.json", "equal/data/weights/model_weights_config.json"}
    assert len(gone) == 1 and gone.pop().startswith("equal/data/weights/weight_")
    assert config["emb.weight"]["path_name"] == config["head.weight"]["path_name"]


class Counting(nn.Module):
    """Two equal buffers, one of which the program writes, and a parameter that equals a third."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(40, 8)
        self.register_buffer("written", table.clone())
        self.register_buffer("kept", table.clone())
        self.register_buffer("frozen", table.clone() + 1)
        self.learned = nn.Parameter(table.clone() + 1)

    def forward(self, x: Any) -> Any:
        self.written.add_(1)
        return x @ (self.written + self.kept + self.frozen + self.learned)


def test_what_the_program_writes_is_never_shared(home: Path) -> None:
    path = saved(home / "counting.pt2", program(Counting(), torch.randn(2, 40), dynamic=False))
    said = ran("plan", path, "--scheme", "dedup").output
    assert "written is written by the program" in said
    assert "parameters and some are buffers" in said


def test_a_parameter_of_one_name_that_is_read_in_several_calls_is_no_tie_to_undo(tied: Path) -> None:
    said = ran("scan", tied).output
    assert "Shared across depth" in said
    assert "used in 3 calls" in said
    assert "layer.weight" not in ran("plan", tied, "--scheme", "untie").output


# running


def test_a_rewrite_is_proved_by_loading_and_running_both(equal: Path, home: Path) -> None:
    result = ran("apply", equal, "--scheme", "dedup", "--to", home / "proved.pt2", "--require", "end-to-end")
    assert result.exit_code == 0, result.output
    assert "torch.export.load loads both" in result.output and "equal bit for bit" in result.output
    assert (home / "proved.pt2").is_file()


def test_two_programs_that_compute_other_things_differ(tied: Path, untied: Path) -> None:
    differs = ran("verify", untied, tied)
    assert differs.exit_code == 1, differs.output


def test_made_up_sizes_stay_within_the_ranges_of_the_program(tied: Path) -> None:
    from tieaudit.formats.torch_export.handing import handed
    from tieaudit.inputs import made_up
    from tieaudit.runners import Signature

    signature = Signature.from_json(handed(tied, "cpu")["signature"])
    assert signature.inputs[0].limit == VOCABULARY
    shapes = [feed.arrays["input_ids"].shape for _, feed in made_up(signature)]
    assert shapes and all(4 <= length <= 16 for _, length in shapes)  # lengths of 1 and 224 are tried elsewhere
    assert all(feed.arrays["input_ids"].max() < VOCABULARY for _, feed in made_up(signature))


def test_outputs_have_the_names_that_the_module_gave_them(tied: Path, transposed: Path) -> None:
    from tieaudit.formats.torch_export.handing import handed

    assert handed(tied, "cpu")["outputs"] == ["logits"]
    assert handed(transposed, "cpu")["outputs"] == ["0"]


def test_a_program_that_was_changed_elsewhere_is_noticed(equal: Path, home: Path) -> None:
    from tieaudit.change import Plan
    from tieaudit.formats.torch_export.compare import differences as between

    nothing = Plan(str(equal), "torch", (), (), 0, True)
    model = load_one(equal)
    assert between(model, model, nothing) == []

    def other_epsilon(value: Any) -> None:
        for node in value["graph_module"]["graph"]["nodes"]:
            for one in node["inputs"]:
                if one["name"] == "eps":
                    one["arg"]["as_float"] = 0.5

    edited = changed(equal, home / "eps.pt2", {"models/model.json": other_epsilon, "archive_version": b"1"})
    found = between(model, load_one(edited), nothing)
    assert any("as_float changed" in one for one in found)
    assert any(one.startswith("archive_version: not named by the plan") for one in found)
