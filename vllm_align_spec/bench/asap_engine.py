"""What the parts of bench `asap` that need an engine share: starting one, and driving many requests through it."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import PAUSE_S

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

Report = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    grammar: dict[str, Any]
    """Keyword arguments of vLLM's ``StructuredOutputsParams``."""
    seed: int
    max_tokens: int
    mode: str | None = None
    """Value of ``asap``; None leaves the grammar to vLLM alone."""
    salt: str = ""
    """``cache_salt``: requests that differ in it share no trie."""
    max_attempts: int = 64


@dataclass
class Answer:
    """What a client received, and what the report says of it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    """Instead of a response: no attempt was accepted."""
    launched: float = 0.0
    """Seconds since the first launch."""
    finished: float = 0.0
    report: Report = field(default_factory=dict)
    """Of the request's only choice; empty where no method was asked for, or not asked to be looked up."""

    @property
    def log_weight(self) -> float | None:
        """log v of the accepted attempt: log P(response) - log of the probability with which it was drawn."""
        weight: float | None = self.report.get("log_weight")
        return weight


def drive(
    engine: LLM,
    asks: Sequence[Ask],
    lanes: int,
    *,
    reports: bool = True,
    done: Callable[[], None] | None = None,
) -> tuple[float, list[Answer]]:
    """Keeps ``lanes`` requests running, launched in order, until all are answered.

    Args:
        engine: where they run.
        asks: the requests.
        lanes: how many run at once.
        reports: whether to look up what happened, when the clock has stopped.
        done: called whenever one is answered.

    Returns:
        seconds from the first launch to the last answer, and the answers in launch order.
    """
    time.sleep(PAUSE_S)
    seconds, answers = engine.llm_engine.call(_drive(engine, asks, lanes, reports, done))
    return seconds, answers


async def _drive(
    engine: LLM, asks: Sequence[Ask], lanes: int, reports: bool, done: Callable[[], None] | None
) -> tuple[float, list[Answer]]:
    from vllm_align_spec.engine import frontend

    ids = [f"bench-{uuid.uuid4().hex}" for _ in asks]
    answers = [Answer() for _ in asks]
    waiting = iter(range(len(asks)))

    async def lane() -> None:
        for i in waiting:
            answers[i].launched = time.perf_counter() - began
            await _answer(engine.llm_engine.engine, asks[i], ids[i], answers[i])
            answers[i].finished = time.perf_counter() - began
            if done is not None:
                done()

    began = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(lanes)))
    seconds = time.perf_counter() - began
    if reports:
        for i, answer in enumerate(answers):
            found = await frontend.of(engine.llm_engine.engine).reports.find(ids[i]) if asks[i].mode else None
            if found is not None and found["choices"]:
                answer.report = found["choices"][0]
    return seconds, answers


async def _answer(engine: Any, ask: Ask, request_id: str, answer: Answer) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    params = SamplingParams(
        temperature=1.0,
        seed=ask.seed,
        max_tokens=ask.max_tokens,
        structured_outputs=StructuredOutputsParams(**ask.grammar),
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"asap": ask.mode, "asap_max_attempts": ask.max_attempts} if ask.mode else None,
    )
    prompt: dict[str, Any] = {"prompt_token_ids": list(ask.prompt)}
    if ask.salt:
        prompt["cache_salt"] = ask.salt
    try:
        async with aclosing(engine.generate(prompt, params, request_id)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                answer.token_ids = list(completion.token_ids)
                answer.text = completion.text
                answer.finish_reason = completion.finish_reason
    except Exception as error:
        if "no attempt of" not in str(error):  # anything else is the bench's own failure
            raise
        answer.error = str(error)


def prompts(engine: LLM, kind: Any) -> list[tuple[int, ...]]:
    """Token ids of the lab's held-out prompts of a kind."""
    tokenizer = engine.get_tokenizer()
    return [
        tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for messages in lab.heldout_prompts(kind)
    ]


_STRING, _INTEGER, _BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_FIELDS: dict[str, dict[str, Any]] = {
    "person": {"name": _STRING, "age": _INTEGER, "city": _STRING, "member": _BOOLEAN},
    "order": {"order": _INTEGER, "item": _STRING, "count": _INTEGER, "to": _STRING, "city": _STRING},
    "product": {"product": _STRING, "price": _INTEGER, "colours": {"type": "array", "items": _STRING}},
    "recipe": {"cook": _STRING, "dish": _STRING, "guests": _INTEGER, "minutes": _INTEGER},
    "meeting": {"host": _STRING, "hour": _INTEGER, "room": _INTEGER, "online": _BOOLEAN},
}


def record_schema(question: str) -> str:
    """The JSON schema of the record that one of the lab's prompts asks for (`lab.world.record`)."""
    noun = question.partition(":")[0].split()
    (fields,) = (_FIELDS[word] for word in noun if word in _FIELDS)
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return json.dumps(schema)


def records(engine: LLM) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Prompt and grammar of each of the lab's held-out requests for a record."""
    schemas = [{"json": record_schema(messages[-1]["content"])} for messages in lab.heldout_prompts("json")]
    return list(zip(prompts(engine, "json"), schemas, strict=True))


SUMS = r"""
root ::= (number " " [-+*] " " number " = " number ". ")+ "The answer is " number "."
number ::= [0-9] | [1-9] [0-9]
"""


def products(engine: LLM) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Prompt and grammar of the lab's held-out products of three digits, whose working shall have two at most."""
    grammar = {"grammar": SUMS}
    found = []
    for messages, prompt in zip(lab.heldout_prompts("arithmetic"), prompts(engine, "arithmetic"), strict=True):
        question = messages[-1]["content"]
        factors = [int(number) for number in re.findall(r"[0-9]+", question)]
        if re.search(r"[*]|Multiply|boxes", question) and math.prod(factors) > 99:
            found.append((prompt, grammar))
    return found


def steady(answers: Sequence[Answer], lanes: int) -> tuple[list[Answer], float]:
    """What was received, and the seconds in which it was, while every lane was busy with its second request or a later
    one: how long the last requests take, and how many lanes idle then, is not what throughput means."""
    begins = sorted(answer.finished for answer in answers)[lanes - 1]
    ends = max(answer.launched for answer in answers)
    assert ends > begins, "enough requests for a steady state"
    return [answer for answer in answers if begins < answer.finished <= ends], ends - begins


def host_ms(answers: Iterable[Answer]) -> float:
    """Milliseconds that the processor worked on the host for these requests."""
    return float(sum(answer.report.get("host_ms", 0.0) for answer in answers))
