"""What is done on a GPU. Every test runs on the CPU as well, so that only the device is new where there is one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts in this process
torch = pytest.importorskip("torch")

from torch_modules import Autoencoder, TiedLM, Words  # noqa: E402

import tieaudit  # noqa: E402
from benchmarks import gpu  # noqa: E402
from tieaudit.arithmetic import device_of, exact, held_bytes, timed  # noqa: E402
from tieaudit.formats.torch_module.tensors import identity, locate  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.machine import resident_bytes  # noqa: E402
from tieaudit.registry import discover  # noqa: E402
from tieaudit.runners import Runner  # noqa: E402
from tieaudit.running import opened  # noqa: E402
from tieaudit.sandbox import Sandbox  # noqa: E402
from tieaudit.strangers import compare  # noqa: E402
from tieaudit.survival import operations  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
NO_GPU = gpu.no_gpu()
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))])
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def outcomes(proof: Any) -> dict[str, str]:
    return {level.name: level.outcome for level in proof.levels}


@on_each_device
def test_a_tie_is_one_memory_of_the_device_and_a_copy_is_found_by_reading_it(device: str) -> None:
    module = TiedLM().to(device)
    found = tieaudit.scan(module).subject.found
    assert [tie.ids for tie in found.ties if tie.origin == "aliased"] == [("embed.weight", "head.weight")]
    assert identity(module.embed.weight) == identity(module.head.weight)
    twin = copy.deepcopy(module)
    assert identity(twin.embed.weight) != identity(module.embed.weight)
    tieaudit.untie(module)
    ties = [tie.ids for tie in tieaudit.scan(module).subject.found.ties if tie.origin == "measured"]
    assert ("embed.weight", "head.weight") in ties
    with torch.no_grad():
        module.head.weight[-1, -1] += 1
    ties = [tie.ids for tie in tieaudit.scan(module).subject.found.ties if tie.origin == "measured"]
    assert ("embed.weight", "head.weight") not in ties


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_aliases_slices_and_neighbours_of_one_storage_are_told_apart_on_every_device(device: str) -> None:
    whole = torch.randn(6, 4).to(device)
    views = [whole, whole[:3], whole[3:], whole.T, whole.view(6, 4)]
    regions = [one.region for one in locate(views)]
    assert len({where for where, _, _ in regions}) == 1
    assert [(begin, end) for _, begin, end in regions] == [(0, 96), (0, 48), (48, 96), (0, 96), (0, 96)]
    assert identity(views[0]) == identity(views[4]) != identity(views[3])


@on_each_device
def test_bytes_come_block_by_block_whatever_the_strides_and_the_type(device: str) -> None:
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        tensor = torch.randn(50, 30).to(kind).T
        expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        (storage,) = locate([tensor.to(device)])
        length = len(expected)
        assert storage.read_ranges([(0, length)]) == [expected]
        assert storage.read_ranges([(7, 40), (length - 3, 3)]) == [expected[7:47], expected[-3:]]


@on_each_device
def test_a_scan_takes_no_copy_of_a_large_tensor_to_the_host(device: str) -> None:
    if resident_bytes() is None:
        pytest.skip("this system does not say how much memory a process has")
    table = torch.randn(1 << 22, 8, device=device)  # 134 MB
    module = torch.nn.Module()
    module.one, module.other = torch.nn.Parameter(table), torch.nn.Parameter(table.clone())
    tieaudit.scan(torch.nn.Linear(2, 2).to(device))
    with gpu._host_peak() as grown:
        found = tieaudit.scan(module).subject.found
    assert [tie.ids for tie in found.ties] == [("one", "other")]
    assert grown[0] is not None and grown[0] < table.nbytes / 2


@on_each_device
@pytest.mark.parametrize("kind", [TiedLM, Autoencoder])
def test_tying_in_place_gives_memory_back_and_undo_takes_it_again(device: str, kind: Any) -> None:
    module = kind().to(device)
    tieaudit.untie(module)
    inputs = (WORDS if kind is TiedLM else torch.ones(2, 6)).to(device)
    before, n_bytes = module(inputs).detach(), held_bytes(module)
    change = tieaudit.tie(module)
    assert held_bytes(module) == n_bytes - (1600 if kind is TiedLM else 72)
    assert torch.allclose(module(inputs), before, atol=1e-5)
    assert device_of(module).type == device
    change.undo()
    assert held_bytes(module) == n_bytes


@on_each_device
def test_live_modules_are_compared_where_they_are_and_inputs_move_there(device: str) -> None:
    tied = TiedLM()
    apart = copy.deepcopy(tied)
    tieaudit.untie(apart)
    proof = tieaudit.verify(apart.to(device), tied.to(device), inputs=WORDS, gradients=True)
    assert outcomes(proof) == {
        "structural": "held", "regional": "not run", "end to end": "held", "training": "held",
    }  # fmt: skip
    assert proof.levels[2].device.startswith({"cpu": "CPU", "cuda": "CUDA ("}[device])
    facts = proof.facts
    assert facts["n_bytes_resident_before"] - facts["n_bytes_resident_after"] == 1600  # type: ignore[operator]
    key = {"cpu": "n_bytes_process_peak", "cuda": "n_bytes_device_peak"}[device]
    assert facts[f"{key}_before"] >= facts["n_bytes_resident_before"]  # type: ignore[operator]
    across = tieaudit.verify(apart.to("cpu"), tied, inputs=WORDS, max_drift=1e-3)
    assert outcomes(across)["end to end"] == "held"


@on_each_device
@pytest.mark.parametrize("make", [TiedLM, Words])
def test_a_tied_gradient_is_the_sum_on_every_device(device: str, make: Any) -> None:
    """An LSTM, too: cuDNN has its backward pass in training mode only."""
    parity = tieaudit.gradients(make().to(device).eval(), WORDS)
    assert parity.proved, str(parity)
    transposed = Autoencoder().to(device)
    tieaudit.tie(transposed)
    assert tieaudit.gradients(transposed, torch.randn(5, 6)).proved


@on_each_device
def test_arithmetic_is_exact_on_every_device(device: str) -> None:
    """TensorFloat-32 would keep 10 bits of 1 + 2⁻¹², and the products would be off by 2⁻¹² of their size."""
    one = torch.full((256, 256), 1 + 2.0**-12, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with exact():
            found = (one @ one)[0, 0].item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert abs(found / 256 - (1 + 2.0**-12) ** 2) < 1e-6


@on_each_device
def test_time_and_peak_are_taken_until_the_device_has_finished(device: str) -> None:
    x = torch.randn(512, 512, device=device)
    found = timed(lambda: (x @ x).sum(), torch.device(device), 3, 0.0)
    assert len(found.seconds) == 3 and min(found.seconds) > 0
    if device == "cuda":
        assert found.n_bytes_peak is not None and found.n_bytes_peak >= x.nbytes  # the product


@on_each_device
def test_the_runner_gives_the_same_numbers_and_says_where(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    feed = {"words": np.array([[1, 2, 3]])}
    with Sandbox(discover("runners", Runner)["torch_module"], device) as box:
        assert device in box.ask("hello")[0]["devices"]
        with opened(box, "torch_modules:words_tied") as model:
            found = model.run(feed)
            again = model.run(feed)
            timed_, _ = box.ask("time", {"handle": model.handle, "n_runs": 3}, feed)
            assert timed_["n_bytes_peak"] >= 40 * 6 * 4 and timed_["on"]
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in again.items()
    }
    torch.manual_seed(0)
    with torch.no_grad():
        expected = Words().eval()(WORDS[:1])
    np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), atol=1e-5)


@on_each_device
def test_a_folder_and_its_broken_copy_on_every_device(device: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "one")
    one = load_one(tmp_path / "one")
    proof = compare(one, one, device=device, gradients=True)
    assert outcomes(proof)["end to end"] == outcomes(proof)["training"] == "held"
    costs = proof.facts["on_cuda"] if device == "cuda" else proof.facts
    assert costs["n_runs_before"] >= 9  # type: ignore[index]
    if device == "cuda":
        assert costs["n_bytes_device_peak_before"] > 0  # type: ignore[index]
        assert proof.levels[2].device.startswith("CUDA (")
        assert outcomes(compare(one, one))["end to end"] == "held"  # auto: both devices


@on_each_device
def test_an_onnx_model_runs_on_every_device(device: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if device == "cuda" and "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider here")
    from onnx_cases import saved
    from verify_cases import language_model

    model = saved(language_model(), tmp_path)
    proof = compare(model, model, device=device)
    assert outcomes(proof)["end to end"] == "held", proof.levels
    if device == "cuda":
        assert proof.levels[2].device.startswith("CUDA (")


@pytest.mark.parametrize("name", [pytest.param("module.to('cuda')", marks=CUDA.marks)])
def test_a_tie_survives_the_way_to_the_gpu(name: str) -> None:
    assert name in [one.name for one in operations()]
    (row,) = tieaudit.survival(TiedLM(), only=(name,)).rows
    assert row.outcome == "kept", row


def test_the_page_is_what_was_measured_or_says_that_nothing_was() -> None:
    assert gpu.PAGE.read_text(encoding="utf-8") == gpu.rendered(gpu.known())
    if gpu.known() is None:
        assert "**None have been taken yet:** no GPU could be used so far" in gpu.rendered(None)


def test_without_a_gpu_the_benchmark_ends_with_one_line_and_the_page_stays(tmp_path: Path) -> None:
    before = gpu.PAGE.read_bytes()
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected ") and len(done.stderr.splitlines()) == 1
    assert gpu.PAGE.read_bytes() == before


@on_each_device
def test_the_benchmark_measures_and_its_page_shows_every_figure(device: str) -> None:
    sizes = gpu.Sizes(n_words=500, width=16, n_layers=1, batch=2, length=8)
    results = json.loads(json.dumps(gpu.measured(device, sizes)))
    assert results["scan"]["pairs"] == [["embed.weight", "head.weight"]]
    assert results["scan"]["n_bytes_held"] == (2 * 500 * 16 + 2 * 16 * 17 + 2 * 16) * 4
    if device == "cpu":
        assert results["tie"]["n_bytes_before"] - results["tie"]["n_bytes_after"] == 500 * 16 * 4
    else:
        assert results["tie"]["n_bytes_before"] > results["tie"]["n_bytes_after"]
    levels = {name: outcome for name, (outcome, _) in results["run"]["levels"].items()}
    assert levels["end to end"] == levels["training"] == "held"
    assert results["command"]["exit_code"] == 0, results["command"]["errors"]
    page = gpu.rendered(results)
    assert results["machine"]["device"] in page and "None have been taken yet" not in page
    assert "embed.weight = head.weight" in page and "equal within the noise floor" in page


def test_a_watcher_sees_memory_that_is_taken_and_given_back() -> None:
    if resident_bytes() is None:
        pytest.skip("this system does not say how much memory a process has")
    with gpu._host_peak() as grown:
        taken = bytearray(b"x" * (64 << 20))
        threading.Event().wait(0.05)
        del taken
    assert grown[0] is not None and grown[0] > 50 << 20
