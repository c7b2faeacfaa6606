"""Lets the target itself answer a data set's conversations: a drafter is to predict the target, not their authors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_align_spec.train.data import BadLineError, Complaints, Message, read


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

    A conversation is written when it has ended, into ``out`` with ``.part`` behind its name, which becomes ``out`` when
    all have: a run that fails loses nothing. One that cannot go on (its prompt is longer than the target's context, its
    template refuses it) ends with its last answer; one without any is left out.

    Args:
        target: model that vLLM serves.
        files: JSONL conversations.
        out: JSONL file to write.
        temperature: of the answers.
        max_tokens: of an answer; one that is cut off ends its conversation.
        seed: of sampled answers; conversations have seeds of their own.
        engine_args: for ``vllm.LLM``.

    Returns:
        How many conversations were written, and the lines that were left out.

    Raises:
        OSError: a file cannot be read, or ``out`` cannot be written; that is found before the target is loaded.
    """
    complaints = Complaints()
    conversations = list(read(files, complaints))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        from vllm import LLM, SamplingParams

        engine = LLM(target, **engine_args)
        tokenizer, context = engine.get_tokenizer(), engine.model_config.max_model_len
        count = 0
        written: list[list[Message]] = [[] for _ in conversations]
        left = dict(enumerate(conversations))
        while left:
            prompts: dict[int, list[int]] = {}
            for number, messages in left.items():
                asked = written[number]
                while messages and messages[0]["role"] != "assistant":
                    asked.append(messages.pop(0))
                try:
                    if messages:
                        prompts[number] = prompt(asked, tokenizer, context)
                        continue
                except BadLineError as error:
                    if all(message["role"] != "assistant" for message in asked):
                        complaints.add(json.dumps(asked or messages)[:80], str(error))
                        continue
                while asked[-1]["role"] != "assistant":
                    asked.pop()
                file.write(json.dumps({"messages": asked}, ensure_ascii=False) + "\n")
                count += 1
            if not prompts:
                break
            params = [
                SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed * 1_000_003 + number)
                for number in prompts
            ]
            outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts.values()], params, use_tqdm=True)
            left = {number: left[number] for number in prompts}
            for number, output in zip(prompts, outputs, strict=True):
                left[number].pop(0)
                written[number].append({"role": "assistant", "content": output.outputs[0].text})
                if output.outputs[0].finish_reason != "stop":
                    left[number].clear()
    unfinished.replace(out)
    return count, complaints


def prompt(messages: list[Message], tokenizer: Any, context: int) -> list[int]:
    """Token ids that ask for the next answer.

    Args:
        messages: all before it.
        tokenizer: the target's.
        context: most tokens of prompt and answer together.

    Raises:
        BadLineError: there is nothing to answer, the template refuses it, or no token of an answer would fit.
    """
    if not messages:
        raise BadLineError("it begins with an answer")
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise what they like
        raise BadLineError(f"the chat template refuses it ({error})") from None
    if len(ids) >= context:
        raise BadLineError(f"its prompt has {len(ids)} tokens, and the target's context {context}")
    return ids
