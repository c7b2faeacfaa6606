"""A scripted engine for strategies that let a judge choose: whole segments of a known law, and a table of rewards."""

import asyncio
import random

from vllm_align_spec.strategies.base import Chunk, EngineFacts, Request

FACTS = EngineFacts(
    draft_method=None,
    draft_sampling="greedy",
    rejection_method="standard",
    fixed_draft_length=True,
    shards_sampling=False,
    scores_are_logprobs=True,
    pilot=False,
    control_ids=True,
    reasoning=False,
    rewards=("good", "other"),
)


def request(*options, **changes):
    known = {
        "prompt_token_ids": [5, 6, 7],
        "prompt_text": "a prompt",
        "messages": None,
        "max_tokens": 20,
        "min_tokens": 0,
        "room": 100,
        "stop_token_ids": [2, 3],
        "temperature": 1.0,
    }
    return Request(options=options, **(known | changes))


class Script:
    """Draws what follows a prompt from ``law``, by the seed it is given.

    Args:
        law: given the tokens so far, pairs of a probability and a list of chunks.
        reward: of a response.
        slow: how many turns of the event loop a continuation takes.
    """

    def __init__(self, law, reward=lambda response: 0.0, slow=lambda chunks: 0, stop=None):
        self.law, self.reward, self.slow, self.stop = law, reward, slow, stop
        self.prompt_len = 3
        self.calls, self.judged, self.open, self.most_open = [], [], 0, 0

    async def generate(self, prompt_token_ids, *, max_tokens, min_tokens, arguments=None, **more):
        self.calls.append(
            {"prompt": list(prompt_token_ids), "max": max_tokens, "min": min_tokens, "arguments": arguments, **more}
        )
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            outcomes = self.law(list(prompt_token_ids[self.prompt_len :]))
            seed = more.get("seed")
            (chunks,) = random.Random("the choice's own" if seed is None else seed).choices(
                [o[1] for o in outcomes], [o[0] for o in outcomes]
            )
            for _ in range(self.slow(chunks)):
                await asyncio.sleep(0)
            for chunk in chunks:
                await asyncio.sleep(0)
                yield chunk
        finally:
            self.open -= 1

    async def judge(self, name, responses):
        await asyncio.sleep(0)
        self.judged += [(name, list(response)) for response in responses]
        found = [self.reward(tuple(response)) for response in responses]
        for reward in found:
            if isinstance(reward, Exception):
                raise reward
        return found

    def stop_at(self, response):
        return self.stop(list(response)) if self.stop else None

    async def worker_reports(self):
        return []


def play(strategy, asked, script):
    """All chunks of one choice, and its notes."""
    notes = {}

    async def collect():
        return [chunk async for chunk in strategy.run(asked, script, notes)]

    chunks = asyncio.run(collect())
    assert script.open == 0, "something still runs"
    return chunks, notes


def tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def segment(*token_ids, finish=None):
    """An inner request that ended at a boundary, or with ``finish``."""
    if finish is None:
        return [Chunk(list(token_ids), None, control="segment_end")]
    return [Chunk(list(token_ids), None, finish)]
