"""Every scheme on a live module: what is shared, what it computes, how many parameters are left, and the way back.

Parity is against the reference: the original with the planned values in its untied slots. Counts of papers are taken on
the meta device, where `keep:first` needs no values; each is worked out beside it.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from scheme_cases import (  # noqa: E402
    CASES,
    LM,
    WORDS,
    Case,
    D,
    Translator,
    V,
    floats,
    n_parameters,
)  # fmt: skip
from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tieaudit.change import Plan, Share  # noqa: E402
from tieaudit.errors import RewriteRefused, UnreadableModel  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def reference(module: nn.Module, plan: Plan) -> nn.Module:
    """The module with the mean of each class in its untied slots, worked out here."""
    slots = dict(module.named_parameters())
    with torch.no_grad():
        for edit in plan.edits:
            assert isinstance(edit, Share)
            seen = [slots[one.id].double() for one in edit.members]
            turned = [value.T if one.view.transposes else value for value, one in zip(seen, edit.members, strict=True)]
            mean = (sum(turned[1:], turned[0]) / len(turned)).to(torch.float32)
            for one in edit.members:
                slots[one.id].copy_(mean.T if one.view.transposes else mean)
    return module


@pytest.mark.parametrize("case", CASES, ids=[one.scheme for one in CASES])
def test_a_scheme_computes_what_the_reference_does_with_the_parameters_that_it_promises(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make().eval()
    original = copy.deepcopy(module)
    before, objects = n_parameters(module), {name: id(p) for name, p in module.named_parameters()}
    change = tieaudit.tie(module, scheme=case.scheme, allow_lossy=True, merge="mean")
    assert not change.plan.lossless
    assert not change.plan.refusals
    assert n_parameters(module) == before - case.n_saved
    assert change.plan.n_bytes_saved == 4 * case.n_saved
    inputs = WORDS if isinstance(module, (LM, Translator)) else floats()
    wanted = reference(copy.deepcopy(original), change.plan)(inputs)
    found = module(inputs)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)  # another kernel where a matrix lies transposed
    if case.scheme != "tied-autoencoder":
        assert torch.equal(found, wanted)
    assert not torch.allclose(found, original(inputs), rtol=1e-3)
    change.undo()
    assert {name: id(p) for name, p in module.named_parameters()} == objects
    assert all(torch.equal(p, dict(original.named_parameters())[name]) for name, p in module.named_parameters())
    assert torch.equal(module(inputs), original(inputs))


def test_a_scheme_of_ones_own_shares_what_its_file_says(tmp_path: Path) -> None:
    module = LM()
    file = tmp_path / "ties.toml"
    file.write_text('[[group]]\nmatch = ["layers.*.up_proj.weight"]\nlayers = [2, 3, 4]\n')
    tieaudit.tie(module, scheme=f"custom:{file}", allow_lossy=True)
    first = module.layers[2].up_proj.weight
    assert [layer.up_proj.weight is first for layer in module.layers] == [False, False, True, True, True, False]


def test_the_bias_of_the_scores_becomes_one_again() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    module = transformers.BertForMaskedLM(config)
    tieaudit.untie(module)
    with torch.no_grad():
        module.cls.predictions.bias += torch.arange(30.0)
    before = n_parameters(module)
    tieaudit.tie(module, scheme="io-bias", allow_lossy=True, merge="mean")
    assert module.cls.predictions.bias is module.cls.predictions.decoder.bias
    assert torch.equal(module.cls.predictions.bias, torch.arange(30.0) / 2)
    assert n_parameters(module) == before - 30


def test_every_other_name_of_a_tied_tensor_comes_along() -> None:
    """The encoder's embedding is the decoder's already; io would leave it behind with the old value."""
    torch.manual_seed(0)
    module = Translator()
    module.encoder.embed_tokens.weight = module.decoder.embed_tokens.weight
    before, objects = n_parameters(module), [id(p) for p in module.parameters()]
    for merge in ("keep:head", "low-rank:2"):
        change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge=merge)
        assert torch.equal(module.encoder.embed_tokens.weight, module.decoder.embed_tokens.weight)
        assert n_parameters(module) <= before - V * D + 2 * 2 * (V + D)
        change.undo()
        assert [id(p) for p in module.parameters()] == objects


def test_names_of_one_tensor_with_equal_values_elsewhere_all_become_one() -> None:
    module = Translator()
    module.encoder.embed_tokens.weight = module.decoder.embed_tokens.weight
    with torch.no_grad():
        module.lm_head.weight.copy_(module.decoder.embed_tokens.weight)
    assert tieaudit.tie(module, scheme="io").plan.lossless
    assert module.lm_head.weight is module.decoder.embed_tokens.weight is module.encoder.embed_tokens.weight


# corrections --------------------------------------------------------------------------------------------------------


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


def best_residual(kept: torch.Tensor, other: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(as_float64(other) - as_float64(kept), full_matrices=False)
    return as_float64(kept) + u[:, :rank] * s[:rank] @ v[:rank]


CORRECTIONS = [
    ("low-rank:2", 2 * (V + D), ".0.left"),
    ("low-rank:4", 4 * (V + D), ".0.left"),
    ("linear", D * D, ".0.right"),
    ("scaled", D, ".0.right"),
]


@pytest.mark.parametrize(("merge", "n_added", "factor"), CORRECTIONS, ids=[one[0] for one in CORRECTIONS])
def test_a_correction_is_a_parametrization_with_parameters_of_its_own(merge: str, n_added: int, factor: str) -> None:
    torch.manual_seed(0)
    module = LM(1).eval()
    kept_state = {name: value.clone() for name, value in module.state_dict().items()}
    embedding, head = (as_float64(one.weight) for one in (module.embed_tokens, module.lm_head))
    before = n_parameters(module)
    change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge=merge)
    assert n_parameters(module) == before - V * D + n_added
    assert change.plan.n_bytes_saved == 4 * (V * D - n_added)
    seen = as_float64(module.embed_tokens.weight)
    if merge.startswith("low-rank"):
        assert torch.allclose(seen, best_residual(head, embedding, n_added // (V + D)), atol=1e-5)
    elif merge == "linear":
        assert torch.allclose(seen, head @ torch.linalg.lstsq(head, embedding).solution, atol=1e-4)
    else:
        ratio = as_float64(module.lm_head.weight) / seen
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
    state = module.state_dict()
    assert any(name.endswith(f"parametrizations.weight{factor}") for name in state)
    again = copy.deepcopy(module)
    assert n_parameters(again) == n_parameters(module)  # still one
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(state)
    assert torch.equal(again(WORDS), module(WORDS))
    change.undo()
    assert module.state_dict().keys() == kept_state.keys()
    assert all(torch.equal(value, kept_state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("merge", [one[0] for one in CORRECTIONS])
def test_the_gradient_reaches_the_common_value_from_both_roles_and_the_factors(merge: str) -> None:
    torch.manual_seed(0)
    module = LM(1).eval()
    tieaudit.tie(module, scheme="io", allow_lossy=True, merge=merge)
    parity = tieaudit.gradients(module, WORDS)
    assert parity.held
    (tied,) = parity.tied
    assert len(tied.reached) == 2
    assert tied.difference <= 1e-10
    module(WORDS).square().sum().backward()
    factors = {name: p.grad for name, p in module.named_parameters() if name.endswith((".left", ".right"))}
    assert factors
    assert all(grad is not None and grad.any() for grad in factors.values())


def test_a_corrected_head_that_lies_transposed_is_read_through_both_steps() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(V, D)
            self.lm_head = nn.Module()
            self.lm_head.weight = nn.Parameter(torch.randn(D, V))

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.embed_tokens(words) @ self.lm_head.weight

    torch.manual_seed(0)
    module = Turned()
    embedding, head = (as_float64(one.weight) for one in (module.embed_tokens, module.lm_head))
    change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge="low-rank:3")
    assert torch.equal(as_float64(module.lm_head.weight), head)
    assert torch.allclose(as_float64(module.embed_tokens.weight), best_residual(head.T, embedding, 3), atol=1e-5)
    assert n_parameters(module) == V * D + 3 * (V + D)
    module(WORDS).sum().backward()
    change.undo()
    assert torch.equal(as_float64(module.embed_tokens.weight), embedding)
    change = tieaudit.tie(module, scheme="io", allow_lossy=True, merge="scaled")
    ratio = module.lm_head.weight.T / module.embed_tokens.weight
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
    change.undo()
    assert torch.equal(as_float64(module.lm_head.weight), head)


def test_a_corrected_weight_can_be_assigned_to_where_its_correction_has_an_inverse() -> None:
    torch.manual_seed(0)
    module = LM(1)
    tieaudit.tie(module, scheme="io", allow_lossy=True, merge="low-rank:2")
    wanted = torch.randn(V, D)
    module.embed_tokens.weight = wanted
    assert torch.allclose(module.embed_tokens.weight, wanted, atol=1e-6)
    other = LM(1)
    tieaudit.tie(other, scheme="io", allow_lossy=True, merge="linear")
    with pytest.raises(RuntimeError, match="does not implement right_inverse"):
        other.embed_tokens.weight = wanted


def test_a_correction_that_costs_more_than_the_tie_saves_is_refused_and_nothing_changes() -> None:
    module = LM(1)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RewriteRefused, match="larger than what the tie saves"):
        tieaudit.tie(module, scheme="io", allow_lossy=True, merge="low-rank:6")  # 6·28 = 168 > 160
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


# counts and maps of papers ------------------------------------------------------------------------------------------


def tied_on_meta(module: nn.Module, scheme: str) -> int:
    """Parameters that are left; put back afterwards."""
    change = tieaudit.tie(module, scheme=scheme, allow_lossy=True, merge="keep:first")
    found = n_parameters(module)
    change.undo()
    return found


def albert(embedding: int, hidden: int, n_layers: int, heads: int, width: int) -> nn.Module:
    """An ALBERT of as many groups as layers, which shares nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=30000, embedding_size=embedding, hidden_size=hidden, num_hidden_layers=n_layers,
        num_hidden_groups=n_layers, num_attention_heads=heads, intermediate_size=width,
    )  # fmt: skip
    with torch.device("meta"):
        found: nn.Module = transformers.AlbertModel(config)
    return found


def test_albert_s_table_of_what_is_shared() -> None:
    """Lan et al. 2020, table 4: base with E = 128: 12M, 64M, 38M, 89M; with E = 768: 31M, 83M, 57M, 108M.

    A layer has 4·(768² + 768) = 2,362,368 in attention, 2·768·3072 + 3072 + 768 = 4,722,432 in the FFN and 3,072 in two
    norms. The library maps E to H even where both are 768, which the paper does not count: 768² + 768 = 590,592.
    """
    small = albert(128, 768, 12, 12, 3072)
    assert n_parameters(small) == 89_650_176
    assert tied_on_meta(small, "albert") == 11_683_584 == 89_650_176 - 11 * (2_362_368 + 4_722_432 + 3_072)
    assert tied_on_meta(small, "albert:attention") == 63_664_128 == 89_650_176 - 11 * 2_362_368
    assert tied_on_meta(small, "albert:ffn") == 37_703_424 == 89_650_176 - 11 * 4_722_432
    wide, mapping = albert(768, 768, 12, 12, 3072), 590_592
    assert n_parameters(wide) - mapping == 109_081_344
    assert tied_on_meta(wide, "albert") == 31_705_344
    assert tied_on_meta(wide, "albert:attention") - mapping == 83_095_296
    assert tied_on_meta(wide, "albert:ffn") - mapping == 57_134_592


@pytest.mark.parametrize(
    ("hidden", "n_layers", "heads", "width", "expected"),
    [(1024, 24, 16, 4096, 17_683_968), (2048, 24, 16, 8192, 58_724_864), (4096, 12, 64, 16384, 222_595_584)],
)
def test_albert_s_larger_sizes(hidden: int, n_layers: int, heads: int, width: int, expected: int) -> None:
    """Published 18M, 60M and 235M; the cards of the released models say 17M, 58M and 223M."""
    assert tied_on_meta(albert(128, hidden, n_layers, heads, width), "albert") == expected


def test_bert_shared_as_albert_has_its_parameters_and_no_map() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        module = transformers.BertModel(transformers.BertConfig(vocab_size=30000))
    assert n_parameters(module) == 109_081_344
    assert tied_on_meta(module, "albert") == 31_114_752 == 31_705_344 - 590_592


class Transformer(nn.Module):
    """Vaswani et al.: one embedding for source, target and scores; sinusoids have no parameters."""

    def __init__(self, n_layers: int, size: int = 512, n_heads: int = 8, width: int = 2048) -> None:
        super().__init__()
        self.embed = nn.Embedding(32_000, size)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(size, n_heads, width, batch_first=True), n_layers
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(size, n_heads, width, batch_first=True), n_layers
        )


TAKASE = [
    ("sequence:6", 12, "AABBCCDDEEFF"),
    ("cycle:6", 12, "ABCDEFABCDEF"),
    ("cycle-rev:6", 12, "ABCDEFFEDCBA"),
    ("sequence:6", 18, "AAABBBCCCDDDEEEFFF"),
    ("cycle:6", 18, "ABCDEFABCDEFABCDEF"),
    ("cycle-rev:6", 18, "ABCDEFABCDEFFEDCBA"),
]


@pytest.mark.parametrize(("scheme", "n_layers", "expected"), TAKASE, ids=[f"{one[0]} of {one[1]}" for one in TAKASE])
def test_takase_and_kiyono_s_models_of_six_sets_have_the_parameters_of_six_layers(
    scheme: str, n_layers: int, expected: str
) -> None:
    """Table 1: M6N6, M6N12 and M6N18 all have 61M. 32,000·512 + 6·3,152,384 (encoder) + 6·4,204,032 (decoder)."""
    with torch.device("meta"):
        module = Transformer(n_layers)
    tieaudit.tie(module, scheme=scheme, allow_lossy=True, merge="keep:first")
    assert n_parameters(module) == 60_522_496 == 32_000 * 512 + 6 * 3_152_384 + 6 * 4_204_032
    for slot in ("self_attn.in_proj_weight", "linear1.weight", "norm2.bias"):  # both norms are shared too
        for side in (module.encoder, module.decoder):
            letters: dict[int, str] = {}
            at = [id(layer.get_parameter(slot)) for layer in side.layers]
            assert "".join(letters.setdefault(one, chr(65 + len(letters))) for one in at) == expected


def test_one_wide_ffn_s_parameter_deltas(tmp_path: Path) -> None:
    """Pires et al. 2023: 228M; SharedEnc 186M (five FFNs fewer), both 144M (ten), SharedEncDec 136M (eleven)."""
    one = 2 * 1024 * 4096 + 4096 + 1024
    assert one == 8_393_728
    with torch.device("meta"):
        module = Transformer(6, 1024, 16, 4096)
    before = n_parameters(module)
    assert before - tied_on_meta(module, "ffn") == 10 * one == 83_937_280
    for name, pattern, n_fewer in (("SharedEnc", "encoder.*", 5), ("SharedDec", "decoder.*", 5), ("all", "*", 11)):
        leaves = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
        file = tmp_path / f"{name}.toml"
        file.write_text("".join(f'[[group]]\nmatch = ["{pattern}.{leaf}"]\n' for leaf in leaves))
        assert before - tied_on_meta(module, f"custom:{file}") == n_fewer * one


def test_values_are_not_made_up_where_there_are_none() -> None:
    with torch.device("meta"):
        module = LM(2)
    objects = [id(p) for p in module.parameters()]
    with pytest.raises(UnreadableModel, match="meta device"):
        tieaudit.tie(module, scheme="albert", allow_lossy=True, merge="mean")
    assert [id(p) for p in module.parameters()] == objects


# third parties ------------------------------------------------------------------------------------------------------

PLUGIN = """
from tieaudit.model import Member
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate

def _propose(subject, argument):
    found = [one for one in subject.model.weights if one.name.endswith(".bias")]
    yield Candidate("all-biases", tuple(Member(one.id) for one in found), 0, False, "biases")

all_biases = Scheme(name="all-biases", merge="mean", summary="all biases are one", source="a test", propose=_propose,
                    page="all-biases: every bias is one.")
"""


def run(folder: Path, *words: str) -> Any:
    code = (
        "import sys; sys.path[:0] = sys.argv[1].split('|'); from tieaudit.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, f"{ROOT}|{folder}", *words], capture_output=True, text=True, cwd=folder
    )


def test_a_scheme_of_another_package_is_known_to_explain_plan_and_apply(tmp_path: Path) -> None:
    (tmp_path / "their_schemes.py").write_text(PLUGIN)
    home = tmp_path / "their_schemes-1.0.dist-info"
    home.mkdir()
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: their-schemes\nVersion: 1.0\n")
    (home / "entry_points.txt").write_text("[tieaudit.schemes]\nall-biases = their_schemes:all_biases\n")
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    explained = run(tmp_path, "explain", "all-biases")
    assert explained.returncode == 0, explained.stderr
    assert "every bias is one" in explained.stdout
    planned = run(tmp_path, "plan", "model.pt", "--scheme", "all-biases", "--allow-lossy")
    assert planned.returncode == 0, planned.stderr
    assert "all-biases" in planned.stdout
    applied = run(tmp_path, "apply", "model.pt", "--scheme", "all-biases", "--allow-lossy", "--to", "tied.pt")
    assert applied.returncode == 0, applied.stderr
    found = torch.load(tmp_path / "tied.pt")
    assert found["0.bias"].data_ptr() == found["1.bias"].data_ptr()
    assert torch.allclose(found["0.bias"], ((module[0].bias + module[1].bias) / 2).detach())
    without = subprocess.run(
        [sys.executable, "-m", "tieaudit", "explain", "all-biases"], capture_output=True, text=True, cwd=ROOT
    )
    assert without.returncode == 2
