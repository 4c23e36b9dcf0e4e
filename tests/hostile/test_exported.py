"""Exported programs that want to run code or make no sense: one line, exit 2, nothing executed.

Each attack on `torch.export.load` is shown to work there first (`the_attack_works`), so that a test that stays quiet
means something.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from exported_files import changed, ids, language_model, quietly  # noqa: E402

from tieaudit.cli import main  # noqa: E402
from tieaudit.errors import TieAuditError, UnreadableModel  # noqa: E402
from tieaudit.formats.torch_export.handing import handed  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.scan import scan  # noqa: E402

PROGRAM = "models/model.json"
TABLE, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("good") / "good.pt2", True)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return exec, (f"open({self.path!r}, 'w').close()",)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def nodes(value: Any) -> Any:
    return value["graph_module"]["graph"]["nodes"]


def in_guards(mark: Path) -> dict[str, Any]:
    def edit(value: Any) -> None:
        value["guards_code"] = [f"open({str(mark)!r}, 'w').close() or True"]

    return {PROGRAM: edit}


def in_target(mark: Path) -> dict[str, Any]:
    """A node calls whatever lies below `torch`."""

    def edit(value: Any) -> None:
        call = {"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}
        node = {
            "target": "torch.os.system", "inputs": [call], "outputs": [], "metadata": {}, "name": "run",
            "is_hop_single_tensor_return": None,
        }  # fmt: skip
        nodes(value).insert(0, node)

    return {PROGRAM: edit}


def in_size(mark: Path) -> dict[str, Any]:
    """A size is an expression, which is evaluated."""

    def edit(value: Any) -> None:
        size = value["graph_module"]["graph"]["tensor_values"]["input_ids"]["sizes"][0]["as_expr"]
        size["expr_str"] = f"(open({str(mark)!r}, 'w').close(), {size['expr_str']})[1]"

    return {PROGRAM: edit}


def in_samples(mark: Path) -> dict[str, Any]:
    return {"data/sample_inputs/model.pt": pickled(((Bomb(mark),), {}))}


def in_weight(mark: Path) -> dict[str, Any]:
    def edit(value: Any) -> None:
        value["config"]["pos"].update(use_pickle=True, path_name="weight_99")

    return {TABLE: edit, "data/weights/weight_99": pickled(Bomb(mark))}


def in_object(mark: Path) -> dict[str, Any]:
    def edit(value: Any) -> None:
        value["config"]["mask"].update(use_pickle=True, path_name="opaque_obj_0", tensor_meta=None)

    return {CONSTANTS: edit, "data/constants/opaque_obj_0": pickle.dumps(Bomb(mark), 2)}


ATTACKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sample inputs": in_samples, "a pickled weight": in_weight, "a pickled object": in_object,
    "guards": in_guards, "a size": in_size,
}  # fmt: skip
LEFT_OUT = ("sample inputs", "guards")
"""What the program does not need: it is run without them. All else is refused."""


def the_attack_works(path: Path, mark: Path) -> bool:
    def load() -> None:
        torch.export.load(path).module()(ids())

    with contextlib.suppress(Exception):  # it may fail after it has done its work
        quietly(load)
    return mark.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_code_in_an_archive_is_never_run(name: str, good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = changed(good, tmp_path / "bad.pt2", ATTACKS[name](mark))
    assert the_attack_works(path, mark), "torch.export.load no longer runs this: find another attack"
    mark.unlink()
    assert CliRunner().invoke(main, ["scan", str(path)]).exit_code == 0
    assert not mark.exists()
    if name in LEFT_OUT:
        pieces = [base64.b64decode(one) for one in handed(path, "cpu")["pieces"] if isinstance(one, str)]
        assert b"models/model.json" in b"".join(pieces)
        assert b"executed" not in b"".join(pieces)
    else:
        with pytest.raises(UnreadableModel) as refusal:
            handed(path, "cpu")
        assert "\n" not in str(refusal.value)
    assert not mark.exists()


def test_a_program_with_a_bomb_beside_it_runs_without_it(good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = changed(good, tmp_path / "bad.pt2", {**in_samples(mark), **in_guards(mark)})
    result = CliRunner().invoke(main, ["verify", str(path), str(good), "--device", "cpu"])
    assert result.exit_code == 0, result.output  # the same program: guards and sample inputs compute nothing
    assert not mark.exists()


@pytest.mark.parametrize("text", [
    "__import__('os')", "(lambda: 0)()", "s0.__class__", "s0[0]", "'a'*9", "exec", "9**9**9", "os.system", "Pow(9,9)",
    "Symbol('s0', commutative=print())", "Symbol('__import__')", "Function('f')(1)", "s0;s1", "s0\nimport os", "",
])  # fmt: skip
def test_only_arithmetic_is_evaluated(text: str) -> None:
    from tieaudit.formats.torch_export.expressions import checked

    with pytest.raises(UnreadableModel, match="no plain arithmetic"):
        checked(text, "here")


@pytest.mark.parametrize(("text", "plain"), [
    ("Symbol('s72', positive=True, integer=True)", "s72"), ("s0 + 1", "s0 + 1"), ("2*s0", "2*s0"),
    ("Add(Symbol('s0', positive=True, integer=True), Integer(1))", "s0 + 1"),
    ("Mul(Integer(8), Symbol('u1', integer=True))", "8*u1"), ("FloorDiv(s0, 2)", "FloorDiv(s0, 2)"),
])  # fmt: skip
def test_sizes_as_torch_writes_them_are_understood(text: str, plain: str) -> None:
    from tieaudit.formats.torch_export.expressions import checked, readable

    assert checked(text, "here") == text and readable(text) == plain


@pytest.mark.parametrize("target", [
    "torch.os.system", "torch.hub.load", "torch.ops.aten.from_file.default", "torch.ops.load_library", "torch.load",
    "_operator.methodcaller", "torch.ops.mine.anything.default", "os.system", "torch.ops.higher_order.print", "#x:y",
])  # fmt: skip
def test_operations_that_do_more_than_compute_are_refused(target: str) -> None:
    from tieaudit.formats.torch_export.clean import operation

    with pytest.raises(UnreadableModel, match="none that is run here"):
        operation(target, "here")


def test_a_node_that_calls_the_system_is_refused_before_torch_sees_it(good: Path, tmp_path: Path) -> None:
    # 2.13 builds the call and refuses it only because the node has no type
    with pytest.raises(UnreadableModel, match=r"'torch\.os\.system' is none that is run here"):
        handed(changed(good, tmp_path / "bad.pt2", in_target(tmp_path / "executed")), "cpu")


def test_a_name_that_would_become_source_code_is_refused(good: Path, tmp_path: Path) -> None:
    def edit(value: Any) -> None:
        nodes(value)[0]["name"] = "x = __import__('os').system('true') #"

    with pytest.raises(UnreadableModel, match="no plain name"):
        handed(changed(good, tmp_path / "bad.pt2", {PROGRAM: edit}), "cpu")


def row(field: str, value: Any) -> Callable[[Any], None]:
    def edit(table: Any) -> None:
        meta = table["config"]["emb.weight"]
        (meta if field in meta else meta["tensor_meta"])[field] = value

    return edit


WRONG = {
    "beyond the blob": row("sizes", [{"as_int": 5000}, {"as_int": 8}]),
    "an offset beyond the blob": row("storage_offset", {"as_int": 1 << 40}),
    "a negative stride": row("strides", [{"as_int": -8}, {"as_int": 1}]),
    "a negative size": row("sizes", [{"as_int": -1}, {"as_int": 8}]),
    "another number of strides": row("strides", [{"as_int": 1}]),
    "no number": row("sizes", [{"as_int": "50"}, {"as_int": 8}]),
    "an unknown type": row("dtype", 99),
    "a path out of the folder": row("path_name", "../../models/model.json"),
    "an absolute path": row("path_name", "/etc/passwd"),
    "a blob that is not there": row("path_name", "weight_12345"),
    "a table of another kind": lambda value: [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_table_that_makes_no_sense_is_one_line(name: str, good: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "bad.pt2", {TABLE: WRONG[name]})
    result = CliRunner().invoke(main, ["scan", str(path)])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) <= 2 and "Traceback" not in result.output


def test_a_truncated_archive_is_one_line(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in (30, 600, len(data) // 2, len(data) - 10):
        path = tmp_path / f"{length}.pt2"
        path.write_bytes(data[:length])
        result = CliRunner().invoke(main, ["scan", str(path)])
        assert result.exit_code == 2 and len(result.output.strip().splitlines()) <= 2, result.output


def test_json_that_inflates_without_end_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data/weights/model_weights_config.json", b"{}")
        file.writestr("bomb/models/model.json", b" " * (80 * 1024 * 1024))
    assert path.stat().st_size < 200_000
    with pytest.raises(UnreadableModel, match="deflated ones of more than"):
        load_one(path)


def test_json_nested_beyond_reason_is_refused(good: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "deep.pt2", {PROGRAM: b'{"a":' * 50_000 + b"1" + b"}" * 50_000})
    with pytest.raises(UnreadableModel, match="nested too deeply"):
        load_one(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, one in items for inner in places(one, (*path, key)))]


@pytest.mark.parametrize("member", [PROGRAM, TABLE, CONSTANTS])
def test_a_value_of_another_kind_anywhere_is_an_answer_or_one_line(member: str, good: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    with zipfile.ZipFile(good) as file:
        original = file.read(f"good/{member}").decode()
    everywhere = [place for place in places(json.loads(original)) if place]
    outcomes = set()
    for index, place in enumerate(rng.sample(everywhere, min(120, len(everywhere)))):
        value = json.loads(original)
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = rng.choice([None, -1, 1 << 70, "x", [], {}, True, 0.5, [[]], {"as_int": -3}])
        path = changed(good, tmp_path / f"{index}.pt2", {member: json.dumps(value).encode()})
        for work in (lambda path=path: scan(load_one(path)), lambda path=path: handed(path, "cpu")):
            try:
                work()
                outcomes.add("answered")
            except TieAuditError as error:
                outcomes.add("refused in several lines" if "\n" in str(error) else "refused")
        path.unlink()
    assert outcomes == {"answered", "refused"}


def test_reading_an_archive_imports_no_torch(good: Path) -> None:
    code = (
        "import sys; from tieaudit.load import load_one; from tieaudit.scan import scan; "
        f"scan(load_one({str(good)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
