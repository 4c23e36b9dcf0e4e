"""Calibration from the command line: what is measured in child processes, against direct runs of the same models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from tieaudit.calibrating import calibrate, members_of, read_data
from tieaudit.cli import main
from tieaudit.errors import TieAuditError
from tieaudit.load import load_one
from tieaudit.losses import paired
from tieaudit.merges import Calibrated, Statistics
from tieaudit.runners import Port, Signature
from tieaudit.scan import look
from tieaudit.summing import IGNORED, token_losses
from tieaudit.tokens import Tokens, completed, from_archive, from_ids

Array = NDArray[Any]
V, D = 60, 16
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (6, 10))


def run(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(main, [*map(str, words)])
    return found.exit_code, found.output


def told(*words: object) -> dict[str, Any]:
    code, output = run(*words, "--format", "json")
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    return found


def losses(scores: Array, ids: Array) -> Array:
    """−log p of the next id at every place but the last, by the definition."""
    p = np.exp(scores.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p[:, :-1], ids[:, 1:, None], -1)).reshape(-1)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npz"
    np.savez(path, input_ids=IDS)
    return path


# ------------------------------------------------------------------------------------------- ONNX


TABLES = {
    "e": RNG.standard_normal((V, D)).astype(np.float32),
    "w1": (RNG.standard_normal((D, D)) / 4).astype(np.float32),
    "w2": (RNG.standard_normal((D, D)) / 4).astype(np.float32),
    "u": (RNG.standard_normal((D, V)) / 2).astype(np.float32),
}


def forward(tables: dict[str, Array], ids: Array) -> dict[str, Array]:
    """The model below, by hand: two layers of tanh between a lookup and a head."""
    h0 = tables["e"][ids]
    h1 = np.tanh(h0 @ tables["w1"])
    h2 = np.tanh(h1 @ tables["w2"])
    return {"h0": h0, "h1": h1, "h2": h2, "logits": h2 @ tables["u"]}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gather", ["e", "input_ids"], ["h0"]),
        helper.make_node("MatMul", ["h0", "w1"], ["layers.0.out"]),
        helper.make_node("Tanh", ["layers.0.out"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["layers.1.out"]),
        helper.make_node("Tanh", ["layers.1.out"], ["h2"]),
        helper.make_node("MatMul", ["h2", "u"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", V])],
        [numpy_helper.from_array(table, name) for name, table in TABLES.items()],
    )
    path = tmp_path_factory.mktemp("graph") / "lm.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def of_graph(path: Path, data: Path) -> Calibrated:
    subject = look(load_one(str(path)))
    return calibrate(subject, read_data(subject, data, None, "cpu"), ["u", "e", "w1", "w2"], "cpu")


def test_the_sums_of_an_onnx_model_are_those_of_a_run_by_hand(graph: Path, ids: Path) -> None:
    found = of_graph(graph, ids)
    for half, rows in ((found.fitted, IDS[0::2]), (found.held_out, IDS[1::2])):
        seen = forward(TABLES, rows)
        rows, seen = rows[:, :-1], {name: one[:, :-1] for name, one in seen.items()}  # nothing is predicted behind
        n = rows.size
        assert {id: one.n_tokens for id, one in half.items()} == dict.fromkeys(("u", "e", "w1", "w2"), n)
        assert half["e"].row_weights == pytest.approx(np.bincount(rows.ravel(), minlength=V) / n)
        for id, name in (("w1", "h0"), ("w2", "h1"), ("u", "h2")):
            x = seen[name].reshape(n, D).astype(np.float64)
            assert half[id].inputs == pytest.approx(x.T @ x / n, abs=1e-5)
            assert half[id].turned  # stored as [inputs, outputs]
        p = np.exp(seen["logits"].astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        assert half["u"].row_weights == pytest.approx((p * (1 - p)).reshape(n, V).mean(0), abs=1e-6)
        assert half["e"].gradients is None and half["w1"].row_weights is None and not half["e"].turned
    assert any("ONNX Runtime computes no gradients" in note for note in found.notes)


def test_a_head_of_a_graph_has_the_probabilities_behind_its_scale_and_bias_and_padding_does_not_count(
    graph: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load(graph)
    bias = np.where(np.arange(V) == 7, 4.0, 0.0).astype(np.float32)
    proto.graph.node[-1].output[0] = "raw"
    proto.graph.node.append(helper.make_node("Mul", ["raw", "c"], ["scaled"]))
    proto.graph.node.append(helper.make_node("Add", ["b", "scaled"], ["logits"]))
    proto.graph.initializer.extend(
        numpy_helper.from_array(one, name) for name, one in (("c", np.float32(0.25)), ("b", bias))
    )
    proto.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]))
    proto.graph.node.append(helper.make_node("Identity", ["attention_mask"], ["seen"]))
    proto.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.INT64, ["batch", "length"]))
    onnx.save(proto, tmp_path / "scaled.onnx")
    mask = (np.arange(10) < np.array([[10], [4], [7], [10], [10], [2]])).astype(np.int64)
    np.savez(tmp_path / "x.npz", input_ids=np.where(mask == 1, IDS, 0), attention_mask=mask)
    found = of_graph(tmp_path / "scaled.onnx", tmp_path / "x.npz").fitted
    rows, counted = IDS[0::2], mask[0::2, 1:].astype(bool)  # a place counts if the next one is there to be predicted
    seen = forward(TABLES, rows)
    p = np.exp(0.25 * seen["logits"].astype(np.float64) + bias)
    p = (p / p.sum(-1, keepdims=True))[:, :-1][counted]
    assert {one.n_tokens for one in found.values()} == {counted.sum()} == {9 + 6 + 9}
    assert found["e"].row_weights == pytest.approx(np.bincount(rows[:, :-1][counted], minlength=V) / 24)
    assert found["u"].row_weights == pytest.approx((p * (1 - p)).mean(0) / 16, rel=1e-3, abs=1e-7)
    x = seen["h2"][:, :-1][counted].astype(float)
    assert found["u"].inputs == pytest.approx(x.T @ x / 24, abs=1e-5)


def test_the_copy_with_more_outputs_is_gone_afterwards_and_the_model_is_as_it_was(graph: Path, ids: Path) -> None:
    before = graph.read_bytes()
    of_graph(graph, ids)
    assert graph.read_bytes() == before and [one.name for one in graph.parent.iterdir()] == ["lm.onnx"]


def test_the_loss_before_and_after_is_that_of_both_models_token_by_token(
    graph: Path, ids: Path, tmp_path: Path
) -> None:
    words = ("--scheme", "io", "--allow-lossy", "--merge", "keep:head", "--calibrate", ids, "--device", "cpu")
    done = told("apply", graph, *words, "--to", tmp_path / "tied.onnx")
    held = IDS[1::2]
    before = losses(forward(TABLES, held)["logits"], held)
    after = losses(forward({**TABLES, "e": TABLES["u"].T}, held)["logits"], held)
    d = after - before
    loss = done["proof"]["facts"]["loss"]
    assert loss["n_tokens"] == 27 and loss["held_out"]  # 3 of 6 rows, 9 of their 10 places
    assert loss["before"] == pytest.approx(before.mean(), rel=1e-5)
    assert loss["after"] == pytest.approx(after.mean(), rel=1e-5)
    assert loss["rise"] == pytest.approx(d.mean(), rel=1e-4)
    assert loss["standard_error"] == pytest.approx(np.sqrt(((d - d.mean()) ** 2).sum() / 26 / 27), rel=1e-4)
    apart = np.sqrt(before.var(ddof=1) / 27 + after.var(ddof=1) / 27)  # the tempting one: means taken apart
    assert loss["standard_error"] != pytest.approx(apart, rel=0.01)

    (prediction,) = done["plan"]["predictions"]
    # the head keeps its values: nothing of it changes; of the embedding Σ p‖u − e‖² / Σ p‖e‖² over what was looked up
    held = held[:, :-1]
    seen_after, seen_before = TABLES["u"].T[held].astype(float), TABLES["e"][held].astype(float)
    expected = np.square(seen_after - seen_before).sum() / np.square(seen_before).sum()
    assert dict(zip(prediction["ids"], prediction["errors"], strict=True)) == {"e": pytest.approx(expected), "u": 0.0}
    assert prediction["nats"] is None and prediction["n_tokens"] == 27


def test_a_plan_measures_what_it_cannot_predict_with_a_copy_that_is_gone_afterwards(graph: Path, ids: Path) -> None:
    words = ("--scheme", "io", "--allow-lossy", "--merge", "keep:head", "--calibrate", ids, "--device", "cpu")
    loss = told("plan", graph, *words)["plan"]["loss"]
    held = IDS[1::2]
    before = losses(forward(TABLES, held)["logits"], held)
    d = losses(forward({**TABLES, "e": TABLES["u"].T}, held)["logits"], held) - before
    assert (loss["before"], loss["rise"]) == pytest.approx((before.mean(), d.mean()), rel=1e-4)
    assert loss["standard_error"] == pytest.approx(d.std(ddof=1) / np.sqrt(27), rel=1e-4)
    assert loss["n_tokens"] == 27 and loss["held_out"]
    assert [one.name for one in graph.parent.iterdir()] == ["lm.onnx"]
    said = run("plan", graph, *words)[1]
    assert "measured on calibration data, with a temporary copy:" in said and f"ΔNLL {d.mean():+.3g} ±" in said


def test_the_table_of_an_onnx_model_has_the_loss_of_every_choice_and_a_frontier_of_all(graph: Path, ids: Path) -> None:
    found = told("plan", graph, "--calibrate", ids, "--device", "cpu")["choices"]
    held = IDS[1::2]
    before = losses(forward(TABLES, held)["logits"], held).mean()
    both = (TABLES["e"] + TABLES["u"].T) / 2
    known = {("io", "mean"): {"e": both, "u": both.T}, ("io", "keep:head"): {"e": TABLES["u"].T}}
    measured = {(one["scheme"], one["policy"]): one["measured"] for one in found}
    for choice, changed in known.items():
        after = losses(forward({**TABLES, **changed}, held)["logits"], held).mean()
        assert measured[choice] == pytest.approx(after - before, rel=1e-3, abs=1e-5), choice
    assert all(one["measured"] is not None or one["nats"] is not None for one in found)
    best = told("plan", graph, "--calibrate", ids, "--device", "cpu", "--frontier")["choices"]
    costs = [one["nats"] if one["measured"] is None else one["measured"] for one in (*best, *found)]
    assert costs[0] == min(costs)  # and not the best of those alone that leave the embedding as it is
    assert any(one["measured"] is not None for one in best)


def test_a_large_model_is_not_tried_out_for_a_table(graph: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tieaudit.trial.N_MOST_STEPS", 20_000)
    code, said = run("plan", graph, "--calibrate", ids, "--device", "cpu")
    assert code == 0 and "is not measured: the model is large" in said and ", measured" not in said


def test_an_exported_program_has_its_loss_measured_and_fits_no_policy(tmp_path: Path, ids: Path) -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.e, self.u = torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False)
            with torch.no_grad():
                self.e.weight.copy_(torch.from_numpy(TABLES["e"]))
                self.u.weight.copy_(torch.from_numpy(TABLES["u"].T.copy()))

        def forward(self, input_ids: Any) -> Any:
            return self.u(torch.tanh(self.e(input_ids)))

    shapes = {"input_ids": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(Net(), (torch.from_numpy(IDS),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    words = ("--scheme", "io", "--allow-lossy", "--calibrate", ids, "--device", "cpu")
    loss = told("plan", tmp_path / "net.pt2", *words, "--merge", "keep:head")["plan"]["loss"]
    held = IDS[1::2]
    before, after = (losses(np.tanh(table[held]) @ TABLES["u"], held) for table in (TABLES["e"], TABLES["u"].T))
    assert (loss["before"], loss["after"]) == pytest.approx((before.mean(), after.mean()), rel=1e-4)
    code, said = run("plan", tmp_path / "net.pt2", *words, "--merge", "gauss-newton")
    assert code == 2 and "expected token counts and the hidden states" in said and "found none" in said


def test_text_output_says_what_was_predicted_and_what_happened(graph: Path, ids: Path, tmp_path: Path) -> None:
    words = ("--scheme", "io", "--allow-lossy", "--merge", "auto", "--calibrate", ids, "--device", "cpu")
    code, said = run("apply", graph, *words, "--to", tmp_path / "tied.onnx")
    assert code == 0, said
    assert "without gradients gauss-newton is taken" in said
    assert "predicted from 27 tokens" in said and "loss not predicted" in said
    assert "loss on 27 tokens held out of the fit" in said and "(paired standard error)" in said


def test_regmean_of_matrices_stored_as_inputs_by_outputs_is_its_formula(graph: Path, ids: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.toml"
    groups.write_text('[[group]]\nmatch = ["w?"]\n', encoding="utf-8")
    words = (f"--scheme=custom:{groups}", "--allow-lossy", "--merge", "regmean", "--calibrate", ids, "--device", "cpu")
    done = told("apply", graph, *words, "--to", tmp_path / "tied.onnx")
    # W = (Σ C̃)⁻¹ (Σ C̃ Wᵢ) for y = x·W, with C̃ = 0.9·C + 0.1·diag C, from the rows that are not held out
    seen = forward(TABLES, IDS[0::2, :-1])
    moments = [seen[name].reshape(-1, D).astype(float) for name in ("h0", "h1")]
    energy = np.mean([np.square(x).sum() for x in moments]) / D
    damped = [0.9 * (x.T @ x) + 0.1 * np.diag(np.diag(x.T @ x)) + 1e-3 * energy * np.eye(D) for x in moments]
    expected = np.linalg.solve(sum(damped), sum(c @ TABLES[w] for c, w in zip(damped, ("w1", "w2"), strict=True)))
    after = load_one(str(tmp_path / "tied.onnx"))
    stored = next(weight for weight in after.weights if weight.name in ("w1", "w2"))
    assert stored.storage is not None
    value = np.frombuffer(stored.storage.read_ranges([(0, stored.n_bytes)])[0], np.float32).reshape(D, D)
    assert np.allclose(value, expected, atol=1e-5)
    (prediction,) = done["plan"]["predictions"]
    held = forward(TABLES, IDS[1::2, :-1])
    for error, name, table in zip(prediction["errors"], ("h0", "h1"), ("w1", "w2"), strict=True):
        x = held[name].reshape(-1, D).astype(float)
        share = np.square(x @ expected - x @ TABLES[table]).sum() / np.square(x @ TABLES[table]).sum()
        assert error == pytest.approx(share, rel=1e-3)


def test_labels_of_the_user_are_what_is_predicted(graph: Path, tmp_path: Path) -> None:
    labels = np.full(IDS.shape, IGNORED)
    labels[:, 4] = 7
    np.savez(tmp_path / "x.npz", input_ids=IDS, labels=labels)
    subject = look(load_one(str(graph)))
    data = read_data(subject, tmp_path / "x.npz", None, "cpu")
    from tieaudit.losses import change_of_loss

    found = change_of_loss(subject.model, subject.model, data, "cpu")
    scores = forward(TABLES, IDS[1::2])["logits"][:, 4].astype(float)
    expected = np.mean(np.log(np.exp(scores).sum(-1)) - scores[:, 7])
    assert not isinstance(found, str) and (found.n_tokens, found.rise, found.standard_error) == (3, 0.0, 0.0)
    assert found.before == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def test_the_sums_of_a_folder_are_those_of_a_direct_run(llama: Path, ids: Path) -> None:
    import torch

    subject = look(load_one(str(llama)))
    data = read_data(subject, ids, None, "cpu")
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight")
    norm = "model.norm.weight"
    found = calibrate(subject, data, [*names, norm], "cpu")
    module = loaded(llama)
    for half, rows in ((found.fitted, IDS[0::2]), (found.held_out, IDS[1::2])):
        tokens = torch.from_numpy(rows)
        vectors = module.model.embed_tokens(tokens).detach().requires_grad_()
        kept: dict[str, Any] = {}
        up = module.model.layers[1].mlp.up_proj
        hook = up.register_forward_hook(lambda one, args, out, kept=kept: kept.update(x=args[0], out=out))
        result = module(inputs_embeds=vectors, output_hidden_states=True)
        hook.remove()
        scores = result.logits
        total = torch.nn.functional.cross_entropy(
            scores[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1), reduction="sum"
        )
        last = result.hidden_states[-1]
        g, g_up, g_last = torch.autograd.grad(total, [vectors, kept["out"], last])
        rows, n = rows[:, :-1], rows[:, :-1].size  # nothing is predicted from the last places
        g, g_up, scores = g[:, :-1], g_up[:, :-1], scores[:, :-1]
        lookup, head, inner = (half[name] for name in names)
        assert lookup.row_weights == pytest.approx(np.bincount(rows.ravel(), minlength=V) / n)
        flat = g.reshape(n, D).double().numpy()
        assert lookup.gradients == pytest.approx(flat.T @ flat / n, rel=1e-3, abs=1e-6)
        h = result.hidden_states[-1][:, :-1].detach().reshape(n, D).double().numpy()
        assert head.inputs == pytest.approx(h.T @ h / n, rel=1e-3, abs=1e-5)
        p = torch.softmax(scores.detach().double(), -1).reshape(n, V).numpy()
        assert head.row_weights == pytest.approx((p * (1 - p)).mean(0), rel=1e-3, abs=1e-7)
        x = kept["x"][:, :-1].detach().reshape(n, D).double().numpy()
        assert inner.inputs == pytest.approx(x.T @ x / n, rel=1e-3, abs=1e-5)
        assert inner.row_weights == pytest.approx(np.square(g_up.reshape(n, -1).double().numpy()).mean(0), rel=1e-3)
        # of γ·n with γ = 1, as a fresh norm has it, the derivative by γ is n, which is what comes out
        squares = np.square((g_last * last)[:, :-1].detach().reshape(n, D).double().numpy())
        assert half[norm].row_weights == pytest.approx(squares.mean(0), rel=1e-3)


def test_what_a_tie_costs_a_folder_is_predicted_measured_and_reported(llama: Path, ids: Path, tmp_path: Path) -> None:
    import torch

    words = ("--scheme", "io", "--allow-lossy", "--merge", "gauss-newton", "--calibrate", ids, "--device", "cpu")
    done = told("apply", llama, *words, "--to", tmp_path / "tied")
    held = torch.from_numpy(IDS[1::2])
    both = []
    for path in (llama, tmp_path / "tied"):
        with torch.no_grad():
            both.append(losses(loaded(path)(held).logits.numpy(), IDS[1::2]))
    d = both[1] - both[0]
    loss = done["proof"]["facts"]["loss"]
    assert (loss["before"], loss["after"]) == pytest.approx((both[0].mean(), both[1].mean()), rel=1e-5)
    assert loss["rise"] == pytest.approx(d.mean(), rel=1e-3)
    assert loss["standard_error"] == pytest.approx(d.std(ddof=1) / np.sqrt(len(d)), rel=1e-3)
    (prediction,) = done["plan"]["predictions"]
    assert prediction["nats"] > 0.0 and None not in prediction["errors"]
    schema = json.loads((Path(__file__).parent.parent / "docs/schema/apply-1.schema.json").read_text(encoding="utf-8"))
    import jsonschema

    jsonschema.validate(done, schema)


def test_the_table_of_all_schemes_is_in_nats_where_the_loss_can_be_predicted(llama: Path, ids: Path) -> None:
    found = {(one["scheme"], one["policy"]): one["nats"] for one in told(
        "plan", llama, "--calibrate", ids, "--device", "cpu"
    )["choices"]}  # fmt: skip
    assert {"gauss-newton", "frequency"} <= {policy for scheme, policy in found if scheme == "io"}
    assert all(nats > 0.0 for (scheme, _), nats in found.items() if scheme == "io")
    # of all linear layers, too: E[g²] and E[x xᵀ]; fresh norms are equal, so that sharing them adds nothing
    assert 0.0 < found["albert:ffn", "mean"] < found["albert", "mean"]
    both = found["albert:ffn", "mean"] + found["albert:attention", "mean"]
    assert found["albert", "mean"] == pytest.approx(both)


def test_a_layer_that_keeps_its_weight_the_other_way_round_is_told_by_what_it_computes(
    tmp_path: Path, ids: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=16, n_inner=D)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    subject = look(load_one(str(tmp_path / "gpt")))
    name = next(w.id for w in subject.model.weights if w.name.endswith("h.1.mlp.c_fc.weight"))
    found = calibrate(subject, read_data(subject, ids, None, "cpu"), [name], "cpu").fitted[name]
    assert found.turned and found.inputs is not None and found.row_weights is not None


def test_a_model_that_sees_later_tokens_is_given_no_next_token_to_predict(tmp_path: Path, ids: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    subject = look(load_one(str(tmp_path / "bert")))
    data = read_data(subject, ids, None, "cpu")
    assert data.tokens.targets is None and any("move with later ids" in note for note in data.tokens.notes)
    labels = np.where(RNG.random(IDS.shape) < 0.3, IDS, IGNORED)
    shown = np.where(labels == IGNORED, IDS, 1)  # what is to be predicted is masked
    np.savez(tmp_path / "x.npz", input_ids=shown, labels=labels)
    given = read_data(subject, tmp_path / "x.npz", None, "cpu")
    assert given.tokens.given and (given.tokens.targets == labels).all()


# ------------------------------------------------------------------------------------------- text


def make_tokenizer(folder: Path, n: int) -> dict[str, int]:
    """One token for each word."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    known = {f"w{index}": index for index in range(n - 1)} | {"[UNK]": n - 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return known


def test_a_text_becomes_rows_of_the_ids_of_its_tokenizer(graph: Path, tmp_path: Path) -> None:
    known = make_tokenizer(tmp_path / "tokenizer", V)
    words = [f"w{n}" for n in RNG.integers(0, V - 1, 300)]
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    subject = look(load_one(str(graph)))
    data = read_data(subject, tmp_path / "text.txt", tmp_path / "tokenizer", "cpu")
    expected = np.array([known[word] for word in words[:256]]).reshape(2, 128)  # 300 // 128 whole rows
    assert (data.tokens.arrays["input_ids"] == expected).all()
    assert data.tokens.targets is not None and (data.tokens.targets[:, :-1] == expected[:, 1:]).all()


def test_a_tokenizer_of_another_model_is_refused(graph: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", V + 50)
    (tmp_path / "text.txt").write_text("w1 w2 w105 " * 60, encoding="utf-8")
    words = ("--calibrate", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer", "--device", "cpu")
    code, said = run("plan", graph, *words)
    assert code == 2 and "is it this model's?" in said and "105 at [0, 2]" in said
    code, said = run("plan", graph, "--calibrate", tmp_path / "text.txt", "--device", "cpu")
    assert code == 2 and "expected the files of a tokenizer, found none; give --tokenizer DIR" in said
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00 not a text" * 40)
    code, said = run("plan", graph, *words)
    assert code == 2 and "makes no ids of it" in said and "Traceback" not in said


# --------------------------------------------------------------------------------------- refusals


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/tieaudit-was-executed").touch, ())


REFUSED = {
    "pickled objects": ({"input_ids": np.array([Pickled()], dtype=object)}, "without objects"),
    "ids beyond the vocabulary": ({"input_ids": np.array([[1, 2], [3, V]])}, f"{V} at [1, 1]"),
    "negative ids": ({"input_ids": np.array([[1, -1]])}, "-1 at [0, 1]"),
    "numbers that are no ids": ({"input_ids": np.ones((2, 3))}, "expected integers, found float64"),
    "an unknown name": ({"input_ids": IDS, "pixels": IDS}, "found 'pixels'"),
    "nothing": ({}, "found none"),
    "no rows": ({"input_ids": np.zeros((0, 4), int)}, "at least one"),
    "labels of another shape": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels: expected integers [6, 10]"),
    "labels that are the ids": ({"input_ids": IDS, "labels": IDS}, "found the ids themselves"),
    "labels that are none": ({"input_ids": IDS, "labels": np.full(IDS.shape, -100)}, "at least one that is not -100"),
    "too short a text": ({"input_ids": np.array([3])}, "expected at least 2 tokens, found 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_does_not_fit_is_refused_in_one_line(name: str, graph: Path, tmp_path: Path) -> None:
    arrays, expected = REFUSED[name]
    np.savez(tmp_path / "x.npz", **arrays)
    signature = Signature((Port("input_ids", "int64", ("batch", "length"), V),), ())
    with pytest.raises(TieAuditError) as caught:
        from_archive(tmp_path / "x.npz", signature)
    assert expected in str(caught.value) and "x.npz" in str(caught.value)
    assert not Path("/tmp/tieaudit-was-executed").exists()


def test_models_that_cannot_be_run_on_data_are_refused(graph: Path, ids: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(TABLES, tmp_path / "model.safetensors")
    code, said = run("plan", tmp_path / "model.safetensors", "--calibrate", ids)
    assert code == 2 and "found weights alone (safetensors)" in said
    code, said = run("plan", graph, "--tokenizer", tmp_path)
    assert code == 2 and "expected --calibrate TEXT with --tokenizer" in said
    code, said = run("plan", graph, "--calibrate", tmp_path / "none.txt")
    assert code == 2 and "expected an .npz or a text, found nothing" in said


def test_a_missing_package_is_named(llama: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else usual(name))
    subject = look(load_one(str(llama)))
    with pytest.raises(TieAuditError, match="needs the package transformers"):
        read_data(subject, ids, None)


def test_a_model_without_tokens_takes_no_text_but_its_own_inputs(tmp_path: Path) -> None:
    signature = Signature((Port("pixels", "float32", ("batch", 3, 4, 4)),), ())
    np.savez(tmp_path / "x.npz", pixels=np.ones((5, 3, 4, 4)))
    found = from_archive(tmp_path / "x.npz", signature)
    assert found.targets is None and found.n_rows == 5


# ----------------------------------------------------------------------------------- small pieces


def test_the_paired_error_is_that_of_the_differences() -> None:
    # d = ½, ½, 1½: mean 5/6, Σ(d − d̄)² = 1/9 + 1/9 + 4/9 = 2/3, s² = 1/3, SE = √(1/3)/√3 = 1/3
    found = paired(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.5, 4.5]), held_out=True)
    assert (found.rise, found.standard_error) == pytest.approx((5 / 6, 1 / 3))
    assert (found.before, found.after, found.n_tokens) == pytest.approx((2.0, 17 / 6, 3))
    assert np.isnan(paired(np.ones(1), np.ones(1), held_out=True).standard_error)
    with pytest.raises(ValueError, match="found 2 and 1"):
        paired(np.ones(2), np.ones(1), held_out=True)


def test_what_a_mask_hides_is_not_predicted() -> None:
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    signature = Signature(tuple(Port(name, "int64", ("b", "s"), None) for name in ("input_ids", "attention_mask")), ())
    path = Path("x.npz")
    from tieaudit.tokens import _next

    found = _next("input_ids", np.array([[5, 6, 7, 8], [5, 6, 7, 8]]), {"attention_mask": mask})
    assert found is not None and found.tolist() == [[6, 7, IGNORED, IGNORED], [IGNORED, 7, 8, IGNORED]]
    made = completed(Tokens({"input_ids": np.ones((2, 4), int)}, None, False, str(path)), signature)
    assert made["attention_mask"].tolist() == [[1] * 4] * 2


def test_an_input_that_does_not_follow_from_the_others_must_be_given() -> None:
    ports = (Port("input_ids", "int64", ("b", "s"), 9), Port("pixels", "float32", ("b", 3)))
    with pytest.raises(TieAuditError, match="expected the model's input pixels as well"):
        completed(Tokens({"input_ids": np.ones((2, 4), int)}, None, False, "x.npz"), Signature(ports, ()))


def test_a_long_text_is_cut_into_rows_behind_its_first_token() -> None:
    found = from_ids(np.arange(20), Port("input_ids", "int64", ("b", "s"), 60), "t", first=50, length=8)
    assert found.arrays["input_ids"].tolist() == [[50, *range(7)], [50, *range(7, 14)]]
    fitted, held = found.halves()
    assert held is not None and (fitted.n_rows, held.n_rows) == (1, 1)
    assert fitted.halves()[1] is None


def test_the_loss_of_a_token_is_stable_for_large_scores() -> None:
    scores = np.array([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    # row 0: log(e¹⁰⁰⁰ + …) − 0 = 1000, which overflows without the maximum taken off; row 1: log 3
    assert token_losses(scores, np.array([1, 2])) == pytest.approx([1000.0, np.log(3.0)])
    assert token_losses(scores, np.array([IGNORED, 0])) == pytest.approx([np.log(3.0)])
    with pytest.raises(ValueError, match="target 3 has no score"):
        token_losses(scores, np.array([3, 0]))


def test_members_are_asked_of_the_schemes_heads_and_embeddings_first(graph: Path) -> None:
    subject = look(load_one(str(graph)))
    assert members_of(subject, ["io"]) == ("u", "e")
    assert members_of(subject, ["dedup"]) == ()
    assert set(members_of(subject, [])) >= {"u", "e"}


def test_statistics_of_a_member_that_is_used_the_other_way_round_do_not_count() -> None:
    from tieaudit.merge import sites_of
    from tieaudit.model import Member, Weight
    from tieaudit.storage import MemoryStorage
    from tieaudit.view import TRANSPOSED

    data = TABLES["w1"].tobytes()
    weights = [(Weight(name, name, (D, D), "float32", MemoryStorage(data, name)), member)
               for name, member in (("a", Member("a")), ("b", Member("b", TRANSPOSED)))]  # fmt: skip
    one = Statistics(1, inputs=np.eye(D))
    plain = sites_of(weights, {}, Calibrated({"a": one, "b": one}))
    assert plain.statistics == (one, None) and not plain.turned
    turned = Statistics(1, inputs=np.eye(D), turned=True)
    both = sites_of(weights, {}, Calibrated({"a": turned, "b": one}))
    assert both.statistics == (turned, one) and both.turned
    assert np.array_equal(both.tables[0].rows(0, D), TABLES["w1"].T)


def test_classes_that_were_not_calibrated_are_counted_and_the_others_listed() -> None:
    from tieaudit.change import Prediction
    from tieaudit.outcome import _predicted

    matrix = Prediction(("a", "b"), "mean", (0.5, 0.5), (0.25, None), 0.5, 30)
    bias = Prediction(("c", "d"), "mean", (0.5, 0.5), (None, None), None, 30)
    said = "\n".join(_predicted([matrix, bias, bias]))
    assert "a 25.00%, b not calibrated; loss +0.5 nats a token" in said
    assert "2 classes of weights not calibrated" in said and "in all" not in said
    assert "+1 nats a token in all" in "\n".join(_predicted([matrix, matrix]))  # ½ + ½
    assert _predicted([]) == []
