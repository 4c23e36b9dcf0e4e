"""What a transformers class takes, by its forward signature, its main input and its configuration; imports neither."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

_FRAMES = 64
"""Length of generated sound features where the class does not fix it."""


@dataclass(frozen=True)
class Taken:
    """One input of a class."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    """A name stands for a size that is free: equal names, equal sizes."""
    limit: int | None = None
    """Integers stay below it: rows of the embedding."""


def class_inputs(model: Any) -> tuple[Taken, ...]:
    """Inputs with which a forward pass of this class can run, the main one first."""
    taken = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    table = _table(model)
    limit = getattr(table, "num_embeddings", None) or getattr(text, "vocab_size", None)
    main = getattr(model, "main_input_name", "input_ids")
    found = [_main(main, model, limit)]
    if main != "input_ids" and main.startswith("pixel") and "input_ids" in taken and not config.is_encoder_decoder:
        found.append(Taken("input_ids", "int64", ("batch", "sequence"), limit))
    if main == "input_ids" and "attention_mask" in taken:
        found.append(Taken("attention_mask", "int64", ("batch", "sequence")))
    if "decoder_input_ids" in taken:
        decoder = getattr(config, "decoder", None)
        size = getattr(decoder, "vocab_size", None) or getattr(config, "vocab_size", None) or limit
        found.append(Taken("decoder_input_ids", "int64", ("batch", "decoder_sequence"), size))
    if "lang_ids" in taken and getattr(config, "languages", None):
        found.append(Taken("lang_ids", "int64", ("batch",), len(config.languages)))
    return tuple(found)


def _table(model: Any) -> Any:
    """The input embedding; None for a class without one, some of which say so by raising (transformers 5.23)."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _main(name: str, model: Any, limit: int | None) -> Taken:
    config = model.config
    if name == "pixel_values":
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
        side: Any = getattr(vision, "image_size", 32)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return Taken(name, "float32", ("batch", getattr(vision, "num_channels", 3), height, width))
    if name == "input_features":
        sound = getattr(config, "audio_config", None) or config
        n_bins: Any = getattr(sound, "num_mel_bins", None)
        if n_bins and getattr(sound, "max_source_positions", None) and not hasattr(sound, "conv_kernel_sizes"):
            return Taken(
                name, "float32", ("batch", n_bins, 2 * sound.max_source_positions)
            )  # Whisper: two frames a position
        n_features: Any = (
            getattr(sound, "input_feat_per_channel", None)
            or n_bins
            or getattr(sound, "feature_projection_input_dim", 80)
        )
        return Taken(name, "float32", ("batch", _FRAMES, n_features))
    if name == "input_values":
        return Taken(name, "float32", ("batch", 4000))
    return Taken(name, "int64", ("batch", "sequence"), limit)
