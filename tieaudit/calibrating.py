"""Stage: Subject and data → Calibrated. Runs the model on it in a child process, and adds up what flows through sites.

Folders of transformers classes and live modules are watched by hooks, forwards and backwards; an ONNX model by a copy
whose inner values are outputs, forwards alone; an exported program not at all, so that only its loss is measured.
Memory: the sums of all sites, and one batch in the child.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tieaudit.end_to_end import with_limits
from tieaudit.errors import MissingPackage, RewriteRefused, UsageError
from tieaudit.formats.onnx.taps import read_graph, scores_behind, taps, write_tapped
from tieaudit.merges import Calibrated, Statistics
from tieaudit.model import Model, Weight
from tieaudit.overlay import Overlay
from tieaudit.printable import counted, listed
from tieaudit.propose import propose, schemes
from tieaudit.registry import choose, discover
from tieaudit.runners import Runner, Signature
from tieaudit.running import Opened, opened, path_of, runner_for
from tieaudit.sandbox import ChildFailed, Sandbox
from tieaudit.schemes import Scheme
from tieaudit.summing import IGNORED, TARGETS, unpacked
from tieaudit.tokens import LENGTH, N_MOST_TEXT_BYTES, Tokens, completed, from_archive, from_ids, main_ids, shown_in
from tieaudit.verdict import Subject

N_MOST_SUMS = 1 << 27
"""Numbers in the sums of all sites and both halves together, 1 GiB; sites beyond are not calibrated."""
_N_MOST_NUMBERS = 1 << 26
"""Scores and activations of one batch, at most."""
_N_MOST_BATCH_TOKENS = 1024
_FORMATS = ("huggingface", "onnx", "torch_export", "torch_module")
_FIRST = ("output_head", "token_embedding")


@dataclass(frozen=True)
class Data:
    """Calibration data, read for one model."""

    tokens: Tokens
    n_vocabulary: int
    """Rows of the largest table: what a batch of scores may take."""


def members_of(subject: Subject, names: Sequence[str]) -> tuple[str, ...]:
    """Ids of the weights that some schemes (all, if none is named) would give one value, heads and embeddings first."""
    asked = schemes(names)
    if not names:
        known = discover("schemes", Scheme).values()
        asked = [one for scheme in known for text in scheme.worth_comparing(subject)
                 for one in schemes([f"{scheme.name}:{text}" if text else scheme.name])]  # fmt: skip
    found: dict[str, None] = {}
    for one in asked:
        for candidate in propose(subject, one)[0]:
            if candidate.action == "share" and not candidate.lossless:
                found.update(dict.fromkeys(member.id for member in candidate.members))
    kinds = {id: subject.roles[id].kind if id in subject.roles else "" for id in found}
    return tuple(sorted(found, key=lambda id: _FIRST.index(kinds[id]) if kinds[id] in _FIRST else len(_FIRST)))


def read_data(subject: Subject, path: Path, tokenizer: Path | None, device: str = "auto") -> Data:
    """The data for this model: an .npz, or a text with the tokenizer that makes ids of it.

    UsageError for data that does not fit the model, MissingPackage, or RewriteRefused for a model that cannot be run.
    """
    model = subject.model
    runner = runner_of(model)
    with sandbox_on(runner, device) as box, _opened(model, box) as one:
        signature = with_limits(one.signature, path_of(model, ""))
        signature = _limited(subject, signature)
        if path.suffix.lower() == ".npz":
            tokens = from_archive(path, signature)
        else:
            tokens = _of_text(subject, path, tokenizer, signature, one.facts.get("n_positions"))
        completed(tokens.rows(0, 1), signature)
        if tokens.targets is not None and not tokens.given:
            tokens = _without_foresight(one, tokens, signature)
    return Data(tokens, max((w.shape[0] for w in model.weights if len(w.shape) == 2 and w.is_float), default=1))


def calibrate(subject: Subject, data: Data, ids: Sequence[str], device: str = "auto") -> Calibrated:
    """What flows through these weights, from two halves of the data. RewriteRefused if the model does not run on it.

    Cost: one forward pass of every row, and a backward pass where the runtime has one and there are targets.
    """
    model = subject.model
    if model.format == "torch_export":
        note = "no site of an exported program is watched, so that no policy is fitted: the loss is measured alone"
        return Calibrated({}, {}, (*data.tokens.notes, note))
    halves = [half for half in data.tokens.halves() if half is not None]
    n_axes = (2,) if model.format == "onnx" else (1, 2)  # what is added to a graph's values is seen by no tap
    asked = [model.by_id[id] for id in ids if len(model.by_id[id].shape) in n_axes]
    weights, notes = _affordable(asked, len(halves))
    notes = [*data.tokens.notes, *notes]
    if not weights:
        return Calibrated({}, {}, tuple(notes))
    unfit: dict[str, str] = {}
    found = []
    with _watching(subject, weights, sandbox_on(runner_of(model), device)) as watching:
        for half in halves:
            sums, wrong = watching.over(half, data)
            unfit.update(wrong)
            found.append(sums)
    if unfit:
        example = next(iter(unfit))
        notes.append(f"not calibrated: {listed(tuple(unfit))} ({unfit[example]})")
    if data.tokens.targets is None:
        notes.append("no loss is predicted: the data says not what is to be predicted")
    elif model.format == "onnx":
        notes.append("no loss is predicted where an embedding changes: ONNX Runtime computes no gradients")
    if len(found) == 1:
        notes.append("one row of data: policies are judged by what they were fitted to")
    return Calibrated(found[0], found[1] if len(found) > 1 else {}, tuple(notes))


@contextmanager
def sandbox_on(runner: Runner, device: str) -> Iterator[Sandbox]:
    """A child on the device; for `auto` the GPU if its runtime has one. UsageError for `cuda` where there is none."""
    with Sandbox(runner, "cpu") as usual:
        try:
            known = usual.ask("hello")[0]["devices"] if device != "cpu" else {}
        except ChildFailed as error:
            raise RewriteRefused(f"--calibrate: {error.message}") from error
        if device == "cuda" and "cuda" not in known:
            raise UsageError(f"--device cuda: {runner.title} has no CUDA device here", hint="--device cpu")
        if "cuda" not in known:
            yield usual
            return
    with Sandbox(runner, "cuda") as box:
        yield box


def batches(tokens: Tokens, signature: Signature, n_numbers: int) -> Iterator[dict[str, Any]]:
    """Complete inputs with targets, so many rows at a time that `n_numbers` for each token stay within the limit.

    Rows that do not fill a batch of fixed size are left out.
    """
    n_tokens = min(_N_MOST_BATCH_TOKENS, max(_N_MOST_NUMBERS // max(n_numbers, 1), 1))
    fixed = [port.dims[0] for port in signature.inputs if port.name in tokens.arrays and port.dims]
    size = next((dim for dim in fixed if isinstance(dim, int) and dim > 0), 0)
    for batch in tokens.batches(size or max(n_tokens // max(tokens.length, 1), 1)):
        if size and batch.n_rows < size:
            return
        arrays = completed(batch, signature)
        yield arrays if batch.targets is None else {**arrays, TARGETS: np.ascontiguousarray(batch.targets)}


def runner_of(model: Model) -> Runner:
    """What runs this model on data. RewriteRefused, with the reason, if nothing does."""
    if model.format not in _FORMATS:
        raise RewriteRefused(
            f"{model.path}: --calibrate: expected a model that can be run (a Hugging Face folder, an ONNX model or an "
            f"exported program), found weights alone ({model.format})"
        )
    if len(model.parts) > 1 and model.format == "onnx":
        names = listed(tuple(part.name for part in model.parts))
        raise RewriteRefused(
            f"{model.path}: --calibrate: expected one ONNX graph, found several parts ({names}), which take "
            "each other's outputs",
            hint="give the file of one part, with all of its own inputs and labels in an .npz",
        )
    runner = runner_for(model)
    if isinstance(runner, str):
        raise RewriteRefused(f"{model.path}: --calibrate: the model cannot be run here: {runner}")
    return runner


@contextmanager
def _opened(model: Model, box: Sandbox, path: str = "") -> Iterator[Opened]:
    try:
        with opened(box, path or path_of(model, "")) as one:
            yield one
    except ChildFailed as error:
        raise RewriteRefused(
            f"{model.path}: --calibrate: the model does not run on this data: {error.message}"
        ) from error


def _limited(subject: Subject, signature: Signature) -> Signature:
    """Ids stay below the rows of the token embedding, where no other limit is known."""
    rows = [subject.model.by_id[id].shape[0] for id, role in subject.roles.items()
            if role.kind == "token_embedding" and len(subject.model.by_id[id].shape) == 2]  # fmt: skip
    main = main_ids(signature)
    if not rows or main is None or main.limit is not None:
        return signature
    ports = tuple(replace(port, limit=min(rows)) if port.name == main.name else port for port in signature.inputs)
    return replace(signature, inputs=ports)


def _of_text(
    subject: Subject, path: Path, tokenizer: Path | None, signature: Signature, n_positions: int | None
) -> Tokens:
    if not path.is_file():
        raise UsageError(f"{path}: expected an .npz or a text, found {'no file' if path.exists() else 'nothing'}")
    port = main_ids(signature)
    if port is None:
        raise UsageError(f"{path}: expected an .npz with the model's inputs: it takes no integers that could be tokens")
    home = Path(subject.model.path)
    folder = tokenizer or (home if home.is_dir() else home.parent)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json",
                                                      "vocab.txt", "tokenizer.model", "spiece.model")):  # fmt: skip
        asked = "" if tokenizer is not None else "; give --tokenizer DIR, or ids in an .npz"
        raise UsageError(f"{folder}: expected the files of a tokenizer, found none{asked}")
    maker: Runner = choose(discover("runners", Runner), "torch", "runner")
    if maker.available() is not None:
        raise MissingPackage("transformers", "transformers", "making ids of a text")
    params = {"folder": str(folder.absolute()), "path": str(path.absolute()), "n_bytes": N_MOST_TEXT_BYTES}
    with Sandbox(maker, "cpu") as box:
        try:
            facts, found = box.ask("tokenize", params)
        except ChildFailed as error:
            raise UsageError(f"{path}: the tokenizer in {folder} makes no ids of it: {error.message}") from error
    rows = [subject.model.by_id[id].shape[0] for id, role in subject.roles.items()
            if role.kind == "position_embedding" and len(subject.model.by_id[id].shape) == 2]  # fmt: skip
    most = n_positions or min((n - 2 for n in rows), default=LENGTH)  # some tables begin behind two rows of their own
    what = f"ids by the tokenizer in {folder} (is it this model's?)"
    tokens = from_ids(found["ids"], port, str(path), first=facts["first"], length=max(min(LENGTH, most), 2), what=what)
    if port.limit is not None and facts["n_tokens"] > port.limit:
        known = f"{facts['n_tokens']:,} tokens, the model {port.limit:,}"
        note = f"the tokenizer in {folder} knows {known}: is it this model's?"
        tokens = replace(tokens, notes=(*tokens.notes, note))
    return tokens


def _without_foresight(one: Opened, tokens: Tokens, signature: Signature) -> Tokens:
    """No targets where a place's scores move with a later id: such a model sees what it would have to predict."""
    main = main_ids(signature)
    assert main is not None and tokens.targets is not None
    first = next(batches(tokens, signature, 1), None)
    if first is None:
        raise UsageError(f"{tokens.source}: expected rows enough for one batch of the model's fixed size, found fewer")
    first.pop(TARGETS)
    ids = first[main.name]
    other = ids.copy()
    other[:, -1] = np.where(ids[:, -1] == ids[:, 0], ids[:, -1] // 2, ids[:, 0])
    if (other == ids).all():
        other[:, -1] = 1 - np.minimum(ids[:, -1], 1)
    params: dict[str, Any] = {"handle": one.handle}
    seen = [one.sandbox.ask("losses", params, {**first, main.name: each, TARGETS: _past(ids)})[1]["losses"]
            for each in (ids, other)]  # fmt: skip
    if np.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6):
        return tokens
    note = "its scores move with later ids: without labels there is nothing that such a model is to predict"
    return replace(tokens, targets=None, notes=(*tokens.notes, note))


def _past(ids: Any) -> Any:
    """Targets that do not depend on the last id: each place's own next one, up to the last but one."""
    targets = np.full(ids.shape, IGNORED, np.int64)
    targets[:, :-2] = ids[:, 1:-1]
    if ids.shape[1] < 3:
        targets[:, 0] = ids[:, 0]
    return targets


def _affordable(weights: Iterable[Weight], n_halves: int) -> tuple[list[Weight], list[str]]:
    """The matrices and vectors whose sums over so many halves of the data fit, in order; and a note on the others."""
    kept: list[Weight] = []
    n, left = 0, 0
    for weight in weights:
        if not weight.shape or not weight.is_float or weight.absent:
            continue
        n_columns = 1 if len(weight.shape) == 1 else max(min(weight.shape), weight.shape[-1])
        cost = n_halves * (n_columns**2 + max(weight.shape))
        if n + cost > N_MOST_SUMS:
            left += 1
            continue
        n += cost
        kept.append(weight)
    limit = f"{8 * N_MOST_SUMS >> 30} GiB of sums are the most"
    return kept, [f"not calibrated: {counted(left, 'further weight')}: {limit}"] if left else []


@dataclass(frozen=True)
class _Watching:
    """A model that is open, and what is watched in it."""

    one: Opened
    signature: Signature
    sites: list[Any]
    ids: dict[str, str]
    """Key of a site → id of the weight."""
    turned: frozenset[str]
    """Keys of those that are stored as [inputs, outputs], as far as the graph says it."""
    unfit: dict[str, str]
    n_numbers: int
    """Activations of one token that a batch shows, besides its scores."""
    has_gradients: bool

    def over(self, tokens: Tokens, data: Data) -> tuple[dict[str, Statistics], dict[str, str]]:
        """Statistics by id, and why weights have none."""
        backward = self.has_gradients and tokens.targets is not None
        handle = {"handle": self.one.handle}
        ask = self.one.sandbox.ask
        told = ask("watch", {**handle, "sites": self.sites, "backward": backward})[0]
        n_batches = 0
        for batch in batches(tokens, self.signature, data.n_vocabulary + self.n_numbers):
            if not backward:
                targets = batch.pop(TARGETS, None)
                batch = {**batch, **shown_in(batch, self.signature, targets)}
            ask("calibrate", handle, batch)
            n_batches += 1
        if not n_batches:
            raise UsageError(f"{tokens.source}: expected rows enough for one batch of the model's fixed size")
        facts, arrays = ask("calibrated", handle)
        wrong = {self.ids[key]: reason for key, reason in {**told["unfit"], **facts["unfit"]}.items()}
        turned = {*self.turned, *facts.get("turned", ())}
        sums = {key: one for key, one in unpacked(facts, arrays).items() if one.n_tokens}
        found = {self.ids[key]: Statistics.of(one, turned=key in turned) for key, one in sums.items()}
        never = {self.ids[key]: "nothing flows through it" for key in self.ids if self.ids[key] not in {*found, *wrong}}
        return found, {**self.unfit, **wrong, **never}


@contextmanager
def _watching(subject: Subject, weights: Sequence[Weight], box: Any) -> Iterator[_Watching]:
    model = subject.model
    with box as sandbox:
        if model.format == "onnx":
            with _tapped(subject, weights, sandbox) as found:
                yield found
            return
        with _opened(model, sandbox) as one:
            keys = {str(index): weight for index, weight in enumerate(weights)}
            heads = {id for id, role in subject.roles.items() if role.kind == "output_head"}
            sites = [[key, weight.name, weight.id in heads] for key, weight in keys.items()]
            ids = {key: weight.id for key, weight in keys.items()}
            yield _Watching(one, _limited(subject, one.signature), sites, ids, frozenset(), {}, 0, True)


@contextmanager
def _tapped(subject: Subject, weights: Sequence[Weight], sandbox: Sandbox) -> Iterator[_Watching]:
    model = subject.model
    source = Path(path_of(model, ""))
    proto = read_graph(source)
    found, unfit = taps(proto, model, [weight.id for weight in weights])
    heads = {id for id, role in subject.roles.items() if role.kind == "output_head"}
    with Overlay(model) as overlay:
        copy = overlay.file(str(source)).with_name("tieaudit-tapped.onnx")
        scores = {one.result: scores_behind(proto, one.result)
                  for one in found if one.id in heads and one.kind == "product"}  # fmt: skip
        write_tapped(proto, copy, [*(one.value for one in found), *sorted({*scores, *scores.values()})])
        keys: dict[str, str] = {id: str(index) for index, id in enumerate(dict.fromkeys(one.id for one in found))}
        sites: list[Mapping[str, Any]] = [
            {"key": keys[one.id], "kind": one.kind, "value": one.value, "n_rows": one.n_rows,
             "result": one.result if one.result in scores else "", "scores": scores.get(one.result, "")}
            for one in found
        ]  # fmt: skip
        turned = frozenset(keys[one.id] for one in found if one.turned)
        widths = {one.value: min(model.by_id[one.id].shape) for one in found}
        widths |= {one.result: one.n_rows for one in found if scores.get(one.result, one.result) != one.result}
        with _opened(model, sandbox, str(copy)) as one:
            signature = _limited(subject, with_limits(one.signature, str(source)))
            ids = {key: id for id, key in keys.items()}
            yield _Watching(one, signature, list(sites), ids, turned, unfit, sum(widths.values()), False)
