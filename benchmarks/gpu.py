"""What tieaudit does on a GPU, measured: `make gpu` → benchmarks/gpu.json → docs/gpu.md.

Scanning a module whose tensors lie on the device, tying it there, running tied and untied beside each other, and the
command line. Without a GPU nothing is measured and nothing is written. The functions take any device, so that tests
run them on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "gpu.json"
PAGE = ROOT / "docs" / "gpu.md"
_SIZES = "TIEAUDIT_GPU_BENCHMARK"
"""Sizes for the factories of this module, which the command line calls without arguments."""


@dataclass(frozen=True)
class Sizes:
    """Of the language model that is measured."""

    n_words: int = 128_000
    width: int = 4096
    n_layers: int = 8
    batch: int = 4
    length: int = 64


def language_model(sizes: Sizes, *, tied: bool, device: str = "cpu") -> torch.nn.Module:
    """Embedding, gated layers and a head: equal values tied and untied, float32, made where they are to be."""
    import torch
    from torch import nn

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(sizes.width)
            self.gate, self.down = nn.Linear(sizes.width, sizes.width), nn.Linear(sizes.width, sizes.width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = x + self.down(torch.tanh(self.gate(self.norm(x))))
            return found

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(sizes.n_words, sizes.width)
            self.layers = nn.ModuleList(Layer() for _ in range(sizes.n_layers))
            self.head = nn.Linear(sizes.width, sizes.n_words, bias=False)
            weight = self.embed.weight
            self.head.weight = weight if tied else nn.Parameter(weight.detach().clone())

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            found: torch.Tensor = self.head(x)
            return found

    torch.manual_seed(0)
    with torch.device(device):
        return Model().eval()


def _ids(sizes: Sizes, device: str) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, sizes.n_words, (sizes.batch, sizes.length), generator=generator).to(device)


def untied() -> tuple[torch.nn.Module, Any]:
    """For the command line."""
    sizes = Sizes(**json.loads(os.environ.get(_SIZES, "{}")))
    return language_model(sizes, tied=False), {"ids": _ids(sizes, "cpu")}


def tied() -> tuple[torch.nn.Module, Any]:
    """For the command line."""
    sizes = Sizes(**json.loads(os.environ.get(_SIZES, "{}")))
    return language_model(sizes, tied=True), {"ids": _ids(sizes, "cpu")}


def measured(device: str, sizes: Sizes) -> dict[str, Any]:
    """Everything on one device, in bytes and seconds."""
    return {
        "machine": _machine(device),
        "sizes": vars(sizes),
        "scan": scanning(device, sizes),
        "tie": tying(device, sizes),
        "run": running(device, sizes),
        "command": commanding(device, sizes),
    }


def _machine(device: str) -> dict[str, str]:
    import platform

    import torch

    import tieaudit
    from tieaudit.arithmetic import device_name

    facts = {
        "device": device_name(torch.device(device)), "torch": str(torch.__version__),
        "python": platform.python_version(), "tieaudit": tieaudit.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    if device == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    return facts


def scanning(device: str, sizes: Sizes) -> dict[str, Any]:
    """An untied module with equal values on the device: the equal pair is found by reading blocks of it."""
    import tieaudit
    from tieaudit.arithmetic import held_bytes

    module = language_model(sizes, tied=False, device=device)
    tieaudit.scan(language_model(Sizes(8, 8, 1, 1, 1), tied=False, device=device))  # what is imported once
    began = time.perf_counter()
    with _host_peak() as grown:
        report = tieaudit.scan(module)
    seconds = time.perf_counter() - began
    found = [sorted(tie.ids) for tie in report.subject.found.ties if tie.origin == "measured"]
    return {
        "seconds": seconds, "n_bytes_held": held_bytes(module), "n_bytes_host": grown[0], "pairs": found,
    }  # fmt: skip


@contextmanager
def _host_peak() -> Iterator[list[int | None]]:
    """How far the resident memory of this process grows meanwhile, looked at every 10 ms."""
    from tieaudit.machine import resident_bytes

    before, grown, done = resident_bytes(), [None if resident_bytes() is None else 0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            now = resident_bytes()
            if now is not None and before is not None:
                grown[0] = max(grown[0] or 0, now - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()


def tying(device: str, sizes: Sizes) -> dict[str, Any]:
    """Memory of the device before and after `tieaudit.tie`, and after its `undo` is forgotten."""
    import gc

    import torch

    import tieaudit
    from tieaudit.arithmetic import held_bytes

    module = language_model(sizes, tied=False, device=device)

    def allocated() -> int:
        gc.collect()
        return int(torch.cuda.memory_allocated()) if device == "cuda" else held_bytes(module)

    before = allocated()
    change = tieaudit.tie(module)
    names = [edit.members[0].id for edit in change.plan.edits if hasattr(edit, "members")]
    change._undo.clear()  # it keeps the old tensors, so that they can come back
    del change
    return {"n_bytes_before": before, "n_bytes_after": allocated(), "kept": names}


def running(device: str, sizes: Sizes) -> dict[str, Any]:
    """Tied and untied on the same inputs: levels, latency, peak memory."""
    import tieaudit

    apart = language_model(sizes, tied=False, device=device)
    one = language_model(sizes, tied=True, device=device)
    small = Sizes(min(sizes.n_words, 1000), min(sizes.width, 64), 2, 2, 8)
    proof = tieaudit.verify(apart, one, inputs=_ids(sizes, device))
    learnt = tieaudit.verify(
        language_model(small, tied=False, device=device), language_model(small, tied=True, device=device),
        inputs=_ids(small, device), gradients=True,
    ).levels[-1]  # fmt: skip
    levels = {level.name: [level.outcome, level.because] for level in (*proof.levels, learnt)}
    return {"levels": levels, "facts": dict(proof.facts)}


def commanding(device: str, sizes: Sizes) -> dict[str, Any]:
    """`tieaudit verify` of two factories on the device, at a size that a child builds fast."""
    small = Sizes(min(sizes.n_words, 8000), min(sizes.width, 512), 2, 2, 32)
    words = ["verify", "benchmarks.gpu:untied", "benchmarks.gpu:tied", "--device", device]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tieaudit", *words], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, _SIZES: json.dumps(vars(small)), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return {
        "words": " ".join(["tieaudit", *words]), "seconds": time.perf_counter() - began,
        "exit_code": done.returncode, "printed": done.stdout, "errors": done.stderr[-1000:],
    }  # fmt: skip


def rendered(results: Mapping[str, Any] | None) -> str:
    """docs/gpu.md, from what was measured or from nothing."""
    lines = [
        "# On a GPU",
        "",
        "Made by `make gpu`, which also runs the tests marked `cuda`; do not edit. Where there is no GPU those tests",
        "are skipped with a reason, `make gpu` ends with one line, and this page stays as it is.",
        "",
        *_WHAT,
        "",
        "## Figures",
        "",
    ]
    if results is None:
        lines += [
            "**None have been taken yet:** no GPU could be used so far. The tests marked `cuda` have not run on one",
            "either; the same functions run on the CPU in every test run. To take them, on a machine with an NVIDIA",
            "GPU and a CUDA build of PyTorch (`make gpu PIP_ARGS=…` where another index is needed):",
            "",
            "    make gpu",
        ]
    else:
        lines += _figures(results)
    return "\n".join(lines) + "\n"


_WHAT = (
    "* `tieaudit verify A B --device cuda` (default `auto`: the CPU, then the GPU where there is one) runs folders,",
    "  live modules and, with onnxruntime-gpu, ONNX files there. TF32 is off, cuBLAS has a fixed workspace, and",
    "  PyTorch's deterministic algorithms are on; an operation that has none runs all the same and is named.",
    "* Latency is the median of several runs in turns (before, after, before …) after one to warm up, until the",
    "  device has finished, with the algorithms that PyTorch chooses by itself; a difference within the spread is",
    "  called none.",
    "* *device memory at most*: the module's tensors, each memory once, and what PyTorch's allocator gave at most",
    "  while it ran (`torch.cuda.max_memory_allocated`); of ONNX Runtime it is not known.",
    "* Live modules are scanned, tied, verified and trained (`tieaudit.gradients`) where they are; a scan reads",
    "  tensors of the device block by block.",
)


def _figures(results: Mapping[str, Any]) -> list[str]:
    machine, sizes, scan, tie = results["machine"], results["sizes"], results["scan"], results["tie"]
    run, command = results["run"], results["command"]
    facts = run["facts"]
    named = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "date"))
    host = "not known" if scan["n_bytes_host"] is None else f"{scan['n_bytes_host'] / 1e6:.0f} MB"
    times = {
        side: "{:.3g} ms (middle half of {} runs {:.3g} … {:.3g})".format(
            facts[f"seconds_per_run_{side}"] * 1e3, facts[f"n_runs_{side}"],
            *(one * 1e3 for one in facts[f"seconds_per_run_quartiles_{side}"]),
        )
        for side in ("before", "after")
    }  # fmt: skip
    peaks = [facts.get(f"n_bytes_device_peak_{side}") for side in ("before", "after")]
    shown = " → ".join("not known" if one is None else f"{one / 1e9:.3f} GB" for one in peaks)
    verdict = "they differ" if facts["time_differs"] else "no measurable difference"
    pairs = "; ".join(" = ".join(pair) for pair in scan["pairs"]) or "none"
    return [
        f"{machine['device']}, {machine['date']} ({named}).",
        "",
        f"An embedding of {sizes['n_words']:,} × {sizes['width']:,}, {sizes['n_layers']} layers and a head, in "
        f"float32; {sizes['batch']} × {sizes['length']} ids.",
        "",
        "| | |",
        "|---|---|",
        f"| scan of the untied module | {scan['seconds']:.2f} s; {scan['n_bytes_held'] / 1e9:.2f} GB on the device, "
        f"of which the equal pair was read in full; host memory grew by {host} |",
        f"| equal pairs found | {pairs} |",
        f"| device memory, untied → `tieaudit.tie` | {tie['n_bytes_before'] / 1e9:.3f} GB → "
        f"{tie['n_bytes_after'] / 1e9:.3f} GB |",
        f"| device memory at most while it runs, untied → tied | {shown} |",
        f"| time per run, untied | {times['before']} |",
        f"| time per run, tied | {times['after']}: {verdict} |",
        *(f"| {name} | {outcome}: {because} |" for name, (outcome, because) in run["levels"].items()),
        "",
        f"`{command['words']}`, at a smaller size, exit code {command['exit_code']} after {command['seconds']:.1f} s:",
        "",
        "```text",
        *command["printed"].rstrip().splitlines(),
        "```",
    ]


def main(words: list[str] | None = None) -> int:
    """Measure and write; 2 with one line where there is no GPU."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--page", action="store_true", help="write docs/gpu.md from the figures that are there")
    options.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    chosen = options.parse_args(words)
    if not chosen.page:
        if (reason := no_gpu()) is not None:
            print(f"error: {reason}; docs/gpu.md was left alone", file=sys.stderr)
            return 2
        if chosen.check:
            return 0
        RESULTS.write_text(json.dumps(measured("cuda", Sizes()), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(rendered(known()), encoding="utf-8")
    return 0


def known() -> dict[str, Any] | None:
    """The figures that are there."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def no_gpu() -> str | None:
    """Why no figures can be taken here, or None."""
    try:
        import torch
    except ImportError:
        return "expected PyTorch with CUDA, found no PyTorch"
    if torch.cuda.is_available():
        return None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return f"expected a CUDA device, found none (PyTorch {torch.__version__}, built for {build})"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
