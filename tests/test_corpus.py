"""Every ONNX and safetensors file of a corpus of real models: brute force, a table read by hand, and what scan prints.

Three sources that know nothing of each other: `corpus_truth.py` compares all pairs of stored tensors with the formats'
own libraries; `corpus_truth.toml` says, in a person's words, which of those classes are ties and which are masks,
priors or shapes; the tool prints JSON.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus_truth as oracle
import pytest
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.errors import TieAuditError
from tieaudit.load import load_one

TABLE = Path(__file__).with_name("corpus_truth.toml")
TIE_RULES = {"TIE201", "TIE202", "TIE203"}
"""Rules that say *these are one weight*; TIE205 says *these bytes are stored again*."""


@dataclass(frozen=True)
class Judged:
    """One class of the table."""

    ids: frozenset[str]
    turned: bool
    """Whether a member is there with its axes swapped."""
    tie: bool
    finding: str


@dataclass(frozen=True)
class Look:
    """One file: what brute force found, and what the tool printed."""

    found: dict[str, oracle.Tensor]
    classes: list[oracle.Class]
    printed: dict[str, Any]

    @property
    def measured(self) -> list[dict[str, Any]]:
        return [group for group in self.printed["groups"] if group["origin"] == "measured"]


@pytest.fixture(scope="module")
def looks(corpus: Path) -> dict[str, Look]:
    """By path below the corpus; files that the formats' own libraries refuse are the business of the other tests."""
    found: dict[str, dict[str, oracle.Tensor]] = {}
    for path in oracle.files(corpus):
        try:
            found[str(path.relative_to(corpus))] = oracle.tensors(path)
        except Exception:
            continue
    result = CliRunner().invoke(main, ["scan", *(str(corpus / name) for name in found), "--format", "json"])
    printed = {str(Path(model["path"]).relative_to(corpus)): model for model in json.loads(result.stdout)["models"]}
    assert set(printed) == set(found), result.output[-1000:]
    return {name: Look(found[name], oracle.classes(found[name]), printed[name]) for name in found}


@pytest.fixture(scope="module")
def table(looks: dict[str, Look]) -> dict[str, list[Judged]]:
    """The table, with its abbreviations written out, for the files that are in this corpus."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["file"]
    return {row["path"]: list(judged(row, looks[row["path"]].classes)) for row in rows if row["path"] in looks}


def judged(row: dict[str, Any], classes: Iterable[oracle.Class]) -> Iterable[Judged]:
    """The classes of one file's row; many small ones of one kind are written as an ending and two counts."""
    for entry in row.get("tie", []):
        yield Judged(frozenset(entry["members"]), entry["relation"] == "transposed", True, entry.get("finding", ""))
    for entry in row.get("copy", []):
        if "matching" not in entry:
            yield Judged(frozenset(entry["members"]), False, False, entry.get("finding", ""))
            continue
        these = [one for one in classes if all(id.endswith(entry["matching"]) for id in one.members)]
        assert len(these) == entry["n_classes"], row["path"]
        assert sum(len(one.members) for one in these) == entry["n_members"], row["path"]
        yield from (Judged(frozenset(one.members), False, False, entry.get("finding", "")) for one in these)


def found_by_brute_force(look: Look) -> set[tuple[frozenset[str], bool]]:
    return {(frozenset(one.members), bool(one.transposed)) for one in look.classes}


def test_the_table_says_of_every_file_what_brute_force_finds(
    looks: dict[str, Look], table: dict[str, list[Judged]]
) -> None:
    said = {name: {(one.ids, one.turned) for one in table.get(name, [])} for name in looks}
    assert said == {name: found_by_brute_force(look) for name, look in looks.items()}
    assert len(looks) > 100
    assert len(table) > 20


def test_scan_finds_on_every_file_what_brute_force_finds_and_nothing_else(looks: dict[str, Look]) -> None:
    for name, look in looks.items():
        printed = [
            (frozenset(m["id"] for m in group["members"]), any(m["view"] == "transposed" for m in group["members"]))
            for group in look.measured
        ]
        assert len(printed) == len(set(printed)), name
        assert set(printed) == found_by_brute_force(look), name


def test_scan_sees_every_stored_tensor_once_and_knows_the_constant_ones(looks: dict[str, Look]) -> None:
    for name, look in looks.items():
        weights = {weight["id"]: weight for weight in look.printed["weights"]}
        assert set(weights) == set(look.found), name
        assert len(weights) == len(look.printed["weights"]), name
        dense = {id: one for id, one in look.found.items() if not one.kind.startswith("sparse")}
        assert {id for id in dense if weights[id]["constant"]} == {id for id, one in dense.items() if one.constant}, (
            name
        )
        groups = {frozenset(ids) for ids in look.printed["constant_groups"]}
        assert groups == {frozenset(one.members) for one in oracle.constants(look.found)}, name
        assert not {id for group in look.measured for m in group["members"] if weights[id := m["id"]]["constant"]}, name


def test_what_the_table_calls_a_copy_is_printed_as_equal_buffers_and_what_it_calls_a_tie_is_not(
    looks: dict[str, Look], table: dict[str, list[Judged]]
) -> None:
    for name, rows in table.items():
        buffers = {frozenset(m["id"] for m in group["members"]): group["buffers"] for group in looks[name].measured}
        assert buffers == {row.ids: not row.tie for row in rows}, name


def test_exactly_the_ties_of_the_table_are_findings(looks: dict[str, Look], table: dict[str, list[Judged]]) -> None:
    for name, look in looks.items():
        findings = look.printed["findings"]
        named = {(one["code"], frozenset(one["ids"])) for one in findings if one["code"] in TIE_RULES}
        rows = table.get(name, [])
        assert named == {(row.finding, row.ids) for row in rows if row.tie and row.finding}, name
        again = {id for one in findings if one["code"] == "TIE205" for id in one["ids"]}
        assert {id for row in rows if row.finding == "TIE205" for id in row.ids} <= again, name
        assert not again & {id for row in rows if row.tie for id in row.ids}, name


def test_what_the_table_calls_cut_up_is_no_tie_of_its_uses(looks: dict[str, Look]) -> None:
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["file"]
    cut = [(row["path"], set(entry["members"])) for row in rows for entry in row.get("cut", ())]
    for name, ids in cut:
        if name in looks:
            assert ids <= set(looks[name].found), name
            shared = {m["id"] for group in looks[name].printed["groups"] for m in group["members"]}
            assert not shared & ids, name
    assert cut


def test_bytes_stored_again_are_those_that_brute_force_adds_up(looks: dict[str, Look]) -> None:
    for name, look in looks.items():
        if any(group["origin"] == "aliased" and group["n_bytes_saved"] for group in look.printed["groups"]):
            continue
        expected = sum(one.n_bytes * (len(one.members) - 1) for one in look.classes)
        assert look.printed["summary"]["n_bytes_duplicate"] == expected, name


def test_every_reason_of_the_table_is_a_sentence() -> None:
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["file"]
    reasons = [entry["because"] for row in rows for kind in ("tie", "copy", "cut") for entry in row.get(kind, [])]
    assert all(len(reason.split()) >= 4 for reason in reasons)
    assert len({row["path"] for row in rows}) == len(rows)


# --- what cannot be read --------------------------------------------------------------------------------------------


def test_every_file_is_scanned_or_refused_in_one_line(corpus: Path) -> None:
    paths = [str(path) for path in sorted(corpus.rglob("*")) if path.is_file()]
    result = CliRunner().invoke(main, ["scan", *paths, "--format", "json"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    answer = json.loads(result.stdout)
    assert all(not model["crashed"] for model in answer["models"])
    assert all("\n" not in error["message"] for error in answer["errors"])
    known = [path for path in paths if path.endswith((".onnx", ".safetensors"))]
    refused = {error["path"] for error in answer["errors"]} & set(known)
    assert len(refused) <= len(known) * 0.05
    # other kinds of models are told by their names, not only as something unknown
    told = {error["path"].rsplit(".", 1)[-1]: error["message"] for error in answer["errors"]}
    if any(path.endswith(".gguf") for path in paths):
        assert "GGUF" in told["gguf"]
        assert "not supported yet" in told["gguf"]
    assert not told.keys() & {"pt", "pth", "jit", "ckpt"}


def test_a_folder_of_folders_is_scanned_as_a_whole(corpus: Path, looks: dict[str, Look]) -> None:
    result = CliRunner().invoke(main, ["scan", str(corpus), "--format", "json"])
    answer = json.loads(result.stdout)
    assert {str(Path(model["path"]).relative_to(corpus)) for model in answer["models"]} >= set(looks)
    assert len(answer["errors"]) <= 0.05 * len(looks)


@pytest.mark.parametrize(
    ("name", "mark"),
    [("test_arbitrary_external_file.onnx", "inside the model's folder"), ("come_from_user.onnx", "expected")],
)
def test_what_must_be_refused_is_refused(corpus: Path, name: str, mark: str) -> None:
    paths = [path for path in oracle.files(corpus) if path.name.endswith(name)]
    if not paths:
        pytest.skip(f"no {name} in this corpus")
    with pytest.raises(TieAuditError, match=mark):
        load_one(paths[0])
