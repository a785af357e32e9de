"""Which tensors travel together, and that each arrives as it left."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qplug.machine.bundles import LARGEST, SMALL, bundles, joined, taken_apart

_DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
_SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(_DTYPES), _SHAPES), min_size=1, max_size=9))
def test_tensors_arrive_as_they_left(forms: list[tuple[torch.dtype, tuple[int, ...]]]) -> None:
    sent = [(torch.rand(shape) * 9).to(dtype) for dtype, shape in forms]
    arrived = [torch.zeros_like(tensor) for tensor in sent]
    taken_apart(joined(sent), arrived)
    for here, there in zip(sent, arrived, strict=True):
        assert torch.equal(here, there)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 100), st.integers(SMALL - 9, SMALL + 9)),
            st.sampled_from(["cpu", "cuda"]),
        ),
        max_size=60,
    )
)
def test_each_tensor_with_bytes_is_in_one_bundle(sizes: list[tuple[int, object]]) -> None:
    made = bundles(sizes)
    assert sorted(place for places in made for place in places) == [
        place for place, (size, _) in enumerate(sizes) if size
    ]
    for places in made:
        assert len({sizes[place][1] for place in places}) == 1
        if len(places) > 1:
            assert all(sizes[place][0] <= SMALL for place in places)
            assert sum(sizes[place][0] for place in places) <= LARGEST


def test_many_small_tensors_travel_at_once() -> None:
    assert len(bundles([(100, "cpu")] * 1000)) == 1
    assert len(bundles([(SMALL, "cpu")] * 20)) == 2
    assert bundles([(8, "a"), (SMALL + 1, "a"), (8, "a")]) == [[0, 2], [1]]
