"""Lets the target itself answer a data set's conversations: a drafter is to predict the target, not their authors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_align_spec.train.data import Complaints, Message, read


def regenerate(
    target: str,
    files: Sequence[Path],
    out: Path,
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    **engine_args: Any,
) -> tuple[int, Complaints]:
    """Writes every conversation with the assistant's messages replaced, turn by turn, by the target's own.

    Args:
        target: model that vLLM serves.
        files: JSONL conversations.
        out: JSONL file to write.
        temperature: of the answers.
        max_tokens: of an answer; one that is cut off ends its conversation.
        seed: of sampled answers; conversations have seeds of their own.
        engine_args: for ``vllm.LLM``.

    Returns:
        How many conversations were written, and the lines that were none.
    """
    from vllm import LLM, SamplingParams

    complaints = Complaints()
    conversations = list(read(files, complaints))
    written: list[list[Message]] = [[] for _ in conversations]
    left = dict(enumerate(conversations))
    engine = LLM(target, **engine_args)
    while left:
        for number, messages in left.items():
            while messages and messages[0]["role"] != "assistant":
                written[number].append(messages.pop(0))
        left = {number: messages for number, messages in left.items() if messages}
        numbers = list(left)
        if not numbers:
            break
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed * 1_000_003 + number)
            for number in numbers
        ]
        outputs = engine.chat([written[number] for number in numbers], params, use_tqdm=True)
        for number, output in zip(numbers, outputs, strict=True):
            left[number].pop(0)
            written[number].append({"role": "assistant", "content": output.outputs[0].text})
            if output.outputs[0].finish_reason != "stop":
                left[number] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for messages in written:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(written), complaints
