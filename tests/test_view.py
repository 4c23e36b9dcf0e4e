"""Laws of views: composition, inversion and shapes agree with numpy."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.view import AS_STORED, TRANSPOSED, Cast, Opaque, Reshape, Transpose, View


@st.composite
def chains(draw: st.DrawFn) -> tuple[np.ndarray, View]:
    """An array and an invertible view that fits it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    array = np.arange(math.prod(shape)).reshape(shape)
    view, current = AS_STORED, shape
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            step: Transpose | Reshape = Transpose(tuple(draw(st.permutations(range(len(current))))))
        else:
            step = Reshape(tuple(draw(st.permutations(current))))
        view, current = view.then(step), step.shape(current)
    return array, view


@given(chains())
def test_the_inverse_of_an_invertible_view_gives_the_stored_array_back(chain: tuple[np.ndarray, View]) -> None:
    array, view = chain
    seen = view.apply(array)
    assert seen.shape == view.shape(array.shape)
    inverse = view.inverse(array.shape)
    assert inverse is not None
    np.testing.assert_array_equal(inverse.apply(seen), array)


def test_two_transposes_cancel() -> None:
    assert TRANSPOSED.compose(TRANSPOSED) == AS_STORED
    assert str(AS_STORED) == "as stored"
    assert str(TRANSPOSED) == "transposed"


def test_a_cast_and_an_opaque_step_have_no_inverse() -> None:
    assert View((Cast("float16"),)).inverse((2, 2)) is None
    assert View((Opaque("dequantized"),)).inverse((2, 2)) is None


def test_three_dimensional_permutations_compose_in_the_right_order() -> None:
    # array.transpose(1,2,0).transpose(0,2,1) is transpose(1,0,2); the tempting wrong order gives (2,1,0)
    view = View().then(Transpose((1, 2, 0))).then(Transpose((0, 2, 1)))
    assert view.steps == (Transpose((1, 0, 2)),)
