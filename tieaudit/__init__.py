"""tieaudit tells the truth about weight tying: which weights of a model are one, claim to be, or once were.

The command line and these functions do the same; `docs/python.md` shows them with real output. A model is a path (file,
folder, `package.module:factory`) or a live `torch.nn.Module`. Importing this package imports neither torch nor onnx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from tieaudit.errors import TieAuditError

if TYPE_CHECKING:
    import torch

    from tieaudit.apply import Applied
    from tieaudit.change import Plan, Proof
    from tieaudit.live import Change
    from tieaudit.model import Model
    from tieaudit.survival import Survival
    from tieaudit.training import GradientParity
    from tieaudit.verdict import Report

__version__ = "0.1.0"
__all__ = ["TieAuditError", "apply", "gradients", "plan", "render", "scan", "survival", "tie", "untie", "verify"]


def scan(model: str | Path | torch.nn.Module, *, inputs: Any = None) -> Report:
    """What is there: weights, roles, ties of every origin, candidates, findings. Nothing is computed, nothing written.

    `inputs`: for a module, sample inputs (a tuple of arguments, a mapping of keyword arguments, or one value); made up
    where they are not given. With them the module is traced on fake tensors by torch.export, which tells the uses of
    every parameter and repeated calls. UnreadableModel for a path that holds no model, UsageError for one that holds
    several.

    >>> import torch, tieaudit
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100, bias=False))
    >>> model[1].weight = model[0].weight
    >>> report = tieaudit.scan(model)
    >>> report.summary.n_parameters, report.summary.n_parameters_named
    (800, 1600)
    >>> [tie.ids for tie in report.subject.found.ties]
    [('0.weight', '1.weight')]
    """
    from tieaudit.scan import scan as look_at

    return look_at(_model(model, inputs, whole=True))


def plan(
    model: str | Path | torch.nn.Module,
    *,
    scheme: str | tuple[str, ...] = "dedup",
    target: str | None = None,
    allow_lossy: bool = False,
    merge: str | None = None,
) -> Plan:
    """What could be done, what it saves, and what is refused and why; changes nothing.

    `scheme`: dedup, io, untie or declare, or several from left to right. UsageError for an unknown name.

    >>> import copy, torch, tieaudit
    >>> first = torch.nn.Linear(64, 64)
    >>> plan = tieaudit.plan(torch.nn.Sequential(first, copy.deepcopy(first)))
    >>> plan.lossless, plan.n_bytes_saved  # the 64 × 64 weight and the 64 biases, four bytes each
    (True, 16640)
    """
    from tieaudit.plan import plan as make
    from tieaudit.scan import look

    return make(look(_model(model)), _choices(scheme, target, allow_lossy, merge))


def apply(
    model: str | Path | torch.nn.Module,
    *,
    to: str | Path,
    scheme: str | tuple[str, ...] | None = None,
    container: Literal["safetensors", "torch"] | None = None,
    key: str = "",
    target: str | None = None,
    allow_lossy: bool = False,
    merge: str | None = None,
    require: Literal["structural", "regional", "end to end"] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    inputs: Mapping[str, Any] | None = None,
    max_drift: float | None = None,
) -> Applied:
    """Plan, write to `to` (which must not exist), read back, prove, deliver, with a receipt. The input is only read.

    `scheme`: None means dedup, or nothing but the conversion where `to` names another container (`model.safetensors`
    from `model.pt`) or `container` does (for folders). A live module is written as its state dict, `.pt` or
    `.safetensors` by the name of `to`; its ties are kept, and it is itself not changed. `key`: of a checkpoint, what
    is kept under it.
    `require`: the least level of proof; None for regional, or structural for a checkpoint, which is no program.

    ParityFailed if a level of proof fails; RewriteRefused if nothing could be done, if the required level could not
    run, or for a tensor that cannot be written (on the meta device, sharded, of a type that the container lacks).

    >>> import tempfile, torch, tieaudit
    >>> from pathlib import Path
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    >>> model[1].weight = model[0].weight
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = tieaudit.apply(model, to=Path(folder, "model.pt"))
    ...     state = torch.load(done.delivered.path)
    >>> [level.name for level in done.proof.levels if level.outcome == "held"], list(state)
    (['structural'], ['0.weight', '1.weight'])
    >>> state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    True
    """
    from tieaudit.apply import apply as carry_out
    from tieaudit.convert import container_for, convert
    from tieaudit.errors import RewriteRefused
    from tieaudit.plan import plan as make
    from tieaudit.rewrite import stamps
    from tieaudit.scan import look

    read = _to_write(model, key)
    seen = stamps(read)
    into = container_for(read, Path(to), container)
    if into is not None:
        chosen = _choices(scheme, target, allow_lossy, merge) if scheme is not None else None
        made = convert(look(read), into, chosen)
    else:
        made = make(look(read), _choices(scheme or "dedup", target, allow_lossy, merge))
    if not made.edits and into is None or made.refusals and not made.edits:
        said = "; ".join(dict.fromkeys(refusal.because for refusal in made.refusals)) or "there is nothing to do"
        raise RewriteRefused(f"{read.path}: nothing was written: {said}")
    return carry_out(
        read, made, Path(to), require=require, device=device, inputs=inputs, max_drift=max_drift, seen=seen
    )


def verify(
    before: str | Path | torch.nn.Module,
    after: str | Path | torch.nn.Module,
    *,
    inputs: Any = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_drift: float | None = None,
    gradients: bool | None = None,
) -> Proof:
    """Run both models on the same inputs and compare: two paths of one signature, or two live modules.

    Modules run where they are, in this process; paths, `package.module:factory` among them, in a child process.
    `gradients`: training parity as a fourth level; None: for two factories only. Facts of the proof: latency and memory
    of both. UsageError for a path and a module, or where inputs are needed.

    >>> import torch, tieaudit
    >>> model = torch.nn.Linear(4, 4)
    >>> proof = tieaudit.verify(model, model, inputs=torch.ones(2, 4))
    >>> proof.failed, proof.levels[-1].because
    ((), '1 output, equal bit for bit')
    """
    from tieaudit.errors import UsageError

    live = [not isinstance(one, (str, Path)) for one in (before, after)]
    if not any(live):
        from tieaudit.load import load_one
        from tieaudit.verify import compare

        one, other = load_one(str(before)), load_one(str(after))
        return compare(one, other, device=device, inputs=inputs, max_drift=max_drift, gradients=gradients)
    if not all(live) or device != "auto":
        what = "a device" if all(live) else "a path and a module"
        raise UsageError(f"expected two paths or two modules, which run where they are, found {what}")
    from tieaudit.calling import compare_modules

    return compare_modules(_live(before), _live(after), inputs, max_drift, gradients=bool(gradients))


def tie(
    module: torch.nn.Module,
    *,
    scheme: str | tuple[str, ...] = "dedup",
    allow_lossy: bool = False,
    merge: str | None = None,
) -> Change:
    """Tie a live module in place. `.plan` of the answer says what was done, `.undo()` takes it back.

    Tied names become one `Parameter` object; a transposed name reads it through a parametrization. Make the optimizer
    afterwards. RewriteRefused where the schemes refuse everything.

    >>> import torch, tieaudit
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 3, bias=False))
    >>> _ = model[1].weight.data.copy_(model[0].weight.data.T)
    >>> change = tieaudit.tie(model)
    >>> [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ['0.weight', '1.parametrizations.weight.original']
    >>> change.undo()
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '1.weight']
    """
    from tieaudit.live import tie as make_one

    return make_one(module, _choices(scheme, None, allow_lossy, merge))


def untie(module: torch.nn.Module) -> Change:
    """Give every name of a live module a tensor of its own, in place, with the same values; `.undo()` takes it back.

    >>> import torch, tieaudit
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    >>> model[1].weight = model[0].weight
    >>> tieaudit.untie(model).plan.n_bytes_saved  # 10 × 4 numbers of four bytes more
    -160
    >>> model[1].weight is model[0].weight
    False
    """
    from tieaudit.live import untie as make_several

    return make_several(module)


def gradients(
    module: torch.nn.Module, inputs: Any, *, loss: Callable[[Any], torch.Tensor] | None = None
) -> GradientParity:
    """Training parity: is each tied gradient the sum of the gradients of the slots, and do optimizers keep the ties?

    Compared in float64 with an untied copy, on the same data; the module itself is not changed.

    >>> import torch, tieaudit
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    >>> model[1].weight = model[0].weight
    >>> parity = tieaudit.gradients(model, torch.tensor([[1, 2, 3]]))
    >>> parity.held, parity.tied[0].reached, dict(parity.kept)
    (True, ('0.weight', '1.weight'), {'SGD': True, 'AdamW': True})
    """
    from tieaudit.training import gradients as compare

    return compare(module, inputs, loss=loss)


def survival(module: torch.nn.Module, *, inputs: Any = None, only: tuple[str, ...] | None = None) -> Survival:
    """Which everyday operations break this module's ties: copies, conversions, files, exports, distributed wrapping.

    Each is tried on a copy; `str()` of the answer is the table, with a remedy where a tie is lost. `only`: names of
    operations. Exports need sample inputs; distributed wrapping starts two processes on this machine.

    >>> import torch, tieaudit
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    >>> model[1].weight = model[0].weight
    >>> table = tieaudit.survival(model, only=("copy.deepcopy(module)", "module.to_empty() from meta"))
    >>> [(row.operation, row.outcome) for row in table.rows]
    [('copy.deepcopy(module)', 'kept'), ('module.to_empty() from meta', 'lost')]
    """
    from tieaudit.survival import survival as try_all

    return try_all(module, inputs, only=only)


def render(report: Report, format: Literal["text", "json"] = "text") -> str:
    """A report as the command line prints it: one screen of text, or JSON under a versioned schema.

    >>> import torch, tieaudit
    >>> print(tieaudit.render(tieaudit.scan(torch.nn.Linear(2, 2))).splitlines()[-1])
    20 rules · 0 findings · 0 cannot tell · 0 crashed
    """
    from tieaudit.config import Settings
    from tieaudit.registry import choose, discover
    from tieaudit.reports import ReportFormat

    chosen = choose(discover("reports", ReportFormat), format, "report format")
    text: str = chosen.render([report], [], {"color": False, "width": 100, "thresholds": Settings()})
    return text


def _model(source: str | Path | torch.nn.Module, inputs: Any = None, *, whole: bool = False) -> Model:
    if isinstance(source, (str, Path)):
        from tieaudit.load import load_one

        return load_one(source, unfetched=whole)
    from tieaudit.formats.torch_module.read import read_module

    return read_module(source, inputs, whole=whole)


def _to_write(source: str | Path | torch.nn.Module, key: str) -> Model:
    """What is to be written: of a live module, its state dict."""
    if isinstance(source, (str, Path)):
        from tieaudit.load import load_one

        return load_one(source, key=key)
    from tieaudit.formats.torch_module.state import read_state

    return read_state(_live(source))


def _live(source: Any) -> Any:
    """What is no path must be a module. UsageError."""
    import torch

    if not isinstance(source, torch.nn.Module):
        from tieaudit.errors import UsageError

        raise UsageError(f"expected a path or an nn.Module, found a {type(source).__name__}")
    return source


def _choices(scheme: str | tuple[str, ...], target: str | None, allow_lossy: bool, merge: str | None) -> Any:
    from tieaudit.plan import Choices

    schemes = (scheme,) if isinstance(scheme, str) else tuple(scheme)
    return Choices(schemes=schemes, target=target, allow_lossy=allow_lossy, merge=merge)


class _Package(ModuleType):
    """Keeps a function when the stage of the same name (`tieaudit.scan`, …) is imported.

    Python puts a submodule into its package under its name; `tieaudit.scan` would be the function until somebody
    imports the module and the module ever after. `from tieaudit.scan import …` finds the stage all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
