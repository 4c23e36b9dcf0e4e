"""The scale of `scaled` goes into the norm before the head where that is free; the folded model computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from tieaudit.change import Gain
from tieaudit.cli import main
from tieaudit.comparison import compare
from tieaudit.formats.huggingface.gain import NORMS
from tieaudit.formats.onnx.gain import gain_of
from tieaudit.load import load_one
from tieaudit.scan import look

Array = NDArray[Any]
V, D = 50, 8
RNG = np.random.default_rng(0)
E = RNG.standard_normal((V, D)).astype(np.float32)
U = (E * np.exp(RNG.standard_normal(D)) + 0.3 * RNG.standard_normal((V, D))).astype(np.float32)
G, B = (RNG.standard_normal(D).astype(np.float32) for _ in "gb")
IDS = RNG.integers(0, V, (3, 5))


def common() -> tuple[Array, Array]:
    """W and s of E ≈ W, U ≈ W·diag(s), by the definition."""
    e, u = E.astype(float), U.astype(float)
    s = np.linalg.norm(u, axis=0) / np.linalg.norm(e, axis=0)
    s = np.where((e * u).sum(axis=0) < 0, -s, s)
    return (e + u / s) / 2, s


def normed(h: Array, kind: str) -> Array:
    """A layer norm with bias, or an RMS norm."""
    if "layer" in kind:
        h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-5)
    return h * G + B if "layer" in kind else h * G


def model(path: Path, kind: str) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    nodes = [node("Gather", ["e", "ids"], ["h"])]
    if kind.startswith("layer"):
        nodes.append(node("LayerNormalization", ["h", "g", "b"], ["x"], axis=-1, epsilon=1e-5))
    else:
        nodes += [
            node("Mul", ["h", "h"], ["square"]),
            node("ReduceMean", ["square"], ["mean"], axes=[-1], keepdims=1),
            node("Add", ["mean", "eps"], ["shifted"]),
            node("Sqrt", ["shifted"], ["root"]),
            node("Div", ["h", "root"], ["n"]),
            node("Mul", ["g", "n"], ["x"]),
        ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", V])]
    nodes.append(node("MatMul", ["x", "u"], ["logits"]))
    if kind.endswith("second reader"):
        nodes.append(node("ReduceSum", ["x"], ["total"]))
        outputs.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, None))
    if kind.endswith("given out"):
        outputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", D]))
    if kind.endswith("gain read twice"):
        nodes.append(node("ReduceSum", ["g"], ["total"]))
        outputs.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, None))
    tensors = {"e": E, "u": U.T, "g": G, "b": B, "eps": np.float32(1e-5)}
    read = {name for one in nodes for name in one.input}
    made = helper.make_graph(
        nodes, "lm", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "t"])], outputs,
        [numpy_helper.from_array(np.ascontiguousarray(one), name) for name, one in tensors.items() if name in read],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


FREE = {"layer norm": ("g", "b"), "RMS norm in single operations": ("g",)}
BOUND = {
    "layer norm with a second reader": "somebody else reads",
    "RMS norm given out": "somebody else reads",
    "layer norm with gain read twice": "g, in the norm before u, is read in several places",
}


def applied(path: Path, to: Path, *words: str) -> dict[str, Any]:
    asked = ("apply", str(path), "--scheme", "io", "--allow-lossy", "--merge", "scaled", "--to", str(to), *words)
    found = CliRunner().invoke(main, [*asked, "--format", "json"])
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.output)
    return told


@pytest.mark.parametrize("kind", [*FREE, *BOUND])
def test_a_norm_takes_the_scale_where_the_head_alone_reads_it(kind: str, tmp_path: Path) -> None:
    found = gain_of(load_one(str(model(tmp_path / "lm.onnx", kind))), "u")
    assert found == Gain(FREE[kind]) if kind in FREE else isinstance(found, str) and BOUND[kind] in found


@pytest.mark.parametrize("kind", [*FREE, "layer norm with a second reader"])
def test_a_folded_and_a_corrected_graph_compute_the_common_table_with_its_scale(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    path = model(tmp_path / "lm.onnx", kind)
    told = applied(path, tmp_path / "tied.onnx")
    table, scale = common()
    expected = normed(table[IDS], kind) @ (table * scale).T
    session = onnxruntime.InferenceSession(tmp_path / "tied.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"ids": IDS})[0]
    # with the scale left out, or put into the gain of a norm that keeps its bias, it is off by as much as it is large
    assert np.allclose(found, expected, atol=2e-4)
    assert {level["name"]: level["outcome"] for level in told["proof"]["levels"]}["end to end"] == "held"
    free = kind in FREE
    assert told["plan"]["n_bytes_saved"] == 4 * (V * D - (0 if free else D))
    after = load_one(str(tmp_path / "tied.onnx"))
    assert sum(weight.n_elements for weight in after.weights if weight.shape == (D,)) == (
        len(FREE[kind]) * D if free else 3 * D
    )
    subject = look(load_one(str(path)))
    choice = next(one for one in compare(subject) if (one.scheme, one.policy) == ("io", "scaled"))
    assert choice.n_bytes_saved == told["plan"]["n_bytes_saved"]


@pytest.mark.parametrize("family", ["Llama", "Gemma", "StableLm"])
def test_a_folder_is_folded_whether_its_gain_is_w_or_one_more_and_with_its_bias(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    live = kind(config).eval()
    ids = torch.from_numpy(IDS)
    table, scale = common()
    with torch.no_grad():
        live.model.norm.weight += torch.from_numpy(G) / 4
        if getattr(live.model.norm, "bias", None) is not None:
            live.model.norm.bias += torch.from_numpy(B)
        live.model.embed_tokens.weight.copy_(torch.from_numpy(E))
        live.lm_head.weight.copy_(torch.from_numpy(U))
        live.save_pretrained(tmp_path / "lm")
        live.model.embed_tokens.weight.copy_(torch.from_numpy(table))
        live.lm_head.weight.copy_(torch.from_numpy(table * scale))
        expected = live(ids).logits
    told = applied(tmp_path / "lm", tmp_path / "tied")
    assert told["plan"]["n_bytes_saved"] == 4 * V * D
    tied = kind.from_pretrained(tmp_path / "tied").eval()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.allclose(tied(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("change", ["another class", "a further reader"])
def test_a_folder_whose_norm_is_not_certain_is_refused_with_the_reason(change: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {"model.embed_tokens.weight": E, "lm_head.weight": U, "model.norm.weight": G,
               "model.layers.0.input_layernorm.weight": G}  # fmt: skip
    if change == "a further reader":
        tensors["value_head.weight"] = np.ones((1, D), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    kind = "llama" if change == "a further reader" else "somebodys"
    config = {"model_type": kind, "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D,
              "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = ("plan", str(tmp_path), "--scheme", "io", "--allow-lossy", "--merge", "scaled")
    found = CliRunner().invoke(main, [*asked])
    reason = "is not known for certain" if change == "another class" else "value_head.weight may read model.norm.weight"
    assert found.exit_code == 2 and "nor can the norm before the head take it" in found.output, found.output
    assert reason in found.output


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "starcoder2", "nemotron", "olmo2"])
def test_the_classes_apply_their_gain_as_the_table_says(kind: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=V, hidden_size=D, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=False, pad_token_id=0, max_position_embeddings=16,
    )  # fmt: skip
    live = transformers.AutoModelForCausalLM.from_config(config).eval()
    name, added = NORMS[kind]
    norm, seen = live.get_submodule(name), []
    live.lm_head.register_forward_pre_hook(lambda one, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for size in (1.0, 3.0):
            norm.weight.fill_(size - added)
            live(torch.from_numpy(IDS))
    # what the head is given is three times as large where the gain is, and nothing stands between them
    assert torch.allclose(seen[1], 3.0 * seen[0], rtol=1e-4, atol=1e-5)
