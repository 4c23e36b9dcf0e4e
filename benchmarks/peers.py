"""The programs that tieaudit stands beside, and the environments they run in.

Each gets the path of a model, does its job in memory, and prints as JSON either `kept`, the names of the weights that
are left, or `groups` of names it says are one. So what a peer found is measured, not claimed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Command, Measured, repeated

HERE = ROOT / "benchmarks"
ENVIRONMENTS = {"onnx": HERE / "peers.txt", "optimum": HERE / "peers-optimum.txt"}
"""Name → pins. `own`: the environment that tieaudit itself runs in."""


@dataclass(frozen=True)
class Program:
    """Something to time beside tieaudit."""

    name: str
    does: str
    environment: str
    packages: tuple[str, ...]
    """Distributions whose versions are shown."""
    code: str
    variables: tuple[tuple[str, str], ...] = ()


_KEPT = "\nimport json; print(json.dumps({'kept': [one.name for one in model.graph.initializer]}))"
_OPTIMUM = "from optimum.onnx.graph_transformations import "

ONNX = (
    Program(
        "onnx-ir `DeduplicateHashedInitializersPass`",
        "merges equal ones by sha512 of every tensor",
        "onnx",
        ("onnx-ir",),
        "import sys, json, onnx_ir as ir\n"
        "from onnx_ir.passes.common import DeduplicateHashedInitializersPass as P\n"
        "model = ir.load(sys.argv[1])\nP()(model)\n"
        "print(json.dumps({'kept': list(model.graph.initializers)}))",
    ),
    Program(
        "onnx-ir `DeduplicateInitializersPass`, no limit",
        "merges equal ones, their bytes as keys; by default only those up to 1,024 elements",
        "onnx",
        ("onnx-ir",),
        "import sys, json, onnx_ir as ir\n"
        "from onnx_ir.passes.common import DeduplicateInitializersPass as P\n"
        "model = ir.load(sys.argv[1])\nP(size_limit=2**40)(model)\n"
        "print(json.dumps({'kept': list(model.graph.initializers)}))",
    ),
    Program(
        "OnnxSlim `slim`",
        "simplifies the graph; merges equal ones below 1,000 elements",
        "onnx",
        ("onnxslim",),
        "import sys, onnxslim\nmodel = onnxslim.slim(sys.argv[1])" + _KEPT,
    ),
    Program(
        "OnnxSlim weight tying alone, no limit",
        "merges equal ones, all pairs of one shape",
        "onnx",
        ("onnxslim",),
        "import sys, onnx, onnxslim.third_party.onnx_graphsurgeon as gs\n"
        "from onnxslim.core.optimization.weight_tying import tie_weights\n"
        "graph = gs.import_onnx(onnx.load(sys.argv[1]))\ntie_weights(graph)\ngraph.cleanup()\n"
        "model = gs.export_onnx(graph)" + _KEPT,
        (("ONNXSLIM_THRESHOLD", str(2**40)),),
    ),
    Program(
        "onnxoptimizer `eliminate_duplicate_initializer`",
        "merges equal ones by hash of every element",
        "onnx",
        ("onnxoptimizer",),
        "import sys, onnx, onnxoptimizer\n"
        "model = onnxoptimizer.optimize(onnx.load(sys.argv[1]), ['eliminate_duplicate_initializer'])" + _KEPT,
    ),
    Program(
        "optimum `remove_duplicate_weights`",
        "merges equal ones by sha512 of every tensor",
        "optimum",
        ("optimum-onnx",),
        "import sys, onnx\n" + _OPTIMUM + "remove_duplicate_weights\n"
        "model = remove_duplicate_weights(onnx.load(sys.argv[1]), inplace=True)" + _KEPT,
    ),
    Program(
        "optimum `remove_duplicate_weights_from_tied_info`",
        "merges the pair that it is told, given the live torch model; writes and checks the file",
        "optimum",
        ("optimum-onnx", "torch"),
        "import sys, tempfile, onnx, torch\n" + _OPTIMUM + "remove_duplicate_weights_from_tied_info as tie\n"
        "live = torch.nn.Module()\n"
        "live.embed = torch.nn.Embedding(32000, 1024, device='meta')\n"
        "live.head = torch.nn.Linear(1024, 32000, bias=False, device='meta')\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    pair = ['embed.weight', 'head.weight']\n"
        "    model = tie(onnx.load(sys.argv[1]), live, [pair], folder + '/tied.onnx')" + _KEPT,
    ),
    Program(
        "`onnx.load`",
        "only loads, for scale",
        "onnx",
        ("onnx",),
        "import sys, onnx\nmodel = onnx.load(sys.argv[1])" + _KEPT,
    ),
)

_BY_DIGEST = (
    "import sys, json, hashlib\nfrom collections import defaultdict\nfrom safetensors import safe_open\n"
    "seen = defaultdict(list)\n"
    "with safe_open(sys.argv[1], 'numpy') as file:\n"
    "    for name in file.keys():\n"
    "        tensor = file.get_tensor(name)\n"
    "        {}\n"
    "print(json.dumps({{'groups': [found for found in seen.values() if len(found) > 1]}}))"
)

SAFETENSORS = (
    Program(
        "`safe_open`, sha256 of every tensor",
        "reports equal ones: the ten lines one writes by hand",
        "own",
        ("safetensors",),
        _BY_DIGEST.format("seen[str(tensor.dtype), tensor.shape, hashlib.sha256(tensor).digest()].append(name)"),
    ),
    Program(
        "`safe_open`, sha256 of every tensor and its transpose",
        "reports equal and transposed ones, by hand",
        "own",
        ("safetensors",),
        _BY_DIGEST.format(
            "both = [hashlib.sha256(tensor).digest(), hashlib.sha256(tensor.T.copy()).digest()]; "
            "seen[str(tensor.dtype), tensor.nbytes, min(both)].append(name)"
        ),
    ),
    Program(
        "safetensors `_find_shared_tensors`",
        "reports what shares memory once loaded, as `save_model` does",
        "own",
        ("safetensors", "torch"),
        "import sys, json\nfrom safetensors.torch import load_file, _find_shared_tensors as find\n"
        "print(json.dumps({'groups': [sorted(found) for found in find(load_file(sys.argv[1])) if len(found) > 1]}))",
    ),
)


def prepare(name: str) -> str:
    """Install an environment unless it is there as its pins say; one line of what went wrong, or nothing."""
    if name == "own":
        return ""
    home, pins = _home(name), ENVIRONMENTS[name].read_text()
    stamp = home / "pins.txt"
    if stamp.is_file() and stamp.read_text() == pins:
        return ""
    print(f"installing {ENVIRONMENTS[name].name} into {home.relative_to(ROOT)}", file=sys.stderr)
    home.parent.mkdir(parents=True, exist_ok=True)
    arguments = os.environ.get("PIP_ARGS", "").split()
    steps: tuple[Command, Command] = (
        [sys.executable, "-m", "venv", "--clear", home],
        [_python(name), "-m", "pip", "install", "--quiet", *arguments, "-r", ENVIRONMENTS[name]],
    )
    for command in steps:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return f"not installed: {said[-1] if said else 'pip failed'}"
    stamp.write_text(pins)
    return ""


def _home(name: str) -> Path:
    return HERE / "built" / "peers" / name


def _python(name: str) -> str:
    return sys.executable if name == "own" else str(_home(name) / "bin" / "python")


def measured(program: Program, path: Path, n_repeats: int) -> Measured:
    """The program on a model; an environment that cannot be installed is its error."""
    if problem := prepare(program.environment):
        return Measured((), 0, "", problem)
    command: Command = [_python(program.environment), "-c", program.code, path]
    return repeated(command, n_repeats, environment=dict(program.variables))


def found(stdout: str, names: set[str]) -> list[list[str]]:
    """What a program says or leaves, as groups of names: for `kept`, each lost name is a group of one."""
    said: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    if "groups" in said:
        return [sorted(group) for group in said["groups"]]
    return [[name] for name in sorted(names - set(said["kept"]))]


def versions(environments: set[str]) -> dict[str, str]:
    """Distribution → version of everything compared with, as installed."""
    result = {}
    for environment in sorted(environments):
        if prepare(environment):
            continue
        wanted = sorted({p for one in (*ONNX, *SAFETENSORS) if one.environment == environment for p in one.packages})
        code = "import sys, importlib.metadata as m\nfor one in sys.argv[1:]: print(one, m.version(one))"
        done = subprocess.run([_python(environment), "-c", code, *wanted], capture_output=True, text=True)
        result.update(dict(line.split() for line in done.stdout.splitlines()))
    return result
