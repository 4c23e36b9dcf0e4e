"""The runtimes in their children: settings, types that numpy does not have, and the optimised model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx_cases import V, model_of, node, saved, table, tensor, value
from verify_cases import language_model

from tieaudit.registry import discover
from tieaudit.runners import Port, Runner, Signature
from tieaudit.running import Setting, opened
from tieaudit.sandbox import ChildFailed, Sandbox
from tieaudit.storage import FileStorage


@pytest.fixture(scope="module")
def box() -> Any:
    pytest.importorskip("onnxruntime")
    with Sandbox(discover("runners", Runner)["onnxruntime"]) as sandbox:
        yield sandbox


def test_looking_for_runners_imports_no_runtime() -> None:
    code = (
        "import sys; from tieaudit.registry import discover; from tieaudit.runners import Runner;"
        "found = discover('runners', Runner); [one.available() for one in found.values()];"
        "assert not {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules), sys.modules.keys();"
        "print(sorted(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['onnxruntime', 'torch', 'torch_export', 'torch_module']", done.stderr


def test_a_signature_survives_json() -> None:
    signature = Signature((Port("ids", "int64", ("batch", None, 3), 7),), (Port("y", "", ()),))
    assert Signature.from_json(signature.to_json()) == signature


def test_a_session_reports_names_types_and_symbols(box: Sandbox, tmp_path: Path) -> None:
    model = saved(language_model(), tmp_path)
    with opened(box, model.path) as session:
        assert session.signature.inputs == (Port("input_ids", "int64", ("batch", "sequence")),)
        assert session.signature.outputs == (Port("logits", "float32", ("batch", "sequence", V)),)


@pytest.mark.parametrize("level", ["all", "extended", "basic", "disable"])
def test_every_setting_gives_the_same_numbers(box: Sandbox, tmp_path: Path, level: str) -> None:
    model = saved(language_model(), tmp_path)
    feed = {"input_ids": np.array([[0, 5, V - 1]])}
    with opened(box, model.path, Setting("", {"level": level, "threads": 1, "prepack": False})) as session:
        found = session.run(feed)["logits"]
    embedding, middle = table(), table("float32", 1, (16, 16))
    expected = np.tanh(embedding[[0, 5, V - 1]] @ middle) @ embedding.T
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_bfloat16_goes_in_and_comes_out_bit_for_bit(box: Sandbox, tmp_path: Path) -> None:
    proto = model_of([node("Identity", ["x"], ["y"])], [value("x", 16, ["n"])], [value("y", 16, ["n"])])
    model = saved(proto, tmp_path)
    given = np.array([1.0, -0.0, 3.140625], ml_dtypes.bfloat16)
    with opened(box, model.path) as session:
        found = session.run({"x": given})["y"]
    assert found.dtype == given.dtype and found.tobytes() == given.tobytes()


def test_a_missing_file_is_an_error_of_the_runtime_and_not_a_traceback(box: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="ONNX Runtime: ") as caught, opened(box, str(tmp_path / "none.onnx")):
        pass
    assert caught.value.kind == "error"


def test_the_optimised_model_shows_a_transposed_tie_folded_apart(box: Sandbox, tmp_path: Path) -> None:
    proto = model_of(
        [
            node("Gather", ["E", "ids"], ["x"]),
            node("Transpose", ["E"], ["ET"], perm=[1, 0]),
            node("MatMul", ["x", "ET"], ["logits"]),
        ],
        [value("ids", 7, ["b", "s"])],
        [value("logits", 1, ["b", "s", V])],
        [tensor("E", table())],
    )
    model = saved(proto, tmp_path / "m")
    weight = model.by_id["E"]
    assert isinstance(weight.storage, FileStorage)
    place = [weight.storage.path, weight.storage.offset, weight.n_bytes, weight.dtype, list(weight.shape)]
    (tmp_path / "to").mkdir()
    found, _ = box.ask("optimise", {"path": model.path, "to": str(tmp_path / "to"), "watch": {"E": place}})
    assert found["copies"] == {"E": [2, 0]}  # one stored tensor became two, though the file holds one
    assert found["n_bytes"] > 2 * weight.n_bytes


@pytest.fixture(scope="module")
def torch_box() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with Sandbox(discover("runners", Runner)["torch"]) as sandbox:
        yield sandbox


def folder_of(path: Path, *, tie: bool = True, seed: int = 0) -> Path:
    """A tiny GPT-2 as `save_pretrained` writes it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tie,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_a_folder_runs_and_tells_which_parameters_are_one_tensor(torch_box: Sandbox, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    with opened(torch_box, str(folder)) as model:
        assert [port.name for port in model.signature.inputs] == ["input_ids", "attention_mask"]
        assert model.signature.inputs[0].limit == 50
        outputs = model.run({"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3), np.int64)})
        assert outputs["logits"].shape == (1, 3, 50)
        state = torch_box.ask("state", {"handle": model.handle})[0]
        assert ["transformer.wte.weight", "lm_head.weight"] in state["tied"]


def test_a_perturbation_moves_the_outputs_and_is_taken_back(torch_box: Sandbox, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    feed = {"input_ids": np.array([[3, 4, 5]])}
    with opened(torch_box, str(folder)) as model:
        usual = model.run(feed)["logits"]
        torch_box.ask("perturb", {"handle": model.handle, "name": "transformer.h.0.mlp.c_fc.weight", "rows": None})
        assert np.abs(model.run(feed)["logits"] - usual).max() > 1e-3
        torch_box.ask("restore", {"handle": model.handle})
        assert model.run(feed)["logits"].tobytes() == usual.tobytes()


def test_a_folders_own_code_and_pickles_are_never_run(torch_box: Sandbox, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ChildFailed, match="transformers: "), opened(torch_box, str(folder)):
        pass
    witness = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')")
    text = (folder / "config.json").read_text()
    text = text.replace('"model_type": "gpt2"', '"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}')
    (folder / "config.json").write_text(text)
    with pytest.raises(ChildFailed), opened(torch_box, str(folder)):
        pass
    assert not witness.exists()


def test_the_flattened_lookup_survives_every_level(box: Sandbox, tmp_path: Path) -> None:
    """The direct form, Gather(axis 1) → Transpose → MatMul in fp16, crashes some versions: a result either way."""
    proto = model_of(
        [
            node("Gather", ["ET", "ids"], ["g"], axis=1),
            node("Transpose", ["g"], ["x"], perm=[1, 2, 0]),
            node("MatMul", ["x", "M"], ["y"]),
        ],
        [value("ids", 7, ["b", "s"])],
        [value("y", 10, ["b", "s", 16])],
        [tensor("ET", table("float16").T), tensor("M", table("float16", 1, (16, 16)))],
    )
    model = saved(proto, tmp_path)
    try:
        with opened(box, model.path) as session:
            assert session.run({"ids": np.array([[1, 2]])})["y"].shape == (1, 2, 16)
    except ChildFailed as error:
        assert error.kind == "crashed" and "SIG" in error.message  # noqa: PT017 - either outcome is right
    onnx.checker.check_model(str(Path(model.path)))
