"""How often the role of a weight is told rightly, with names and without: docs/roles.md.

    python benchmarks/roles.py ZOO [--exports FOLDER] [--only ARCH,ARCH] [--page]

ZOO holds one folder per architecture: `truth.json` with its `class`, `input_embedding` and `output_head`, and `untied`
(or `tied`), saved by transformers; `index.json` names those that could not be built.
The truth is the module tree of the live model (`role_truth.py`). Exports are kept in FOLDER and made where they are
missing (10 minutes for 60 architectures on two cores). Cost otherwise: a few seconds for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.role_truth import Truth, truth_of  # noqa: E402 - runs as a script, from any folder
from tieaudit.model import Role  # noqa: E402
from tieaudit.places import NO_LAYER  # noqa: E402
from tieaudit.propose import propose, schemes  # noqa: E402
from tieaudit.scan import look  # noqa: E402
from tieaudit.verdict import Subject  # noqa: E402

PAGE = ROOT / "docs" / "roles.md"
MARKS = ("<!-- measured -->", "<!-- end -->")


@dataclass
class Tally:
    """Right and all answers for each kind, and the wrong ones."""

    right: Counter[str] = field(default_factory=Counter)
    all: Counter[str] = field(default_factory=Counter)
    wrong: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    n_layers: list[int] = field(default_factory=lambda: [0, 0])
    pairs: dict[str, str] = field(default_factory=dict)
    """Architecture → empty where the one candidate of `io` is the library's pair, else what was proposed instead."""
    misfits: list[str] = field(default_factory=list)
    """Architectures whose pair differs in shape: a candidate that nothing writes."""

    def add(self, arch: str, told: Mapping[str, Role], truth: Mapping[str, Truth]) -> None:
        """Roles of weights against the truth about them, by the same names."""
        for name in told.keys() & truth.keys():
            kind, role = truth[name].kind, told[name]
            self.all[kind] += 1
            self.right[kind] += role.kind == kind
            if role.kind != kind:
                self.wrong[kind, role.kind].append(f"{arch}: {name}")
            if truth[name].layer is not None and kind not in NO_LAYER:
                self.n_layers[1] += 1
                self.n_layers[0] += role.layer == truth[name].layer


def live(folder: Path, name: str) -> Any:
    """The model of a folder, with experts in a form that can be exported."""
    import transformers

    model_class = getattr(transformers, name)
    try:
        return model_class.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="batched_mm"
        ).eval()
    except (TypeError, ValueError, ImportError):
        return model_class.from_pretrained(folder).eval()


def stored_truth(folder: Path, model: Any, truth: Mapping[str, Truth]) -> dict[str, Truth]:
    """The truth by stored names: saving renames, and stores fused experts one by one."""
    import numpy as np
    from safetensors import safe_open

    known: dict[bytes, tuple[str, str]] = {}

    def note(array: Any, name: str, half: str = "") -> None:
        known.setdefault(np.ascontiguousarray(array).tobytes() + str(array.shape).encode(), (name, half))

    for name, parameter in model.named_parameters(remove_duplicate=False):
        array = parameter.detach().float().numpy()
        note(array, name)
        for expert in array if array.ndim == 3 else ():
            middle = len(expert) // 2
            note(expert, name)
            note(expert.T, name)
            note(expert[:middle], name, "ffn_gate")
            note(expert[middle:], name, "ffn_up")
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a mapping
                array = tensors.get_tensor(stored).float().numpy()
                name, half = known.get(array.tobytes() + str(array.shape).encode(), (stored, ""))
                if name in truth:
                    fused = half and truth[name].kind == "ffn_gate_up"
                    found[stored] = truth[name]._replace(kind=half) if fused else truth[name]
    return found


def measure(zoo: Path, exports: Path | None, only: frozenset[str]) -> tuple[Tally, Tally, list[str]]:
    """(with names, without names, what could not be exported). Architectures that do not load are left out."""
    named, scrambled, failed = Tally(), Tally(), []
    for home in sorted(path.parent for path in zoo.glob("*/truth.json")):
        arch = home.name
        if only and arch not in only:
            continue
        about = json.loads((home / "truth.json").read_text())
        folder = home / ("untied" if (home / "untied").is_dir() else "tied")
        subject = look_at(folder)
        pair = about.get("input_embedding"), about.get("output_head")
        if all(pair):
            note_pair(named, arch, subject, {weight.id: weight.name for weight in subject.model.weights}, set(pair))
        try:
            model = live(folder, about["class"])
        except Exception as error:  # whatever a class raises for a tiny configuration
            failed.append(f"{arch} (does not load: {reason(error)})")
            continue
        truth = {name: one for name, one in truth_of(model).items() if one is not None}
        named.add(arch, _told(subject), stored_truth(folder, model, truth))
        if exports is not None:
            _measure_export(arch, model, truth, exports / arch, scrambled, failed, all(pair))
    return named, scrambled, failed


def look_at(folder: Path) -> Subject:
    """A folder as the tool sees it."""
    from tieaudit.formats.huggingface import huggingface

    ((path, files),) = huggingface.group([folder])
    return look(huggingface.load(path, files))


def _told(subject: Subject) -> dict[str, Role]:
    model = subject.model
    return {model.by_id[id].name: role for id, role in subject.roles.items() if not model.by_id[id].absent}


def note_pair(tally: Tally, arch: str, subject: Subject, names: Mapping[str, str], pair: set[str]) -> None:
    """Whether the scheme io proposes one class, of exactly this pair; `names` has the truth's name of an id."""
    candidates, refusals = propose(subject, schemes(["io"])[0])
    found = [{names.get(member.id, member.id) for member in one.members} for one in candidates]
    right = found == [pair] and not refusals
    tally.pairs[arch] = "" if right else "; ".join(" = ".join(sorted(one)) for one in found) or "nothing"
    if right and candidates[0].action == "fit":
        tally.misfits.append(arch)


def reason(error: BaseException) -> str:
    """The kind and first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:90]}"


def live_pair(model: Any, truth: Mapping[str, Truth], here: Collection[str]) -> set[str]:
    """The library's pair by the names of the live model, for a graph that holds the parameters `here`.

    Some classes keep a table that nothing reads beside one for each side (T5's `shared`): of those in the graph it
    is the decoder's, whose ids the head scores.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    table, head = (names[id(one.weight)] for one in (model.get_input_embeddings(), model.get_output_embeddings()))
    if not set(table) & set(here):
        table = [
            name for name in here
            if name in truth and truth[name].kind == "token_embedding" and truth[name].side == "decoder"
        ]  # fmt: skip
    return {name for name in (*table, *head) if name in here}


def _measure_export(
    arch: str, model: Any, truth: Mapping[str, Truth], home: Path, tally: Tally, failed: list[str], is_pair: bool
) -> None:
    from benchmarks.role_exports import write
    from tieaudit.formats.onnx.read import load

    path, origins = home / "model.onnx", home / "map.json"
    if not origins.exists():
        try:
            origin = write(model, path)
        except Exception as error:  # torch's exporter raises many kinds
            failed.append(f"{arch} ({reason(error)})")
            return
        origins.write_text(json.dumps(origin, indent=1))
    origin = json.loads(origins.read_text())
    subject = look(load(path, (path,)))
    tally.add(arch, {name: subject.roles[id] for id, name in origin.items()}, truth)
    if is_pair:
        note_pair(tally, arch, subject, origin, live_pair(model, truth, origin.values()))


def unbuilt_of(zoo: Path) -> list[str]:
    """Architectures of which there is no model, by what their classes said to a tiny configuration."""
    index = zoo / "index.json"
    failed = json.loads(index.read_text())["failed"] if index.exists() else {}
    said = {arch: " ".join(error.replace("\\n", " ").split()) for arch, error in failed.items()}
    return [f"{arch} (`{text if len(text) < 100 else text[:97] + '…'}`)" for arch, text in sorted(said.items())]


def page(named: Tally, scrambled: Tally, failed: list[str], unbuilt: list[str]) -> str:
    """The measured part of docs/roles.md."""
    lines = ["| kind | with names | without names |", "|---|---:|---:|"]
    for kind in sorted(named.all | scrambled.all, key=lambda kind: -named.all[kind]):
        lines.append(f"| {kind} | {_share(named, kind)} | {_share(scrambled, kind)} |")
    lines.append(f"| **all** | **{_total(named)}** | **{_total(scrambled)}** |")
    lines.append(f"| number of the layer | {_layers(named)} | {_layers(scrambled)} |")
    lines.append(f"| `io` proposes exactly the library's pair | {_pairs(named)} | {_pairs(scrambled)} |")
    for title, tally in (("With names", named), ("Without names", scrambled)):
        lines += ["", f"{title}, all misses (truth → told):", ""]
        for (kind, told), names in sorted(tally.wrong.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"- {kind} → {told}, {len(names)}: `{names[0]}`" + (" …" if len(names) > 1 else ""))
        lines += [f"- another pair, {arch}: {instead}" for arch, instead in tally.pairs.items() if instead]
    if named.misfits:
        lines += [
            "",
            f"Pairs whose shapes differ, shown as candidates that nothing writes: {', '.join(named.misfits)}.",
        ]
    lines += ["", "Not measured without names:", "", *(f"- {one}" for one in failed or ["none"])]
    if unbuilt:
        lines += ["", "Not built at this size by transformers, and not measured:", "", *(f"- {one}" for one in unbuilt)]
    return "\n".join(lines)


def _share(tally: Tally, kind: str) -> str:
    return f"{tally.right[kind]} / {tally.all[kind]}" if tally.all[kind] else "–"


def _total(tally: Tally) -> str:
    right, n_all = sum(tally.right.values()), sum(tally.all.values())
    return f"{right} / {n_all}, {100 * right / max(n_all, 1):.1f} %"


def _layers(tally: Tally) -> str:
    return f"{tally.n_layers[0]} / {tally.n_layers[1]}"


def _pairs(tally: Tally) -> str:
    return f"{sum(not instead for instead in tally.pairs.values())} / {len(tally.pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--exports", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/roles.md")
    given = parser.parse_args()
    only = frozenset(given.only.split(",")) if given.only else frozenset[str]()
    text = page(*measure(given.zoo, given.exports, only), unbuilt_of(given.zoo))
    if given.page:
        before, rest = PAGE.read_text().split(MARKS[0], 1)
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")
    print(text)


if __name__ == "__main__":
    main()
