"""Where the uses of a live module come from: generated inputs, how often a module is called, and what it may cost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import TiedLM, Twice, Universal  # noqa: E402
from tieaudit.calling import sample_inputs  # noqa: E402
from tieaudit.depth import n_calls, shared_across_depth  # noqa: E402
from tieaudit.errors import UsageError  # noqa: E402
from tieaudit.formats.torch_module import read  # noqa: E402
from tieaudit.formats.torch_module.answer import _stored  # noqa: E402
from tieaudit.formats.torch_module.samples import N_MOST_ELEMENTS, samples  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class Calls(nn.Module):
    """A module that hands its arguments to a function together with its layers."""

    def __init__(self, run: Callable[..., torch.Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, torch.Tensor) else layer)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(3, 3, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.mix(left, right)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3))

    def forward(self) -> torch.Tensor:
        return self.table @ self.table


def mnist() -> nn.Module:
    """Only pictures of 28 × 28 fit its last layer: two poolings leave 7 × 7."""
    half = nn.MaxPool2d(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), half, nn.Conv2d(4, 8, 3, padding=1), half, nn.Flatten(),
                         nn.Linear(8 * 7 * 7, 10))  # fmt: skip


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(4, 2), "input float32 2×4"),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "input float32 2×4"),
    "half precision": (lambda: nn.Linear(4, 2).half(), "input float32 2×4"),
    "language model": (TiedLM, "words int64 2×7"),
    "digits": (mnist, "input float32 2×1×28×28"),
    "sound": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), "input float32 2×2×64"),
    "volume": (lambda: nn.Conv3d(1, 2, 3), "input float32 2×1×16×16×16"),
    "recurrent": (lambda: nn.LSTM(5, 3, batch_first=True), "input float32 2×7×5"),
    "cell": (lambda: nn.GRUCell(5, 3), "input float32 2×5"),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        "src float32 2×7×8",
    ),
    "both sides": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), "src float32 2×7×8, tgt float32 2×7×8"),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        "query float32 7×2×8, key float32 7×2×8, value float32 7×2×8",
    ),
    "norm first": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), "input float32 2×7×6"),
    "two arguments": (Two, "left float32 2×3, right float32 2×3"),
    "no argument": (Alone, "no argument"),
    "bare matrix": (lambda: Calls(lambda self, x: x @ self.w, w=torch.randn(5, 3)), "x float32 2×5"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_without_inputs_is_traced_with_generated_ones(kind: str) -> None:
    make, said = KINDS[kind]
    module = make()
    report = tieaudit.scan(module)
    assert report.subject.model.metadata["uses"] == f"from torch.export with generated inputs: {said}"
    called = n_calls(report.subject.model, report.subject.found)
    assert called.keys() == {name for name, _ in module.named_parameters(remove_duplicate=False)}
    arguments = sample_inputs(module)
    assert isinstance(arguments, tuple)
    with torch.no_grad():
        module.eval()(*arguments)  # they are inputs that it really takes


def test_generated_inputs_are_on_the_meta_device_where_the_module_is() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    module[1].weight = module[0].weight
    report = tieaudit.scan(module)
    assert report.subject.model.metadata["uses"] == "from torch.export with generated inputs: input int64 2×7"
    assert {use.op for use in report.subject.model.uses} == {"embedding", "linear"}


def line(report: Any) -> str:
    """What the text says about uses, unwrapped."""
    text = " ".join(tieaudit.render(report).split())
    return "uses come" + text.partition("uses come")[2].partition("No tie of any origin")[0].rstrip()


def test_the_report_says_in_words_where_the_uses_come_from() -> None:
    generated, given = tieaudit.scan(Universal()), tieaudit.scan(Universal(), inputs=torch.zeros(3, 6))
    assert line(generated) == "uses come from torch.export with generated inputs: x float32 2×6"
    assert line(given) == "uses come from torch.export with the given inputs"
    wrong = tieaudit.scan(Universal(), inputs=torch.zeros(3, 5))
    assert line(wrong).startswith("uses come from the types of the modules: torch.export could not be used: ")
    container = tieaudit.scan(nn.ModuleList([nn.Linear(2, 2)]))
    assert line(container) == (
        "uses come from the types of the modules: how often a module is called is not known without sample inputs: "
        "none could be made up"
    )
    (document,) = json.loads(tieaudit.render(generated, "json"))["models"]
    assert document["metadata"]["uses"] == "from torch.export with generated inputs: x float32 2×6"


def test_a_forward_that_takes_nothing_we_can_make_is_told_by_types_and_why() -> None:
    module = Calls(lambda self, x: self.a(x["left"]), a=nn.Linear(3, 3))
    model = tieaudit.scan(module).subject.model
    assert model.metadata["uses"].startswith(
        "from the types of the modules: how often a module is called is not known without sample inputs: "
        "2 generated ones did not fit: "
    )
    assert {use.op for use in model.uses} == {"Linear"}
    with pytest.raises(UsageError, match="no inputs could be made up"):
        sample_inputs(module)


def test_a_layer_called_in_a_loop_is_sharing_across_depth_and_no_tie() -> None:
    report = tieaudit.scan(Universal())
    assert report.subject.found.ties == ()
    text = tieaudit.render(report)
    assert "Shared across depth (1): one module, called several times" in text
    assert "  layer  2 weights  168 B  used in 3 calls" in text  # 6·6 + 6 numbers of four bytes
    (document,) = json.loads(tieaudit.render(report, "json"))["models"]
    assert document["shared_across_depth"] == [{"module": "layer", "n_calls": 3, "ids": ["layer.weight", "layer.bias"]}]
    assert {weight["name"]: weight["n_calls"] for weight in document["weights"]} == {
        "layer.weight": 3, "layer.bias": 3, "last.weight": 1, "last.bias": 1,
    }  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(x + self.narrow(torch.relu(self.wide(self.norm(x)))))


class UniversalTransformer(nn.Module):
    """One block for encoding, applied six times (Dehghani et al. 2018), between a table and its transpose."""

    def __init__(self, n_steps: int = 6) -> None:
        super().__init__()
        self.n_steps = n_steps
        self.table = nn.Embedding(20, 8)
        self.block = Block()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.table(words)
        for _ in range(self.n_steps):
            x = self.block(x)
        return F.linear(x, self.table.weight)


def test_a_universal_transformer_shows_its_block_once_with_all_its_calls() -> None:
    report = tieaudit.scan(UniversalTransformer())
    inside = tuple(name for name, _ in UniversalTransformer().named_parameters() if name.startswith("block."))
    repeated = shared_across_depth(report.subject.model)
    # the norm runs twice in each of six blocks, everything else once
    assert {(one.module, one.n_calls) for one in repeated} == {("block", 6), ("block.norm", 12)}
    assert {id for one in repeated for id in one.ids} == set(inside)
    # the table has one name and two roles: that is a tie by its uses
    (tie,) = report.subject.found.ties
    assert tie.ids == ("table.weight",)
    assert [member.use.split(" ")[0] for member in tie.members] == ["embedding", "linear"]


def test_a_module_at_several_paths_is_a_tie_of_names_and_each_is_called_once() -> None:
    report = tieaudit.scan(Twice())
    assert shared_across_depth(report.subject.model) == ()
    assert {tie.ids for tie in report.subject.found.ties} >= {("first.0.weight", "second.0.weight")}
    assert all(len(tie.ids) == 2 for tie in report.subject.found.ties)  # none of uses alone
    (document,) = json.loads(tieaudit.render(report, "json"))["models"]
    calls = {weight["name"]: weight["n_calls"] for weight in document["weights"]}
    assert calls["first.0.weight"] == calls["second.0.weight"] == 2


def test_a_module_at_two_paths_of_which_one_runs_in_a_loop_is_both() -> None:
    module = Calls(lambda self, x: self.b(self.a(self.a(x))), a=nn.Linear(4, 4))
    module.b = module.a
    report = tieaudit.scan(module)
    assert [(one.module, one.n_calls) for one in shared_across_depth(report.subject.model)] == [("a", 2)]
    assert {tie.ids for tie in report.subject.found.ties} == {("a.weight", "b.weight"), ("a.bias", "b.bias")}


def test_a_matrix_read_in_two_ways_by_one_call_is_a_tie_by_its_uses() -> None:
    module = Calls(lambda self, x: F.linear(F.linear(x, self.w), self.w.T), w=torch.randn(5, 3))
    (tie,) = tieaudit.scan(module).subject.found.ties
    assert [str(member.view) for member in tie.members] == ["as stored", "transposed"]
    assert shared_across_depth(tieaudit.scan(module).subject.model) == ()


class Leaves(nn.Module):
    """A forward that keeps things: attributes, a buffer, an entry in a dict, its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("last", torch.zeros(3))
        self.seen: list[Any] = []
        self.calls = 0
        self.cache: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.cache = self.layer(x)
        self.last = self.cache[0]
        self.fresh = x
        return self.cache


def test_tracing_leaves_nothing_behind_in_the_module_nor_in_the_random_state() -> None:
    module = Leaves()
    module.layer.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    tieaudit.scan(module)
    assert (module.calls, module.cache) == (0, None)
    assert not hasattr(module, "fresh")
    assert type(module.last) is torch.Tensor
    assert (module.training, module.layer.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not module._forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_module_that_takes_too_long_is_told_by_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while True:
                x = self.inner(x)

    module = Endless(3, 3)
    module.inner = nn.Linear(3, 3)
    monkeypatch.setattr(read, "SECONDS", 0.3)
    began = time.monotonic()
    model = tieaudit.scan(module).subject.model
    assert time.monotonic() - began < 10
    assert model.metadata["uses"] == (
        "from the types of the modules: how often a module is called is not known without sample inputs: "
        "tracing with generated ones takes more than 0.3 s"
    )


def test_a_class_that_declares_huge_inputs_is_not_offered_any() -> None:
    shapes = [sample.inputs[0].shape for sample in samples(nn.Linear(N_MOST_ELEMENTS, 3, device="meta"))]
    assert shapes == [(2, 3), (2, 7, 3)]  # its rows are too long; what remains fits the matrix's other side


def test_a_large_module_on_the_meta_device_is_scanned_without_its_memory() -> None:
    n_layers, size = 24, 8192
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(size, size) for _ in range(n_layers)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = tieaudit.scan(module)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert report.summary.n_bytes == n_layers * (size * size + size) * 4  # 6.4 GB that nobody has
    assert grown < 200e6
    assert len(report.subject.model.uses) == 2 * n_layers


def test_what_would_talk_to_other_processes_is_not_traced_unasked(tmp_path: Path) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = DistributedDataParallel(TiedLM())
        report = tieaudit.scan(module)
    finally:
        distributed.destroy_process_group()
    assert report.subject.model.metadata["uses"].endswith(
        "without sample inputs: it holds a DistributedDataParallel, which is not traced unasked"
    )
    assert [tie.ids for tie in report.subject.found.ties] == [("module.embed.weight", "module.head.weight")]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "tieaudit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_line_generates_inputs_and_takes_an_npz(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Deep(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        for _ in range(x.shape[0]):\n"
        "            x = self.layer(x)\n"
        "        return x\n"
    )
    np.savez(tmp_path / "by_name.npz", x=np.zeros((5, 4), np.float32))
    (tmp_path / "no.npz").write_text("nothing")
    made_up = run("scan", "mine:Deep", cwd=tmp_path)
    assert made_up.returncode == 0, made_up.stderr
    assert "uses come from torch.export with generated inputs: x float32 2×4" in made_up.stdout
    assert "used in 2 calls" in made_up.stdout
    named = run("scan", "mine:Deep", "--inputs", "by_name.npz", "--format", "json", cwd=tmp_path)
    (document,) = json.loads(named.stdout)["models"]
    assert document["metadata"]["uses"] == "from torch.export with the given inputs"
    assert [one["n_calls"] for one in document["shared_across_depth"]] == [5]
    refused = run("scan", "mine:Deep", "--inputs", "no.npz", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "no.npz: expected an .npz archive" in refused.stderr


def test_arrays_that_numpy_named_are_arguments_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "in_order.npz", np.zeros((3, 4), np.float32), np.ones(2))
    np.savez(tmp_path / "by_name.npz", arr_1=np.zeros(1), y=np.ones(2))
    in_order = _stored(str(tmp_path / "in_order.npz"), nn.Linear(2, 2))
    assert [tuple(one.shape) for one in in_order] == [(3, 4), (2,)]
    assert sorted(_stored(str(tmp_path / "by_name.npz"), nn.Identity())) == ["arr_1", "y"]


def test_sample_inputs_for_a_file_are_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "x.npz", np.zeros(3))
    done = run("scan", "a.safetensors", "--inputs", "x.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert "sample inputs are of use for `package.module:factory` only" in done.stderr
