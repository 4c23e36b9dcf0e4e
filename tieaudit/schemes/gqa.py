"""Fewer key and value heads: the mean of each group."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.errors import UsageError
from tieaudit.model import Member
from tieaudit.printable import counted
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject

SOURCE = "Ainslie et al. 2023, GQA (EMNLP, arXiv 2305.13245), section 2.1: mean pooling of the heads of each group"


def pooled(subject: Subject, scheme: str, n_groups: int) -> Iterator[Candidate | Refusal]:
    """One candidate for each key and value projection; what is fused with others cannot be told apart."""
    kinds = {weight.id: subject.roles[weight.id].kind for weight in subject.model.weights}
    found = [weight for weight in subject.model.weights if kinds[weight.id] in ("attention_key", "attention_value")]
    fused = tuple(id for id, kind in kinds.items() if kind in ("attention_qkv", "attention_kv"))
    if fused:
        n_fused = counted(len(fused), "projection")
        because = f"keys or values are made together with others by {n_fused}: their heads are not told apart"
        yield Refusal(scheme, fused, because)
    elif not found:
        yield Refusal(scheme, (), "no key or value projection was recognised in this model")
    for weight in found:
        if weight.absent:
            continue
        if not weight.is_float:
            because = f"{weight.id} is stored as codes, of which no mean is computed"
            yield Refusal(scheme, (weight.id,), because)
            continue
        because = f"{kinds[weight.id].replace('_', ' ')} heads, {n_groups} groups"
        yield Candidate(scheme, (Member(weight.id),), 0, False, because, action="pool", n_groups=n_groups)


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    if not argument.isascii() or not argument.isdigit() or int(argument[:9]) < 1:
        given = f"found {argument!r}" if argument else "found none"
        raise UsageError(f"--scheme gqa: expected a number of groups behind a colon, {given}", hint="gqa:4, say")
    yield from pooled(subject, "gqa", int(argument[:9]))


gqa = Scheme(
    name="gqa",
    argument="G",
    worth_comparing=lambda subject: ("8", "4", "2"),  # those that the model's heads can be divided into
    listed_by_scan=False,  # how many heads there are only the format knows
    merge="mean",
    summary="G key and value heads for all, each the mean of a group of neighbours (ONNX, Hugging Face folders)",
    source=SOURCE,
    propose=_propose,
    page="""gqa:G: grouped-query attention by mean pooling.

Head h goes into group ⌊h·G/n⌋ of n. The projections of keys and values, their biases and norms over all heads shrink
to G heads. Saves (1 − G/n) of these. Without further training pooling usually damages a model (the paper trains for
5 % of the original steps); heads that are equal already cost nothing, bit for bit.

In an ONNX model, whose graph says how many heads there are, each head is repeated n/G times right behind its
projection, so that nothing else changes: the file is smaller, a cache of keys and values is not. In a Hugging Face
folder the setting that counts them (num_key_value_heads, at its level of config.json) becomes G, and the cache shrinks
too; all layers that the setting counts are pooled, or none. Which tensors these are the class says; a class without
such a setting is refused. Checkpoints, lone safetensors files, live modules and exported programs have nowhere to say
how many heads are left.""",
)
