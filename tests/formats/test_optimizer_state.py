"""Optimizer states beside tied parameters, held against the optimizers of PyTorch that the tied model has itself."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch_files import row_major_bytes

from tieaudit.apply import apply
from tieaudit.change import Plan
from tieaudit.cli import main
from tieaudit.errors import ParityFailed
from tieaudit.formats.torch_checkpoint import adjusting, beside, torch_checkpoint
from tieaudit.formats.torch_checkpoint.write import adjustments
from tieaudit.load import load_one
from tieaudit.plan import Choices
from tieaudit.plan import plan as make_plan
from tieaudit.scan import look
from tieaudit.verify import prove

torch = pytest.importorskip("torch")

N_WORDS, WIDTH, N_STEPS = 30, 8, 6
Optimizer = Callable[[Any], Any]
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "SGD damped": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, dampening=0.3, nesterov=False),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "AdamW, AMSGrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
}
LINEAR = ("exp_avg", "momentum_buffer")
SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@pytest.fixture(autouse=True)
def _proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for every proof costs a second; `test_proving.py` looks at that."""
    stage = importlib.import_module("tieaudit.apply")
    monkeypatch.setattr(stage, "prove_apart", lambda one: prove(one.before, one.after, one.plan, one.written))


class Table(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))


class Language(torch.nn.Module):  # type: ignore[misc, name-defined]
    """An embedding, something between, and a head: tied, or two parameters; the head also as [width, words].

    Tied and turned, the head has no parameter of its own.
    """

    def __init__(self, tied: bool, turned: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(N_WORDS, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.tied, self.turned = tied, turned
        if not tied or not turned:
            self.head = Table(WIDTH, N_WORDS) if turned else Table(N_WORDS, WIDTH)
        if tied and not turned:
            self.head.weight = self.embed.weight
        self.last = Table(N_WORDS)
        self.double()

    def forward(self, words: Any) -> Any:
        matrix = self.embed.weight if self.tied and self.turned else self.head.weight
        return self.norm(self.embed(words)) @ (matrix if matrix.shape[0] == WIDTH else matrix.T) + self.last.weight


def give(tied: Any, untied: Any) -> None:
    """The weights of the tied model for the untied one."""
    table = tied.embed.weight
    untied.load_state_dict({**tied.state_dict(), "head.weight": table.T if untied.turned else table})


def twins(turned: bool = False) -> tuple[Language, Language]:
    """The tied model and the untied one, with the same weights."""
    torch.manual_seed(0)
    tied, untied = Language(True, turned), Language(False, turned)
    give(tied, untied)
    return tied, untied


def one_group(module: Any) -> list[Any]:
    return [{"params": list(module.parameters())}]


def two_groups(module: Any) -> list[Any]:
    found = list(module.parameters())
    return [{"params": found[:3]}, {"params": found[3:], "lr": 0.005}]


def by_decay(module: Any) -> list[Any]:
    """As training scripts sort parameters: matrices, then vectors."""
    found = list(module.parameters())
    matrices, vectors = [one for one in found if one.dim() > 1], [one for one in found if one.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def by_name(module: Any) -> list[Any]:
    """In an order that only the names tell."""
    found = dict(module.named_parameters())
    last = {"last.weight": found.pop("last.weight"), "norm.bias": found.pop("norm.bias")}
    return [{"params": list(reversed(last.items()))}, {"params": list(reversed(found.items()))}]


Groups = Callable[[Any], list[Any]]


def trained(kind: str, groups: Groups = one_group, turned: bool = False) -> tuple[Any, Any, Any]:
    """The untied model with its optimizer, and the tied model's optimizer, after the same steps at equal weights.

    Two parameters stay equal under tying only if their gradients are summed; the untied optimizer sees its own two
    gradients, and the weights that the tied model's optimizer makes of their sum are written into both.
    """
    tied, untied = twins(turned)
    mine, theirs = OPTIMIZERS[kind](groups(tied)), OPTIMIZERS[kind](groups(untied))
    words = torch.Generator().manual_seed(1)
    for _ in range(N_STEPS):
        batch = torch.randint(0, N_WORDS, (12,), generator=words)
        for module, optimizer in ((tied, mine), (untied, theirs)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(batch[:-1]), batch[1:]).backward()
            optimizer.step()
        give(tied, untied)
    return untied, theirs, mine


def zipped(value: Any, path: Path) -> None:
    torch.save(value, path)


def legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def protocol_4(value: Any, path: Path) -> None:
    torch.save(value, path, pickle_protocol=4)


def tie(source: Path, **chosen: Any) -> tuple[Path, Plan]:
    """The tied checkpoint, delivered by `apply`, and its plan."""
    target = source.with_name("tied.ckpt")
    made = make_plan(look(load_one(source)), Choices(**chosen))
    assert made.edits, made.refusals
    apply(load_one(source), made, target)
    return target, made


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def same(a: Any, b: Any) -> bool:
    """Whether two loaded values are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and row_major_bytes(a) == row_major_bytes(b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(one, b[key]) for key, one in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_tied_models_optimizer_takes_the_state_and_finds_its_own_first_moment(tmp_path: Path, kind: str) -> None:
    untied, theirs, mine = trained(kind)
    torch.save({"state_dict": untied.state_dict(), "optimizer": theirs.state_dict()}, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    state, own = load(path)["optimizer"], mine.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3]]
    assert list(state["state"]) == list(own["state"]) == [0, 1, 2, 3]
    before = theirs.state_dict()["state"]
    for number, entry in own["state"].items():
        assert list(entry) == list(state["state"][number])
        for name, value in entry.items():
            found = state["state"][number][name]
            if number == 0 and name in SQUARED:
                assert same(found, before[0][name] + before[3][name])
                if name != "max_exp_avg_sq":
                    assert bool((value <= 2 * found + 1e-300).all())  # (a + b)² ≤ 2 (a² + b²)
            elif isinstance(value, torch.Tensor):
                torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-15)
    # what went on with it: loads, keeps its entry for the one parameter, steps
    tied = Language(True)
    tied.load_state_dict(load(path)["state_dict"])
    optimizer = OPTIMIZERS[kind](one_group(tied))
    optimizer.load_state_dict(state)
    was = tied.embed.weight.detach().clone()
    tied(torch.arange(5)).sum().backward()
    optimizer.step()
    assert bool((tied.embed.weight != was).any()) and bool(tied.embed.weight.isfinite().all())


def _untied_state_is_refused(state: Any, kind: str, groups: Groups) -> None:
    optimizer = OPTIMIZERS[kind](groups(Language(True)))
    with pytest.raises(ValueError, match=r"doesn't match the size"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("save", [zipped, legacy, protocol_4])
@pytest.mark.parametrize("groups", [one_group, two_groups, by_decay, by_name])
def test_every_layout_and_grouping_gives_the_state_of_the_tied_model(tmp_path: Path, save: Any, groups: Groups) -> None:
    untied, theirs, mine = trained("Adam", groups)
    state = theirs.state_dict()
    _untied_state_is_refused(state, "Adam", groups)
    save({"state_dict": untied.state_dict(), "optimizer_states": [state], "epoch": 3}, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    found, own = load(path)["optimizer_states"][0], mine.state_dict()
    assert found["param_groups"] == own["param_groups"]
    assert sorted(found["state"]) == sorted(own["state"])
    for number, entry in own["state"].items():
        torch.testing.assert_close(found["state"][number]["exp_avg"], entry["exp_avg"], rtol=1e-12, atol=1e-15)
        assert same(found["state"][number]["step"], entry["step"])
    OPTIMIZERS["Adam"](groups(Language(True))).load_state_dict(found)


@pytest.mark.parametrize("save", [zipped, legacy])
def test_a_transposed_tie_adds_the_transposed_moment(tmp_path: Path, save: Any) -> None:
    untied, theirs, mine = trained("AdamW, AMSGrad", turned=True)
    save({"state_dict": untied.state_dict(), "optimizer_states": [theirs.state_dict()]}, tmp_path / "m.ckpt")
    path, made = tie(tmp_path / "m.ckpt")
    found, was = load(path)["optimizer_states"][0]["state"][0], theirs.state_dict()["state"]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert same(found[name], was[0][name] + was[3][name].T)
    torch.testing.assert_close(found["exp_avg"], mine.state_dict()["state"][0]["exp_avg"], rtol=1e-12, atol=1e-15)
    assert any("transposed where the tie is" in note for note in made.notes)


def test_three_names_become_one_and_float32_is_rounded_once(tmp_path: Path) -> None:
    table = torch.randn(5, 4)
    parameters = [
        torch.nn.Parameter(one) for one in (torch.randn(3), table, torch.randn(4), table.clone(), table.clone())
    ]
    optimizer = torch.optim.Adam(parameters)
    for one in parameters:
        one.grad = torch.randn_like(one)
    optimizer.step()
    names = ("bias", "a", "norm", "b", "c")
    state = {name: one.detach().clone() for name, one in zip(names, parameters, strict=True)}
    state.update(a=table, b=table.clone(), c=table.clone())
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    found, was = load(path)["optimizer"], optimizer.state_dict()["state"]
    assert found["param_groups"][0]["params"] == [0, 1, 2] and list(found["state"]) == [0, 1, 2]
    total = sum(was[n]["exp_avg"].double() for n in (1, 3, 4))
    assert same(found["state"][1]["exp_avg"], total.float())
    assert same(found["state"][0], was[0]) and same(found["state"][2], was[2])


def test_a_lossy_tie_adds_the_moments_too_and_says_when_that_is_exact(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(N_WORDS, WIDTH), "lm_head": torch.nn.Linear(WIDTH, N_WORDS, bias=False)}
    )
    optimizer = torch.optim.AdamW(module.parameters())
    module["lm_head"](module["embed_tokens"](torch.arange(5))).square().sum().backward()
    optimizer.step()
    torch.save({"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "m.ckpt")
    path, made = tie(tmp_path / "m.ckpt", schemes=("io",), allow_lossy=True, merge="mean")
    found, was = load(path)["optimizer_states"][0], optimizer.state_dict()["state"]
    assert same(found["state"][0]["exp_avg"], was[0]["exp_avg"] + was[1]["exp_avg"]) and list(found["state"]) == [0]
    assert any("if the weights were equal all along" in note for note in made.notes)


def assert_kept(path: Path, value: Any, said: str, **chosen: Any) -> None:
    """The tie is made, the state stays what it was, and the plan says why."""
    before = copy.deepcopy(value)
    torch.save(value, path)
    target, made = tie(path, **chosen)
    found = load(target)
    assert {key: same(found[key], one) for key, one in before.items() if key != "state_dict"} == {
        key: True for key in before if key != "state_dict"
    }
    notes = " ".join(made.notes)
    assert "is kept as it is" in notes and said in notes, notes


def value_of(kind: str = "Adam", groups: Groups = one_group) -> dict[str, Any]:
    untied, theirs, _ = trained(kind, groups)
    return {"state_dict": untied.state_dict(), "optimizer": copy.deepcopy(theirs.state_dict())}


def test_a_name_that_comes_first_turned_stays_turned_and_the_other_moment_is_turned_to_it(tmp_path: Path) -> None:
    table = torch.randn(5, 4)
    parameters = [torch.nn.Parameter(one) for one in (table.T.contiguous(), table)]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    for one in parameters:
        one.grad = torch.randn_like(one)
    optimizer.step()
    state = {name: one.detach() for name, one in zip("ab", parameters, strict=True)}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    found, was = load(path)["optimizer"], optimizer.state_dict()["state"]
    assert found["param_groups"][0]["params"] == [0] and list(found["state"]) == [0]
    assert same(found["state"][0]["momentum_buffer"], was[0]["momentum_buffer"] + was[1]["momentum_buffer"].T)


def test_tying_an_average_leaves_the_optimizer_of_the_model_alone(tmp_path: Path) -> None:
    value = value_of()
    value["ema"] = {name: one.clone() for name, one in value["state_dict"].items()}
    before = copy.deepcopy(value)
    torch.save(value, tmp_path / "m.ckpt")
    model = load_one(tmp_path / "m.ckpt", key="ema")
    made = make_plan(look(model), Choices())
    apply(model, made, tmp_path / "tied.ckpt")
    assert same(load(tmp_path / "tied.ckpt")["optimizer"], before["optimizer"])
    assert any("'state_dict' in the file has parameters of the same shapes" in note for note in made.notes)


def test_one_of_two_models_is_tied_with_its_own_optimizer(tmp_path: Path) -> None:
    value = value_of()
    other = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(3)).sum().backward()
    optimizer.step()
    value = {
        "generator": value["state_dict"],
        "critic": other.state_dict(),
        "optimizer_g": value["optimizer"],
        "optimizer_c": optimizer.state_dict(),
    }
    torch.save(value, tmp_path / "m.ckpt")
    model = load_one(tmp_path / "m.ckpt", key="generator")
    apply(model, make_plan(look(model), Choices()), tmp_path / "tied.ckpt")
    found = load(tmp_path / "tied.ckpt")
    assert found["optimizer_g"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert same(found["optimizer_c"], optimizer.state_dict())


def test_steps_that_differ_keep_the_state(tmp_path: Path) -> None:
    value = value_of()
    value["optimizer"]["state"][3]["step"] += 1
    assert_kept(tmp_path / "m.ckpt", value, "step of parameters 0 and 3 differs")


def test_a_parameter_that_was_never_stepped_keeps_the_state(tmp_path: Path) -> None:
    value = value_of()
    del value["optimizer"]["state"][3]
    assert_kept(tmp_path / "m.ckpt", value, "it never had a gradient")


def test_another_parameter_that_was_never_stepped_is_no_obstacle(tmp_path: Path) -> None:
    value = value_of()
    del value["optimizer"]["state"][1]
    torch.save(value, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    assert list(load(path)["optimizer"]["state"]) == [0, 2, 3]
    assert same(load(path)["optimizer"]["state"][3], value["optimizer"]["state"][4])


def _rename(entry: dict[str, Any], **names: str) -> None:
    for old, new in names.items():
        entry[new] = entry.pop(old)


def _each(value: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    for entry in value["optimizer"]["state"].values():
        change(entry)


def _as_8_bit(entry: dict[str, Any]) -> None:
    entry["exp_avg"] = entry["exp_avg"].to(torch.uint8)


def _nested(value: dict[str, Any]) -> None:
    """Settings that no comparison may follow to their end, in two groups."""
    group = value["optimizer"]["param_groups"][0]
    deep: tuple[Any, ...] = ()
    for _ in range(50):
        deep = (deep,)
    value["optimizer"]["param_groups"] = [{**group, "params": [0, 1, 2]}, {**group, "params": [3, 4]}]
    value["optimizer"]["param_groups"][0]["betas"] = (deep,)
    value["optimizer"]["param_groups"][1]["betas"] = (copy.deepcopy(deep), 1)


UNKNOWN: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "Adafactor": (
        "Adam",
        lambda value: _each(value, lambda entry: _rename(entry, exp_avg_sq="exp_avg_sq_row")),
        "how exp_avg, exp_avg_sq_row, step add up is not known",
    ),
    "a copy of the weights": (
        "Adam",
        lambda value: _each(value, lambda entry: entry.update(master_param=torch.ones(2))),
        "master_param",
    ),
    "8 bits": ("Adam", lambda value: _each(value, _as_8_bit), "exp_avg is no floating-point tensor"),
    "centered RMSprop": (
        "RMSprop",
        lambda value: _each(value, lambda entry: entry.update(grad_avg=entry["square_avg"].clone())),
        "grad_avg, square_avg, step",
    ),
    "RMSprop with momentum": (
        "RMSprop",
        lambda value: _each(value, lambda entry: entry.update(momentum_buffer=entry["square_avg"].clone())),
        "momentum_buffer, square_avg, step",
    ),
    "LARS": (
        "SGD",
        lambda value: value["optimizer"]["param_groups"][0].update(trust_coefficient=0.001),
        "how momentum_buffer add up is not known",
    ),
    "weights by number beside it": (
        "Adam",
        lambda value: value.update(fp32_from_fp16=[[1]]),
        "'fp32_from_fp16' beside it",
    ),
    "more than entries and groups": (
        "Adam",
        lambda value: value["optimizer"].update(loss_scaler=1),
        "it holds more than entries and groups",
    ),
    "other numbers": (
        "Adam",
        lambda value: value["optimizer"]["param_groups"][0].update(params=[9, 1, 2, 3, 4]),
        "not numbered as PyTorch numbers them",
    ),
    "nested settings": ("Adam", _nested, "in two groups with different betas"),
    "names that are none": (
        "Adam",
        lambda value: value["optimizer"]["param_groups"][0].update(param_names=[[], [], [], [], []]),
        "name their parameters in an unusual way",
    ),
    "momentum of one": (
        "SGD",
        lambda value: value["optimizer"]["state"][3].update(momentum_buffer=None),
        "momentum_buffer is no floating-point tensor",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_to_add_is_kept_to_the_bit_and_the_tie_is_made(tmp_path: Path, case: str) -> None:
    kind, change, said = UNKNOWN[case]
    value = value_of(kind)
    change(value)
    assert_kept(tmp_path / "m.ckpt", value, said)


def test_groups_with_different_averages_keep_the_state(tmp_path: Path) -> None:
    value = value_of(groups=two_groups)
    value["optimizer"]["param_groups"][1]["betas"] = (0.8, 0.999)
    assert_kept(tmp_path / "m.ckpt", value, "in two groups with different betas")


def test_the_user_can_have_the_state_kept(tmp_path: Path) -> None:
    assert_kept(tmp_path / "m.ckpt", value_of(), "load_state_dict refuses it", optimizer="keep")


def test_a_state_whose_orders_cannot_be_told_apart_is_kept(tmp_path: Path) -> None:
    """Nothing was stepped, so that no shape says whether groups are in the model's order or sorted."""
    value = value_of(groups=by_decay)
    value["optimizer"]["state"] = {}
    assert_kept(tmp_path / "m.ckpt", value, "which of its entries are whose cannot be told")


def test_a_moment_that_is_kept_elsewhere_too_is_not_changed_there(tmp_path: Path) -> None:
    value = value_of()
    value["picture"] = value["optimizer"]["state"][0]["exp_avg"]
    assert_kept(tmp_path / "m.ckpt", value, "kept elsewhere too")


def test_an_optimizer_that_keeps_nothing_is_only_renumbered(tmp_path: Path) -> None:
    for held in ({}, {n: {"momentum_buffer": None} for n in range(5)}):
        value = value_of("SGD")
        value["optimizer"]["state"] = held
        torch.save(value, tmp_path / "m.ckpt")
        path, _ = tie(tmp_path / "m.ckpt")
        found = load(path)["optimizer"]
        assert found["param_groups"][0]["params"] == [0, 1, 2, 3]
        assert list(found["state"]) == [n for n in range(4) if held]
        path.unlink()
        path.with_name(path.name + ".receipt.json").unlink()


def test_more_than_a_thousand_parameters_are_renumbered(tmp_path: Path) -> None:
    """Pickles put lists and dictionaries together in batches of a thousand."""
    table = torch.randn(3, 2)
    parameters = [torch.nn.Parameter(torch.full((1,), float(n))) for n in range(1100)]
    parameters[5], parameters[900] = torch.nn.Parameter(table), torch.nn.Parameter(table.clone())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.5)
    for n, one in enumerate(parameters):
        one.grad = torch.full_like(one, float(n))
    optimizer.step()
    state = {f"w{n}": one.detach() for n, one in enumerate(parameters)}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.ckpt")
    path, _ = tie(tmp_path / "m.ckpt")
    found = load(path)["optimizer"]
    assert found["param_groups"][0]["params"] == list(range(1099))
    numbers = [float(entry["momentum_buffer"].flatten()[0]) for entry in found["state"].values()]
    assert numbers == [0.0, 1, 2, 3, 4, 905.0, *range(6, 900), *range(901, 1100)]


def test_weight_decay_in_the_gradient_is_named_and_decoupled_decay_is_not(tmp_path: Path) -> None:
    for kind, expected in ((torch.optim.Adam, True), (torch.optim.AdamW, False)):
        _, untied = twins()
        optimizer = kind(untied.parameters(), weight_decay=0.01)
        untied(torch.arange(5)).sum().backward()
        state = {name: one.clone() for name, one in untied.state_dict().items()}
        optimizer.step()
        torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.ckpt")
        made = make_plan(look(load_one(tmp_path / "m.ckpt")), Choices())
        assert any("is adjusted to the 4 parameters" in note for note in made.notes)
        assert any("the sums hold it twice" in note for note in made.notes) is expected


@pytest.mark.parametrize("wrong", ["values", "numbers", "entry"])
def test_a_state_that_was_adjusted_wrongly_fails_the_structural_proof(
    tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(value_of(), tmp_path / "m.ckpt")
    if wrong == "values":
        monkeypatch.setattr(
            adjusting.Summed, "_sum", lambda one, begin, end: one.parts[1].read_ranges([(begin, end - begin)])[0]
        )
    elif wrong == "numbers":
        monkeypatch.setattr(adjusting, "integer", lambda number: b"K" + bytes([number ^ 1]))
    else:
        monkeypatch.setattr(adjusting._Splicing, "_add", lambda one, join, name: None)
    with pytest.raises(ParityFailed) as failed:
        tie(tmp_path / "m.ckpt")
    assert "not named by the plan" in str(failed.value) or "optimizer" in str(failed.value)
    assert not (tmp_path / "tied.ckpt").exists()


def _swap_names(state: Any) -> None:
    names = state["param_groups"][1]["param_names"]
    names[0], names[1] = names[1], names[0]


def _swap_entries(state: Any) -> None:
    state["state"][2], state["state"][3] = state["state"][3], state["state"][2]


WRONG: dict[str, Callable[[Any], object]] = {
    "names": _swap_names,
    "parameters": lambda state: state["param_groups"][0].update(params=[1, 0]),
    "entries": _swap_entries,
    "order": lambda state: state["state"].update({0: state["state"].pop(0)}),
    "a missing entry": lambda state: state["state"].pop(1),
    "a setting": lambda state: state["param_groups"][0].update(lr=0.5),
    "a step": lambda state: state["state"][3]["step"].add_(1),
    "another moment": lambda state: state["state"][1]["exp_avg"].add_(1),
    "a sum": lambda state: state["state"][3]["exp_avg"][-1, -1].mul_(1 + 1e-15),
    "a square": lambda state: state["state"][3]["exp_avg_sq"][0, 0].neg_(),
    "more": lambda state: state.update(more=1),
}


@pytest.mark.parametrize("wrong", ["", *WRONG])
def test_the_proof_sees_every_part_of_a_state_that_is_not_as_planned(tmp_path: Path, wrong: str) -> None:
    value = value_of(groups=by_name)
    torch.save(value, tmp_path / "m.ckpt")
    path, made = tie(tmp_path / "m.ckpt")
    found = load(path)
    assert found["optimizer"]["param_groups"][1]["params"] == [2, 3]
    if wrong:
        WRONG[wrong](found["optimizer"])
    torch.save(found, tmp_path / "other.ckpt")
    planned = adjustments(load_one(tmp_path / "m.ckpt"), made)[tmp_path / "m.ckpt"]
    files = (tmp_path / "m.ckpt", tmp_path / "other.ckpt")
    assert bool(beside.differences(*files, "", frozenset(), frozenset(), lambda: planned)) is bool(wrong)
    assert beside.differences(*files, "", frozenset(), frozenset())  # what no plan names may not change


def test_the_receipt_and_the_command_line_tell_what_was_summed(tmp_path: Path) -> None:
    torch.save(value_of(), tmp_path / "m.ckpt")
    done = CliRunner().invoke(main, ["apply", str(tmp_path / "m.ckpt"), "--to", str(tmp_path / "o.ckpt")])
    assert done.exit_code == 0, done.output
    receipt = json.loads((tmp_path / "o.ckpt.receipt.json").read_text())
    said = " ".join(json.dumps(receipt, ensure_ascii=False).split())
    assert "of its 5 entries 0 and 3 become one" in said and "2·g₁·g₂" in said
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "m.ckpt"), "--optimizer", "keep"])
    assert "--optimizer keep --to OUT" in " ".join(planned.output.split())


def test_the_format_says_what_becomes_of_a_state(tmp_path: Path) -> None:
    torch.save(value_of(), tmp_path / "m.ckpt")
    model = load_one(tmp_path / "m.ckpt")
    made = make_plan(look(model), Choices())
    assert torch_checkpoint.notes is not None
    assert "is adjusted" in torch_checkpoint.notes(model, made.edits, True)[0]
    assert "does not fit" in torch_checkpoint.notes(model, made.edits, False)[0]
    assert torch_checkpoint.notes(model, (), True) == ()
