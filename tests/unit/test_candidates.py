"""Candidates in the order of their index, and names of seeds."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_align_spec.strategies.candidates import Seeds, in_order


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 13), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_results_come_in_order_however_long_each_takes_and_nothing_is_left_running(delays, width, take):
    running = 0

    async def run():
        nonlocal running
        most = 0

        async def launch(index):
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                for _ in range(delays[index]):
                    await asyncio.sleep(0)
                return index
            finally:
                running -= 1

        found = []
        results = in_order(launch, len(delays), width)
        async for result in results:
            found.append(result)
            if len(found) == take:
                await results.aclose()
                break
        return found, most

    found, most = asyncio.run(run())
    assert found == list(range(len(found)))
    assert len(found) == min(len(delays), take or len(delays))
    assert most <= width
    assert running == 0


def test_the_first_error_in_order_is_the_one_that_is_raised_and_ends_the_others():
    ended = []

    async def launch(index):
        try:
            if index == 1:
                await asyncio.sleep(0.01)
                raise ValueError("second")
            if index == 2:
                raise KeyError("third, and first in time")
            await asyncio.sleep(10 if index == 3 else 0)
            return index
        finally:
            ended.append(index)

    async def run():
        return [result async for result in in_order(launch, 4, 4)]

    with pytest.raises(ValueError, match="second"):
        asyncio.run(run())
    assert sorted(ended) == [0, 1, 2, 3]


def test_seeds_are_functions_of_seed_and_name():
    names = [(segment, index) for segment in range(30) for index in range(30)]
    assert len({Seeds(1).integer(*name) for name in names}) == len(names)
    assert Seeds(1).integer(2, 3) == Seeds(1).integer(2, 3) != Seeds(1).integer(3, 2)
    assert Seeds(None).integer(1) != Seeds(None).integer(1)
    uniforms = [Seeds(random.Random(0).random()).uniform(*name) for name in names]
    assert all(0 <= u < 1 for u in uniforms)
    assert abs(sum(uniforms) / len(uniforms) - 0.5) < 0.05
