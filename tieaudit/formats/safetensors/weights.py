"""The tensors of a checkpoint as weights: which are parameters by convention, and which names are only documented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tieaudit.formats.safetensors.sharded import INDEX_SUFFIX, Checkpoint, read_checkpoint, read_shards
from tieaudit.model import Declaration, Model, Part, Weight, make_id


def load(path: Path, files: tuple[Path, ...]) -> Model:
    """The model at `path`, a file or an index. Raises CorruptFile and UnreadableModel. Cost: reads headers only."""
    alone = len(files) < 2 or path.name.endswith(INDEX_SUFFIX)
    checkpoint = read_checkpoint(path) if alone else read_shards(files)
    weights = stored_weights(checkpoint)
    absent, declarations = documented(checkpoint, {weight.id: weight for weight in weights})
    only_documented = absent_names(absent)
    return Model(
        path=str(path),
        format="safetensors",
        parts=(Part("", tuple(str(file) for file in checkpoint.files)),),
        weights=(*weights, *absent),
        declarations=declarations,
        metadata={key: value for key, value in checkpoint.metadata.items() if key not in only_documented},
        notes=() if weights else ("the file holds no tensor",),
    )


def absent_names(absent: Sequence[Weight]) -> frozenset[str]:
    """Names that are only documented."""
    return frozenset(weight.name for weight in absent)


def stored_weights(checkpoint: Checkpoint) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint as a weight; whether it is a parameter is told by name, if at all."""
    found = []
    for name, (_, entry) in checkpoint.entries.items():
        parameter, because = by_convention(name, entry.dtype, entry.shape)
        found.append(
            Weight(make_id(name), name, entry.shape, entry.dtype, entry.storage, parameter=parameter, because=because)
        )
    return tuple(found)


_BUFFER_ENDINGS = (
    "inv_freq",
    "position_ids",
    "token_type_ids",
    "masked_bias",
    "attn.bias",
    "attention.bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "relative_position_index",
    "final_logits_bias",
)
_QUANTISED_ENDINGS = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "zero_point", "g_idx")


def by_convention(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[bool | None, str]:
    """Whether a tensor is a parameter, by its name and element type where no class can be asked."""
    last = name.rsplit(".", 1)[-1]
    for ending in _BUFFER_ENDINGS:
        if name == ending or name.endswith("." + ending) or (ending in ("inv_freq", "position_ids") and last == ending):
            # BERT-style `self.attn.bias` is a vector and learned; GPT-2's `attn.bias` is a causal mask [1, 1, n, n]
            if ending in ("attn.bias", "attention.bias") and len(shape) < 3:
                continue
            return False, f"by its name: {ending} is a buffer by convention"
    if last in _QUANTISED_ENDINGS or any(last.endswith("_" + ending) for ending in _QUANTISED_ENDINGS):
        return None, f"part of a quantised tensor by its name ({last})"
    if dtype.startswith(("int", "uint", "bool")):
        return False, f"{dtype} is not learned"
    if dtype.startswith(("float8", "float4", "float6")):
        return None, f"{dtype} may be one part of a quantised tensor"
    return True, f"by its type: {dtype}, and no buffer by its name"


def documented(
    checkpoint: Checkpoint, stored: Mapping[str, Weight]
) -> tuple[tuple[Weight, ...], tuple[Declaration, ...]]:
    """Names that `__metadata__` maps to a stored one: `safetensors.torch.save_model` writes {dropped: kept}.

    Of a sharded checkpoint the map is in the index: huggingface_hub, serialization/_torch.py `save_torch_state_dict`.

    It documents the tie and restores nothing by itself: transformers ignores it and initialises the dropped name
    randomly; `safetensors.torch.load_model` relies on the live module's own sharing.
    """
    absent: dict[str, Weight] = {}
    declarations: list[Declaration] = []
    known: set[tuple[str, str]] = set()
    maps = [(f"{file} __metadata__", header.metadata) for file, header in checkpoint.headers.items()]
    for where, texts in (*maps, (f"{checkpoint.main.name} metadata", checkpoint.in_index)):
        by_kept: dict[str, list[str]] = {}
        for dropped, kept in texts.items():
            weight = stored.get(make_id(kept))
            if weight is None or dropped == kept or (dropped, kept) in known:
                continue
            known.add((dropped, kept))
            id = make_id(dropped)
            if id not in stored and id not in absent:
                because = f"{where} says that it was dropped for {kept}"
                absent[id] = Weight(
                    id, dropped, weight.shape, weight.dtype, None, parameter=weight.parameter, because=because
                )
            by_kept.setdefault(kept, []).append(dropped)
        for kept, names in by_kept.items():
            members = tuple(make_id(name) for name in (kept, *names))
            declarations.append(
                Declaration(
                    members,
                    where,
                    active=True,
                    restores=False,
                    honoured_by=("safetensors.torch.load_model, into a module that shares them itself",),
                    because="the alias map documents a tie; it restores nothing by itself",
                )
            )
    return tuple(absent.values()), tuple(declarations)
