"""Inputs of transformers classes that answer unlike most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tieaudit.class_inputs import class_inputs


class _Wordless:
    """As Wav2Vec2Model of transformers 5.23: the method is there, and raises."""

    main_input_name = "input_ids"
    config = SimpleNamespace(vocab_size=7)

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError("`get_input_embeddings` not auto-handled for Wav2Vec2Model")

    def forward(self, input_ids: Any) -> Any:
        return input_ids


def test_a_class_whose_embedding_is_not_implemented_still_gets_inputs() -> None:
    (taken,) = class_inputs(_Wordless())

    assert (taken.name, taken.limit) == ("input_ids", 7)
