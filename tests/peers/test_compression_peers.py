"""Cases of quantisers and adapters about modules in memory, and what tieaudit does with them.

LLC: vllm-project/llm-compressor, MO: NVIDIA/Model-Optimizer, OLV: microsoft/Olive, PEFT and FACT-1_5: huggingface/peft,
whose merge was run in version 0.21.2 and is done by hand here. See docs/peer-cases.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import IDS, LM, codes, groups, of, outcomes, report, saved, tied, views  # noqa: E402

# --- llm-compressor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_LLC_1_LLC_3_after_untying_the_head_moves_alone_and_saving_keeps_what_was(
    tmp_path: Path, dtype: torch.dtype, is_tied: bool
) -> None:
    # llm-compressor sets config.tie_word_embeddings to false; here it is left alone, and the plan says so
    module = LM(tied=is_tied).to(dtype)
    module.config = SimpleNamespace(tie_word_embeddings=is_tied)
    before = groups(module)
    assert bool(before) is is_tied
    assert groups(saved(tmp_path / "m.pt", module)) == before
    change = tieaudit.untie(module)
    assert any(f"tie_word_embeddings is {is_tied} and was left alone" in one for one in change.plan.notes) is is_tied
    old = module.emb.weight.detach().clone()
    with torch.no_grad():
        module.head.weight += 1
    assert torch.equal(module.emb.weight, old)
    assert groups(saved(tmp_path / "untied.pt", module)) == groups(tmp_path / "untied.pt", "measured") == []


@pytest.mark.parametrize("target", ["emb.weight", "head.weight", ""])
@pytest.mark.parametrize(("inputs", "outputs"), [(True, False), (False, True), (True, True), (False, False)])
def test_LLC_2_what_a_quantiser_targets_is_told_by_role_and_of_a_tie_always_both(
    target: str, inputs: bool, outputs: bool
) -> None:
    checked = {"token_embedding": inputs, "output_head": outputs}
    roles = report(LM(tied=False)).subject.roles
    hit = bool(target) and checked[roles[target].kind]
    assert hit == ((target, inputs) == ("emb.weight", True) or (target, outputs) == ("head.weight", True))
    of_tied = report(LM())
    everything = {name for tie in of_tied.subject.found.ties if target in tie.ids for name in tie.ids}
    assert everything == ({"emb.weight", "head.weight"} if target else set())


def test_LLC_6_quantising_other_layers_keeps_a_tie_and_quantising_the_head_breaks_it() -> None:
    def rounded(layer: nn.Module) -> nn.Module:
        """int4, one scale for each row."""
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter((weight / scale).round().clamp(-8, 7) * scale)
        return made

    module = LM(hidden=True)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.mid.weight.copy_(rounded(other.mid).weight)
    assert groups(other) == [("emb.weight", "head.weight")]
    other.head = rounded(other.head)
    assert groups(other) == groups(other, "measured") == []
    proof = tieaudit.verify(module, other, inputs=IDS, max_drift=0.5)
    assert proof.failed == () and proof.drift is not None and proof.drift > 1e-4
    assert tieaudit.verify(module, other, inputs=IDS).failed  # and it is no parity


# --- Model-Optimizer --------------------------------------------------------------------------------------------------


def test_MO_1_MO_2_a_declared_class_is_the_same_from_either_end_and_never_a_tie_with_itself() -> None:
    from tieaudit.audit import audit
    from tieaudit.toy import ramp, toy

    for pair in (("embed", "head"), ("head", "embed")):
        subject = toy({"embed": ramp(64, 8), "head": None, "other": ramp(8, 8)}, declared=[pair, ("other", "other")])
        found = {(tie.origin, frozenset(tie.ids)) for tie in subject.found.ties if len(tie.ids) > 1}
        both = frozenset(("embed", "head"))
        assert found == {("declared", both), ("absent", both)}
        judged = audit(subject)
        # which name is kept matters to transformers 4 only; a class of one name is nothing to anybody
        assert [one.code for one in judged.findings] == ([] if pair[0] == "embed" else ["TIE106"])
        assert judged.crashed == ()
        assert judged.summary.n_parameters == 64 * 8 + 8 * 8


def test_MO_3_ties_of_every_layer_stay_ties_of_their_layer() -> None:
    encoder, decoder = (nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]) for _ in range(2))
    for one, other in zip(encoder, decoder, strict=True):
        tied(one, other)
    expected = [(f"encoder.{index}.weight", f"decoder.{index}.weight") for index in range(3)]
    assert groups(of(encoder=encoder, decoder=decoder)) == expected


def test_MO_4_MO_5_MO_8_containers_of_experts_are_tied_as_far_as_they_are(tmp_path: Path) -> None:
    def experts() -> nn.Module:
        return of(gate_up=nn.Parameter(torch.randn(2, 8, 6)), down=nn.Parameter(torch.randn(2, 6, 4)))

    whole = experts()
    module = of(encoder=of(experts=whole), decoder=of(experts=whole))  # MO-4: the container itself, so all of it
    names = [(f"encoder.experts.{name}", f"decoder.experts.{name}") for name in ("gate_up", "down")]
    assert groups(module) == groups(saved(tmp_path / "m.pt", module)) == names
    first, second = experts(), experts()
    both = of(gate_up=first.gate_up, down=second.down)  # MO-5: of two canonical ones, a part of each
    module = of(a=first, b=second, c=both)
    assert groups(module) == [("a.gate_up", "c.gate_up"), ("b.down", "c.down")]
    partly = of(gate_up=first.gate_up, down=nn.Parameter(torch.randn(2, 6, 4)), router=nn.Linear(6, 2))  # MO-8
    module = of(a=first, c=partly)
    assert groups(module) == [("a.gate_up", "c.gate_up")]
    assert report(module).summary.n_parameters == 2 * 8 * 6 + 2 * (2 * 6 * 4) + 6 * 2 + 2
    # a slice of one expert is a part, not a tie: dropping it for the whole would lose which
    assert views(of(all=first.gate_up, one=nn.Parameter(first.gate_up.data[1]))) == []


def test_MO_6_MO_7_MO_11_what_one_side_has_alone_stays_its_own() -> None:
    codes_of, scale = torch.randint(0, 99, (8, 4), dtype=torch.int8), torch.randn(8)
    module = of(a=of(weight=codes_of, scale=scale), b=of(weight=codes_of))
    assert groups(module) == [("a.weight", "b.weight")]  # MO-6: a scale on one side only is no member of anything
    module.b.register_buffer("scale", scale)
    assert groups(module) == [("a.weight", "b.weight"), ("a.scale", "b.scale")]  # MO-11
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    biased = nn.Sequential(one, tied(one, two))
    assert groups(biased) == [("0.weight", "1.weight")]  # MO-7: each has a bias of its own
    assert report(biased).summary.n_parameters == 24


# --- Olive and PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed")])
def test_OLV_8_a_loader_that_replaces_the_tensors_of_one_host_leaves_no_tie(order: tuple[str, str]) -> None:
    shared = {"codes": torch.randint(0, 99, (40, 8), dtype=torch.uint8), "scales": torch.randn(40)}
    hosts = {name: of(**shared) for name in order}
    module = of(**hosts)
    assert groups(module) == [tuple(f"{name}.{part}" for name in order) for part in ("codes", "scales")]
    fresh = {name: torch.ones_like(one) + one for name, one in shared.items()}
    hosts["embed"].codes, hosts["embed"].scales = fresh["codes"], fresh["scales"]
    assert groups(module) == groups(module, "measured") == []
    hosts["head"].codes, hosts["head"].scales = fresh["codes"], fresh["scales"]
    assert len(groups(module)) == 2


def test_PEFT_3_copies_that_are_trained_in_place_of_a_tied_pair_are_tied_to_each_other() -> None:
    """modules_to_save=["embed_tokens"] with ensure_weight_tying: both hosts keep the original and read a new copy."""
    original, trained = nn.Parameter(torch.randn(40, 16), requires_grad=False), nn.Parameter(torch.randn(40, 16))
    module = of(embed=of(original=original, trained=trained), head=of(original=original, trained=trained))
    expected = [("embed.original", "head.original"), ("embed.trained", "head.trained")]
    assert groups(module) == expected
    ways = ("copy.deepcopy(module)", "load_state_dict(state)", "module.to(dtype)")
    assert outcomes(module, *ways) == ["kept", "kept", "kept"]


class Adapted(LM):
    """A LoRA adapter on the head of a tied model: y = head(x) + x Aᵀ Bᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 40, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.emb(words))
        return self.head(hidden) + self.up(self.down(hidden))

    def merged(self, *, untied: bool) -> LM:
        """merge_and_unload: the product is added to what the head reads, in place."""
        made = LM()
        made.load_state_dict({name: self.state_dict()[name] for name in ("emb.weight", "head.weight")})
        if untied:
            tieaudit.untie(made)
        with torch.no_grad():
            made.head.weight += self.up.weight @ self.down.weight
        return made


def adapted() -> Adapted:
    torch.manual_seed(0)
    module = Adapted()
    with torch.no_grad():
        module.up.weight *= 3
    return module


def test_FACT_1_5a_an_adapter_merged_into_a_tied_head_changes_the_embedding_and_verify_says_so(tmp_path: Path) -> None:
    """peft 0.21.2, target_modules=["lm_head"] (huggingface/peft#2018): merged and live logits differed by 65 in a toy,
    and the configuration still said tied. What the merge leaves is a healthy tied model, so that no rule can see it:
    the outputs can, and the tie itself is the warning beforehand."""
    module = adapted()
    assert groups(module) == [("emb.weight", "head.weight")]  # whoever writes to one writes to both
    merged = module.merged(untied=False)
    assert not torch.equal(merged.emb.weight, module.emb.weight)
    proof = tieaudit.verify(module, merged, inputs=IDS, max_drift=0.01)
    assert [level.name for level in proof.failed] == ["end to end"]
    assert codes(merged) == codes(saved(tmp_path / "m.pt", merged)) == []


def test_FACT_1_5b_untied_before_the_merge_the_outputs_are_the_adapter_s() -> None:
    """What modules_to_save=["lm_head", "embed_tokens"] amounts to: 6e-8 apart, two tensors."""
    module = adapted()
    merged = module.merged(untied=True)
    assert torch.equal(merged.emb.weight, module.emb.weight)
    assert groups(merged) == groups(merged, "measured") == []
    assert tieaudit.verify(module, merged, inputs=IDS, max_drift=1e-5).failed == ()


def test_PEFT_5_a_module_that_is_untied_by_its_configuration_has_two_tensors() -> None:
    transformers = pytest.importorskip("transformers")
    for is_tied in (True, False):
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=is_tied
        )
        module = transformers.GPT2LMHeadModel(config)
        assert groups(module) == ([("transformer.wte.weight", "lm_head.weight")] if is_tied else [])
        notes = tieaudit.untie(module).plan.notes
        assert any("tie_word_embeddings is True" in note for note in notes) is is_tied  # the warning, where it is due
