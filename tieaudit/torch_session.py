"""The open modules of a child process, and the verbs that every PyTorch runner has. Imported in the child only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.arithmetic import attempt, device_name, exact, held_bytes, settle_workspace, timed
from tieaudit.machine import processor_name
from tieaudit.nested import Array, arrays_of, tensors_of
from tieaudit.summing import ASIDE, IGNORED, PLACES, SCORED, TARGETS, packed, scores_among
from tieaudit.watching import Watch, no_site

if TYPE_CHECKING:
    import torch

    from tieaudit.runners import Answer, Params, Verb

Arrays = Mapping[str, Array]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Open:
    """One module in eval mode on the child's device."""

    module: torch.nn.Module
    arguments: Callable[[Arrays], Arguments]
    """Positional and keyword arguments for inputs by name, on the CPU."""
    before_each: Callable[[], None] | None = None
    """Called before each run: what one run left behind is not what the next one begins with."""
    named: Callable[[Any], Any] | None = None
    """What names the outputs of a module that only numbers them."""
    differentiates: bool = False
    """It needs gradients to compute its outputs."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Perturbed tensors and what they held."""
    watch: Watch | None = None
    """Of a calibration that is under way."""
    keys: dict[str, str] = field(default_factory=dict)
    """Name of a parameter that is watched → the key of its site."""


class Session:
    """Open modules by handle. Arithmetic is set once, for the life of the process."""

    def __init__(self, device: str) -> None:
        settle_workspace()
        import torch

        self.device = torch.device(device)
        self._settings = ExitStack()
        self._settings.enter_context(exact())
        self._n_threads = torch.get_num_threads()
        self._open: dict[int, Open] = {}
        self._not_deterministic: set[str] = set()

    def hold(
        self,
        module: torch.nn.Module,
        arguments: Callable[[Arrays], Arguments],
        *,
        before_each: Callable[[], None] | None = None,
        named: Callable[[Any], Any] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Keep a module under a handle, in eval mode and on the device; the handle, and facts about the module."""
        with suppress(NotImplementedError):  # the module of an exported program has only the mode it was traced in
            module.eval()
        module = module.to(self.device)
        handle = max(self._open, default=0) + 1
        self._open[handle] = Open(module, arguments, before_each, named)
        return handle, {"n_bytes_grown": held_bytes(module), "class": type(module).__name__}

    def verbs(self, open_: Verb, packages: tuple[str, ...] = ("torch",)) -> dict[str, Verb]:
        """All verbs; `open_` is the runner's own."""

        def hello(params: Params, arrays: Arrays) -> Answer:
            return self._hello(packages), {}

        own: dict[str, Verb] = {"run": self.run, "time": self.time, "close": self.close, "gradients": self.gradients}
        changes: dict[str, Verb] = {"state": self.state, "perturb": self.perturb, "restore": self.restore}
        sites: dict[str, Verb] = {"watch": self.watch, "calibrate": self.calibrate, "calibrated": self.calibrated}
        return {"hello": hello, "open": open_, **own, **changes, **sites, "losses": self.losses}

    def _hello(self, packages: tuple[str, ...]) -> dict[str, Any]:
        import importlib

        import torch

        devices = {"cpu": processor_name()}
        if torch.cuda.is_available():
            devices["cuda"] = torch.cuda.get_device_name(0)
        versions = {name: str(importlib.import_module(name).__version__) for name in packages}
        if self.device.type == "cuda" and torch.version.cuda:
            versions["cuda"] = str(torch.version.cuda)
        return {"versions": versions, "devices": devices, "not_deterministic": sorted(self._not_deterministic)}

    def run(self, params: Params, arrays: Arrays) -> Answer:
        """Outputs by name. `threads`: 0 for the usual number; `split`: one row of the batch at a time."""
        import torch

        torch.set_num_threads(int(params.get("threads", 0)) or self._n_threads)
        one = self._open[params["handle"]]
        if not params.get("split"):
            return {}, self._outputs(one, arrays)
        n_rows = max((len(array) for array in arrays.values() if array.ndim), default=1)
        rows = [self._outputs(one, _row(arrays, index, n_rows)) for index in range(n_rows)]
        names = [name for name in rows[0] if all(row[name].ndim and len(row[name]) == 1 for row in rows)]
        return {}, {name: np.concatenate([row[name] for row in rows]) for name in names}

    def _outputs(self, one: Open, arrays: Arrays) -> dict[str, Array]:
        result = self._call(one, arrays)
        return arrays_of(result if one.named is None else one.named(result))

    def _call(self, one: Open, arrays: Arrays) -> Any:
        args, kwargs = self._placed(one, arrays)
        return attempt(lambda: self._forward(one, args, kwargs), self._not_deterministic)

    def _placed(self, one: Open, arrays: Arrays) -> Arguments:
        args, kwargs = on_device(one.arguments(arrays), self.device)
        return args, kwargs

    def _forward(self, one: Open, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        if one.before_each is not None:
            one.before_each()
        torch.manual_seed(0)
        if not one.differentiates:
            try:
                with torch.inference_mode():
                    return one.module(*args, **kwargs)
            except RuntimeError as error:
                if "grad" not in str(error) and "nference" not in str(error):
                    raise
        with torch.enable_grad():  # a model of forces, say, which differentiates its own energy
            result = one.module(*args, **kwargs)
        one.differentiates = True
        return result

    def time(self, params: Params, arrays: Arrays) -> Answer:
        """At least `n_runs` runs, at least `seconds` long in sum, after one to warm up."""
        import torch

        torch.set_num_threads(self._n_threads)
        one = self._open[params["handle"]]
        args, kwargs = self._placed(one, arrays)
        found = timed(
            lambda: self._forward(one, args, kwargs), self.device, params["n_runs"], float(params.get("seconds", 0.0))
        )
        peak = None if found.n_bytes_peak is None else found.n_bytes_peak + held_bytes(one.module)
        facts = {"seconds": found.median, "each": list(found.seconds), "on": device_name(self.device)}
        return {**facts, "n_bytes_peak": peak}, {}

    def gradients(self, params: Params, arrays: Arrays) -> Answer:
        """Gradients of two open modules on the same inputs, summed over the slots of each tie, in float64."""
        from dataclasses import asdict

        from tieaudit.backward import across, floats_in_float64, in_float64

        one, other = (self._open[params[side]] for side in ("before", "after"))
        found = across(
            in_float64(one.module), in_float64(other.module), lambda: floats_in_float64(self._placed(one, arrays)),
            lambda: floats_in_float64(self._placed(other, arrays)), self._not_deterministic,
        )  # fmt: skip
        rows = [asdict(row) for row in found.summed]
        facts = {"summed": rows, "left": list(found.left), "limit": found.limit, "on": device_name(self.device)}
        return facts, {}

    def watch(self, params: Params, arrays: Arrays) -> Answer:
        """Begin to add up what flows through `sites` ([key, name, head]); `backward`: gradients as well.

        The keys of those that are no site of the live module, with why.
        """
        one = self._open[params["handle"]]
        names: dict[str, str] = {}
        heads, unfit = [], {}
        for key, name, head in params["sites"]:
            try:
                full = _full_name(one.module, name)
            except KeyError as error:
                unfit[key] = str(error.args[0])
                continue
            if reason := no_site(one.module, full):
                unfit[key] = reason
            else:
                names[full] = key
                heads += [full] if head else []
        one.keys = names
        one.watch = Watch(one.module, list(names), backward=bool(params["backward"]), heads=heads)
        return {"unfit": unfit}, {}

    def calibrate(self, params: Params, arrays: Arrays) -> Answer:
        """One more batch through what is watched; with targets beside the inputs, forwards and backwards."""
        import torch

        one = self._open[params["handle"]]
        watch = one.watch
        assert watch is not None
        targets, shown, scored = (arrays.get(name) for name in (TARGETS, PLACES, SCORED))
        args, kwargs = self._placed(one, {name: array for name, array in arrays.items() if name not in ASIDE})
        watch.shown = shown
        with torch.set_grad_enabled(targets is not None):
            torch.manual_seed(0)
            result = attempt(lambda: one.module(*args, **kwargs), self._not_deterministic)
            if targets is None:
                watch.scored(tensors_of(result), scored)
            else:
                scores, wanted = self._scored(result, targets)
                total = torch.nn.functional.cross_entropy(scores.float(), wanted, ignore_index=IGNORED, reduction="sum")
                n_targets = int((wanted != IGNORED).sum())
                attempt(lambda: watch.differentiate(total, n_targets, tensors_of(result)), self._not_deterministic)
        return {}, {}

    def calibrated(self, params: Params, arrays: Arrays) -> Answer:
        """What was added up, by key, and why sites turned out to be none; ends the watch."""
        one = self._open[params["handle"]]
        assert one.watch is not None
        one.watch.close()
        unfit = {one.keys[name]: reason for name, reason in one.watch.unfit.items()}
        turned = [one.keys[name] for name in one.watch.turned]
        sums = {one.keys[name]: found for name, found in one.watch.sums.items() if name not in one.watch.unfit}
        one.watch = None
        facts, found = packed(sums)
        return {**facts, "unfit": unfit, "turned": turned}, found

    def losses(self, params: Params, arrays: Arrays) -> Answer:
        """−log p of every target, in nats and in order."""
        import torch

        one = self._open[params["handle"]]
        targets = arrays[TARGETS]
        result = self._call(one, {name: array for name, array in arrays.items() if name != TARGETS})
        scores, wanted = self._scored(result, targets)
        kept = wanted != IGNORED
        scores, wanted = scores[kept], wanted[kept]
        pieces = [
            torch.nn.functional.cross_entropy(some.double(), ids, reduction="none")
            for some, ids in zip(scores.split(256), wanted.split(256), strict=True)
        ]
        found = torch.cat(pieces) if pieces else torch.zeros(0)
        return {}, {"losses": found.detach().double().cpu().numpy()}

    def _scored(self, result: Any, targets: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, vocabulary] scores, and the targets of the same tokens on the device."""
        import torch

        tensors = tensors_of(result)
        scores = tensors[scores_among(tensors, targets)]
        n = scores.shape[-1]
        if targets.size and int(targets.max()) >= n:
            raise ValueError(f"target {int(targets.max())} has no score: the output scores {n:,} tokens")
        return scores.reshape(-1, n), torch.from_numpy(targets.reshape(-1).astype(np.int64)).to(scores.device)

    def state(self, params: Params, arrays: Arrays) -> Answer:
        """Digests of all tensors, and the names that are one tensor in memory."""
        return _state(self._open[params["handle"]].module), {}

    def perturb(self, params: Params, arrays: Arrays) -> Answer:
        """Noise of four times their usual size on some `rows` (None: all) of the parameter `name`, until `restore`."""
        import torch

        one = self._open[params["handle"]]
        tensor = _parameter(one.module, params["name"])
        one.kept.append((tensor, tensor.detach().clone()))
        rows = range(len(tensor)) if params["rows"] is None else [row for row in params["rows"] if row < len(tensor)]
        with torch.no_grad():
            torch.manual_seed(0)
            size = max(float(tensor.float().square().mean().sqrt()), 0.25)
            noise = torch.randn((len(rows), *tensor.shape[1:]), device=tensor.device) * 4 * size
            tensor[list(rows)] += noise.to(tensor.dtype)
        return {}, {}

    def restore(self, params: Params, arrays: Arrays) -> Answer:
        """Take back all perturbations of one module."""
        import torch

        one = self._open[params["handle"]]
        with torch.no_grad():
            while one.kept:
                tensor, value = one.kept.pop()
                tensor.copy_(value)
        return {}, {}

    def close(self, params: Params, arrays: Arrays) -> Answer:
        """Free one module, and its memory on the device."""
        import torch

        self._open.pop(params["handle"], None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}, {}


def on_device(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors on a device; tensors that want a gradient become leaves there that want one."""
    import torch
    from torch.utils import _pytree

    def move(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return item.detach().to(device).requires_grad_(item.requires_grad) if item.requires_grad else item.to(device)

    return _pytree.tree_map(move, value)


def _row(arrays: Arrays, index: int, n_rows: int) -> dict[str, Array]:
    return {n: a[index : index + 1] if a.ndim and len(a) == n_rows else a for n, a in arrays.items()}


def _parameter(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by the name that the file gives it, which may lack or have a prefix."""
    tensor: torch.Tensor = _tensors(model)[_full_name(model, name)]
    return tensor


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}


def _full_name(model: torch.nn.Module, name: str) -> str:
    """The model's own name for what a file calls so. KeyError if there is none, or several."""
    found = _tensors(model)
    near = [name] if name in found else [n for n in found if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if len(near) != 1:
        raise KeyError(f"the class {type(model).__name__} has no parameter {name}")
    return near[0]


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """sha256 of every parameter and saved buffer, and the groups of names that are one tensor in memory."""
    import torch

    digests: dict[str, str] = {}
    places: dict[object, list[str]] = {}
    seen: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        axes = [one for one in zip(tensor.stride(), tensor.shape, strict=True) if one[1] > 1]
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), *axes)
        if tensor.numel():  # sorted: a transposed view visits the same elements
            places.setdefault((tensor.data_ptr(), tensor.dtype, *sorted(axes)), []).append(name)
        if place not in seen or not tensor.numel():
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
            seen[place] = hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
        digests[name] = seen[place]
    return {"digests": digests, "tied": [names for names in places.values() if len(names) > 1]}
