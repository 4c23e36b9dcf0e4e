"""The decoder's weights are the encoder's, transposed."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.schemes import Scheme
from tieaudit.stacks import first_uses, in_order
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View

_NOT_OF_A_CHAIN = ("attention_", "token_", "position_", "type_", "output_head", "recurrent_", "router", "adapter_")


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    first_use = first_uses(subject)
    matrices = [one for one in subject.model.weights if len(one.shape) > 1 and one.is_float and not one.absent]
    alien = next((one for one in matrices if subject.roles[one.id].kind.startswith(_NOT_OF_A_CHAIN)), None)
    if alien is not None:
        because = (
            f"{alien.id} is {subject.roles[alien.id].kind}: this is no chain of layers that leads in and out again"
        )
        yield Refusal("tied-autoencoder", (alien.id,), because)
        return
    chain = sorted(matrices, key=lambda one: in_order(subject, one, first_use))
    pairs = list(zip(chain, reversed(chain), strict=True))[: len(chain) // 2]
    views = [_mirrored(subject, *pair) for pair in pairs]
    if not pairs or len(chain) % 2 or None in views or _all_square(chain):
        shapes = ", ".join(str(list(one.shape)) for one in chain[:6])
        because = f"the weights are no encoder with its mirror image behind it: {shapes}"
        yield Refusal("tied-autoencoder", (), because if chain else "this model has no matrices")
        return
    for (one, other), view in zip(pairs, views, strict=True):
        if one.storage is None or other.storage is None or one.storage.region == other.storage.region or view is None:
            continue
        ids = (Member(one.id), Member(other.id, view))
        because = f"{other.id} leads back from where {one.id} leads to"
        yield Candidate("tied-autoencoder", ids, other.n_bytes, one_value(subject).holds(ids), because)


def _mirrored(subject: Subject, one: Weight, other: Weight) -> View | None:
    """How `other` is seen as the way back of `one`; None if it is not. A transposed convolution stores [in, out, …]."""
    if one.dtype != other.dtype:
        return None
    if len(one.shape) > 2:
        ops = {use.op for use in subject.model.uses_of.get(other.id, ())}
        back = any(op.lower().replace("_", "").startswith("convtranspose") for op in ops)
        return AS_STORED if one.shape == other.shape and back else None
    return TRANSPOSED if len(other.shape) == 2 and one.shape == other.shape[::-1] else None


def _all_square(chain: list[Weight]) -> bool:
    """Square matrices of one size mirror each other in any order, which tells nothing."""
    return len({one.shape for one in chain}) == 1 and chain[0].shape[0] == chain[0].shape[1]


tied_autoencoder = Scheme(
    name="tied-autoencoder",
    merge="mean",
    summary="each layer of the decoder is its layer of the encoder, transposed",
    source="Vincent et al. 2010, Stacked denoising autoencoders (JMLR), section 2.2; "
    "Hinton & Salakhutdinov 2006 (Science)",
    propose=_propose,
    page="""tied-autoencoder: W_dec = W_encᵀ.

For chains of layers whose shapes lead in and out again: the last matrix is the first one transposed, the last but one
the second, and so on. A transposed convolution has the weight of its convolution as it is stored. Biases stay.""",
)
