"""Folders whose weights are `pytorch_model.bin`: whatever is said of safetensors is said of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tieaudit.change import Share
from tieaudit.cli import main
from tieaudit.formats.huggingface import huggingface, read
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one, locate
from tieaudit.model import Member
from tieaudit.scan import scan
from tieaudit.storage import MemoryStorage
from tieaudit.verify import prove

torch = pytest.importorskip("torch")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 3}
TABLE = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
OTHER = TABLE + 1


@pytest.fixture(autouse=True)
def _no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the data files answer: a class that is asked answers the same about both kinds of files."""
    monkeypatch.setattr(read, "ask_class", lambda *_: {"error": "transformers is not installed"})


def folder_of(folder: Path, tied: bool | None = None) -> Path:
    folder.mkdir()
    config = LLAMA if tied is None else {**LLAMA, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def plain(folder: Path, arrays: dict[str, np.ndarray], tied: bool) -> Path:
    entries = [
        NewEntry(name, "float32", array.shape, MemoryStorage(array.tobytes(), name)) for name, array in arrays.items()
    ]
    write_safetensors(entries, {"format": "pt"}, folder_of(folder, tied) / "model.safetensors")
    return folder


def pickled(folder: Path, state: dict[str, Any], tied: bool) -> Path:
    torch.save(state, folder_of(folder, tied) / "pytorch_model.bin")
    return folder


def copied(array: np.ndarray) -> Any:
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["equal", "different", "absent"])
def test_a_pickled_folder_says_what_the_same_folder_in_safetensors_says(tmp_path: Path, head: str, tied: bool) -> None:
    arrays = {EMBED: TABLE}
    if head != "absent":
        arrays[HEAD] = TABLE if head == "equal" else OTHER
    one = scan(load_one(plain(tmp_path / "s", arrays, tied)))
    other = scan(load_one(pickled(tmp_path / "p", {name: copied(array) for name, array in arrays.items()}, tied)))
    assert [finding.code for finding in other.findings] == [finding.code for finding in one.findings]
    assert other.summary == one.summary
    ties, others = ([(tie.origin, tie.ids) for tie in report.subject.found.ties] for report in (one, other))
    assert others == ties
    assert bool(ties) == (tied or head == "equal")


def test_a_tie_in_a_pickled_folder_is_one_storage_and_wastes_nothing(tmp_path: Path) -> None:
    table = copied(TABLE)
    report = scan(load_one(pickled(tmp_path / "m", {EMBED: table, HEAD: table}, tied=True)))
    assert ("aliased", (EMBED, HEAD)) in [(tie.origin, tie.ids) for tie in report.subject.found.ties]
    assert report.summary.n_bytes_duplicate == 0
    assert report.summary.n_bytes == TABLE.nbytes
    assert report.summary.n_parameters == TABLE.size
    assert report.findings == ()
    assert report.subject.model.metadata["weights"] == "pickled"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is looked at; running it is for the tests with transformers."""
    stage = importlib.import_module("tieaudit.apply")
    monkeypatch.setattr(stage, "prove_apart", lambda one: prove(one.before, one.after, one.plan, one.written))
    monkeypatch.setattr(importlib.import_module("tieaudit.verify"), "runner_for", lambda _: "not in this test")


def applied(folder: Path, out: Path, *words: str) -> str:
    done = CliRunner().invoke(main, ["apply", str(folder), "--to", str(out), "--require", "structural", *words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_within_one_pickle_becomes_one_storage_and_both_names_stay(tmp_path: Path, tied: bool) -> None:
    """transformers would load one storage under two untied parameters as shared memory: the setting goes with it."""
    folder = pickled(tmp_path / "m", {EMBED: copied(TABLE), "x": copied(OTHER), HEAD: copied(TABLE)}, tied)
    applied(folder, tmp_path / "out")
    found = load(tmp_path / "out" / "pytorch_model.bin")
    assert list(found) == [EMBED, "x", HEAD]
    assert found[EMBED].data_ptr() == found[HEAD].data_ptr()
    assert np.array_equal(found["x"].numpy(), OTHER)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    applied(tmp_path / "out", tmp_path / "apart", "--scheme", "untie")
    apart = load(tmp_path / "apart" / "pytorch_model.bin")
    assert apart[EMBED].data_ptr() != apart[HEAD].data_ptr()
    assert np.array_equal(apart[HEAD].numpy(), TABLE)
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False


def sharded(folder: Path, *shards: dict[str, np.ndarray]) -> Path:
    """Shards as transformers writes them, with their index, of a tied Llama."""
    folder_of(folder, tied=True)
    weight_map = {}
    for n, arrays in enumerate(shards, 1):
        name = f"pytorch_model-0000{n}-of-0000{len(shards)}.bin"
        torch.save({key: copied(array) for key, array in arrays.items()}, folder / name)
        weight_map.update(dict.fromkeys(arrays, name))
    total = sum(array.nbytes for arrays in shards for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


@pytest.mark.usefixtures("_nothing_runs")
def test_a_tie_across_shards_drops_the_name_that_the_class_restores_and_the_index_follows(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {EMBED: TABLE}, {"x": OTHER, HEAD: TABLE})
    applied(folder, tmp_path / "out")
    first, second = (f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2))
    assert list(load(tmp_path / "out" / second)) == ["x"]
    assert (tmp_path / "out" / first).read_bytes() == (folder / first).read_bytes()
    text = (tmp_path / "out" / "pytorch_model.bin.index.json").read_text()
    assert json.loads(text) == {
        "metadata": {"total_size": 2 * TABLE.nbytes},
        "weight_map": {EMBED: first, "x": second},
    }
    assert text.startswith('{\n  "metadata"') and text.endswith("}\n")
    applied(tmp_path / "out", tmp_path / "apart", "--scheme", "untie")
    assert np.array_equal(load(tmp_path / "apart" / first)[HEAD].numpy(), TABLE)
    index = json.loads((tmp_path / "apart" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == {EMBED: first, "x": second, HEAD: first}
    assert index["metadata"]["total_size"] == 3 * TABLE.nbytes


@pytest.mark.usefixtures("_nothing_runs")
def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    applied(sharded(tmp_path / "m", {EMBED: TABLE}, {HEAD: TABLE}), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.bin*"))
    assert names == ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]


def test_a_tie_that_the_class_does_not_make_is_refused_as_it_would_be_hidden_in_memory(tmp_path: Path) -> None:
    state = {EMBED: copied(OTHER), HEAD: copied(OTHER + 1), "a.weight": copied(TABLE), "b.weight": copied(TABLE)}
    folder = pickled(tmp_path / "m", state, tied=False)
    assert huggingface.can_realise is not None
    share = Share((Member("a.weight"), Member("b.weight")), because="a test")
    because = str(huggingface.can_realise(load_one(folder), share, "transformers-5"))
    assert "an optimizer would change it twice" in because


@pytest.mark.usefixtures("_nothing_runs")
def test_names_that_share_a_storage_though_the_class_ties_nothing_are_untied(tmp_path: Path) -> None:
    table = copied(TABLE)
    folder = pickled(tmp_path / "m", {EMBED: table, HEAD: table}, tied=False)
    applied(folder, tmp_path / "out", "--scheme", "untie")
    found = load(tmp_path / "out" / "pytorch_model.bin")
    assert found[EMBED].data_ptr() != found[HEAD].data_ptr()
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_finding_of_a_pickled_folder_recommends_the_command_that_mends_it(tmp_path: Path) -> None:
    report = scan(load_one(pickled(tmp_path / "m", {EMBED: copied(TABLE), HEAD: copied(TABLE)}, tied=True)))
    (finding,) = report.findings
    assert finding.code == "TIE102"
    assert finding.fix is not None
    assert finding.fix.safety == "safe"
    assert finding.fix.command.startswith("tieaudit apply")


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_rewritten_pickled_folder_with_the_same_values(tmp_path: Path, tied: bool) -> None:
    """Under the version that is installed; tied by the class, one Parameter; untied, two of their own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config)
    (tmp_path / "m").mkdir()
    config.save_pretrained(tmp_path / "m")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    applied(tmp_path / "m", tmp_path / "tied")
    out = tmp_path / "tied"
    if not tied:
        out = tmp_path / "apart"
        applied(tmp_path / "tied", out, "--scheme", "untie")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied
    assert (loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()) is tied
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_shards_and_index_of_pickled_weights_all_mean_their_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for name, key in zip(names, (EMBED, HEAD), strict=True):
        torch.save({key: copied(TABLE)}, folder / name)
    index = {"metadata": {"total_size": 2 * TABLE.nbytes}, "weight_map": {EMBED: names[0], HEAD: names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for path in (folder, folder / names[1], folder / "pytorch_model.bin.index.json", folder / "config.json"):
        sources, errors = locate([str(path)])
        assert [(source.path, source.format.name) for source in sources] == [(folder, "huggingface")]
        assert errors == []
    model = load_one(folder)
    assert [weight.name for weight in model.weights if not weight.absent] == [EMBED, HEAD]
    assert [Path(path).name for path in model.parts[0].paths] == ["config.json", "pytorch_model.bin.index.json", *names]


def test_safetensors_are_preferred_and_a_pickle_beside_them_is_never_opened(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m", {EMBED: TABLE}, tied=True)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no archive")
    sources, errors = locate([str(folder)])
    assert [source.path for source in sources] == [folder]
    assert errors == []
    assert load_one(folder).metadata["alternatives"] == "pytorch_model.bin"


def test_a_pickle_that_runs_code_is_refused_in_a_folder_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(marker)!r}, 'w')",))

    torch.save({EMBED: Evil()}, folder / "pytorch_model.bin")
    result = CliRunner().invoke(main, ["scan", str(folder)])
    assert result.exit_code == 2
    assert "runs code" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not marker.exists()


def test_verify_runs_a_pickled_folder_and_finds_it_equal_bit_for_bit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config)
    module.save_pretrained(tmp_path / "s")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "s" / "config.json").read_bytes())
    torch.save(module.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "s"), str(tmp_path / "b"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "equal bit for bit" in result.output


def test_all_three_levels_of_proof_hold_for_a_rewritten_pickled_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    module = transformers.GPT2LMHeadModel(config)
    (tmp_path / "m").mkdir()
    config.save_pretrained(tmp_path / "m")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    words = ["apply", str(tmp_path / "m"), "--to", str(tmp_path / "out"), "--device", "cpu", "--require", "end-to-end"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert [done.output.count(one) for one in ("structural  held", "regional    held", "end to end  held")] == [1, 1, 1]
