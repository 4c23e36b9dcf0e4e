"""Outputs of every shape become arrays under names that say where they are."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tieaudit.errors import UsageError  # noqa: E402
from tieaudit.floor import difference  # noqa: E402
from tieaudit.nested import array_of, arrays_of, tensor_of, tensors_of  # noqa: E402

Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Answer:
    logits: Any
    more: Any = None


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.ones(1), ["output"]),
        (None, []),
        ({"a": torch.ones(1), "b c": torch.ones(1), 3: torch.ones(1)}, ["a", "['b c']", "[3]"]),
        ((torch.ones(1), [Answer(torch.ones(1))]), ["[0]", "[1][0].logits"]),
        (Answer(torch.ones(1), {"x": None, "y": (torch.ones(1),)}), ["logits", "more.y[0]"]),
        (Pair(torch.ones(1), torch.ones(1)), ["left", "right"]),
        (torch.max(torch.ones(2, 2), 0), ["[0]", "[1]"]),
        (collections.deque([torch.ones(1)]), ["[0]"]),
        ({"loss": 0.5, "n": 3, "ok": True, "name": "a"}, ["loss", "n", "ok", "name"]),
        (types.SimpleNamespace(scores=torch.ones(1), seconds=0.5, _hidden=torch.ones(1)), ["scores"]),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), ["[0]", "[1]"]),
        (torch.nn.utils.rnn.pack_sequence([torch.ones(2)]), ["data", "batch_sizes"]),
    ],
)
def test_every_nesting_is_taken_apart_under_names_that_say_where(value: Any, names: list[str]) -> None:
    assert list(arrays_of(value)) == names


def test_a_models_output_and_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(
        logits=torch.ones(1, 2), past_key_values=transformers.DynamicCache(), hidden_states=(torch.ones(1),) * 2
    )
    assert list(tensors_of(output)) == ["logits", "hidden_states[0]", "hidden_states[1]"]


def test_a_value_that_contains_itself_ends() -> None:
    value: list[Any] = [torch.ones(1)]
    value.append(value)
    assert list(tensors_of(value)) == ["[0]"]


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "int64", "bool", "complex64"])
def test_every_element_type_keeps_its_bits_there_and_back(kind: str) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(getattr(torch, kind)).reshape(2, 2)
    array = array_of(tensor)
    assert array.dtype.name == kind and array.shape == (2, 2)
    back = tensor_of(array)
    assert back.dtype == tensor.dtype and back.tolist() == tensor.tolist()


def test_lazy_views_sparse_and_transposed_tensors_are_what_they_show() -> None:
    z = torch.tensor([1 + 2j])
    assert array_of(z.conj()).tolist() == [1 - 2j]
    assert array_of(torch.eye(2).to_sparse()).tolist() == [[1, 0], [0, 1]]
    assert array_of(torch.arange(6).view(2, 3).mT).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_an_output_on_the_meta_device_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match=r"logits: expected an output with values, found a tensor on the meta device"):
        arrays_of({"logits": torch.ones(1, device="meta")})


def test_integers_booleans_and_texts_are_compared_exactly_and_half_precision_by_its_own_rounding() -> None:
    one = arrays_of({"ids": torch.tensor([1, 2]), "ok": torch.tensor([True]), "name": "a"})
    assert difference(one, arrays_of({"ids": torch.tensor([1, 2]), "ok": torch.tensor([True]), "name": "a"})).equal
    assert difference(one, {**one, "ids": np.array([1, 3])}).problem == "ids: 1 of 2 int64 elements differ"
    assert difference(one, {**one, "ok": np.array([False])}).problem
    assert difference(one, {**one, "name": np.array("b")}).problem
    assert (
        array_of(torch.ones(1, dtype=torch.bfloat16)).dtype == ml_dtypes.bfloat16
    )  # float32 would get its tight bound


def test_a_tensor_on_one_side_only_is_a_problem_and_not_skipped() -> None:
    found = difference(arrays_of((torch.ones(1), None)), arrays_of((torch.ones(1), torch.ones(1))))
    assert found.problem == "the outputs [1] are on one side only"
