"""Conversations from JSONL files, as token ids and a mask of what the assistant said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")


class BadLineError(ValueError):
    """A line that is no conversation."""


@dataclass
class Complaints:
    """Lines that were left out: how many, and the first of them with the reason."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Notes a line."""
        self.count += 1
        if len(self.first) < 10:
            self.first.append(f"{where}: {why}")


def messages_of(line: str) -> list[Message]:
    """The messages of a JSON line in OpenAI's layout (``messages``) or ShareGPT's (``conversations``).

    Raises:
        BadLineError: it is neither.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadLineError(f"no JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadLineError("no JSON object")
    found: list[Message] = []
    try:
        if "messages" in record:
            found = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
        elif "conversations" in record:
            found = [{"role": SHAREGPT_ROLES[m["from"]], "content": m["value"]} for m in record["conversations"]]
        else:
            raise BadLineError("neither messages nor conversations")
    except (KeyError, TypeError) as error:
        raise BadLineError(f"a message lacks something or has an unknown role ({error})") from None
    for message in found:
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise BadLineError(
                f"a message with role {message['role']!r} and content {type(message['content']).__name__}"
            )
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise BadLineError("half of a surrogate pair, which is no text") from None
    if not any(message["role"] == "assistant" and message["content"] for message in found):
        raise BadLineError("nobody answers")
    return found


def read(files: Sequence[Path], complaints: Complaints) -> Iterator[list[Message]]:
    """The conversations of the files; lines that are none go to the complaints."""
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    yield messages_of(line)
                except BadLineError as error:
                    complaints.add(f"{file}:{number}", str(error))


@dataclass(frozen=True)
class Example:
    """A conversation."""

    ids: Tensor  # [T] int32
    spoken: Tensor  # [T] bool: the assistant's tokens, its end token included
    messages: list[Message] | None = None  # kept of held-out conversations


def encode(messages: list[Message], tokenizer: Any, max_length: int) -> Example:
    """Token ids of a conversation in the model's own chat format.

    What the assistant said is found in the text, by rendering the conversation up to each of its messages, so a
    template needs no marks of its own.

    Raises:
        BadLineError: the template cannot render it, or rewrites earlier turns, or nothing of the assistant is left.
    """

    def render(upto: int, ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=ask)
        return text

    try:
        whole = render(len(messages), False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(number, True), render(number + 1, False)
                if not whole.startswith(before):
                    continue  # a template that shortens earlier turns: what it shows differently is not learned from
                same = (n for n, (a, b) in enumerate(zip(whole, after, strict=False)) if a != b)
                spans.append((len(before), next(same, min(len(whole), len(after)))))
    except Exception as error:  # templates raise what they like
        raise BadLineError(f"the chat template refuses it ({error})") from None
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"][:max_length], dtype=torch.int32)
    spoken = torch.zeros(len(ids), dtype=torch.bool)
    for i, (start, end) in enumerate(encoded["offset_mapping"][: len(ids)]):
        spoken[i] = any(first <= start and end <= last for first, last in spans) and end > start
    if len(ids) < 3 or not spoken[:-1].any():
        raise BadLineError("nothing of the assistant's is left")
    return Example(ids, spoken, messages)


def is_held_out(messages: list[Message], share: float) -> bool:
    """Whether a conversation is held out: by its content, so it stays so whatever else is in the files."""
    digest = hashlib.blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass
class Dataset:
    """What a run learns from and what it is judged by."""

    train: list[Example]
    held_out: list[Example]
    complaints: Complaints


def load(files: Sequence[Path], tokenizer: Any, *, max_length: int, held_out: float) -> Dataset:
    """Reads and encodes all conversations.

    Raises:
        ValueError: nothing is left on one of the sides.
    """
    complaints = Complaints()
    sides: dict[bool, list[Example]] = {True: [], False: []}
    for messages in read(files, complaints):
        try:
            example = encode(messages, tokenizer, max_length)
        except BadLineError as error:
            complaints.add(json.dumps(messages)[:80], str(error))
            continue
        held = is_held_out(messages, held_out)
        sides[held].append(example if held else Example(example.ids, example.spoken))
    if not sides[False] or not sides[True]:
        raise ValueError(
            f"{len(sides[False])} conversations to train on and {len(sides[True])} held out; both are needed. "
            f"{complaints.count} lines were left out: {'; '.join(complaints.first) or 'none'}"
        )
    return Dataset(sides[False], sides[True], complaints)


@dataclass(frozen=True)
class Batch:
    """B conversations, padded on the right."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: rows that are learned from; row i is about what follows token i
    length: Tensor  # [B] tokens of each, before padding
    numbers: Sequence[int]  # of the conversations, in their data set


def digest(examples: Sequence[Example]) -> str:
    """Tells one list of conversations from another."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.ids.numpy().tobytes() + b"/")
    return found.hexdigest()


def collate(examples: Sequence[Example], numbers: Sequence[int]) -> Batch:
    """One batch. The last row of a conversation has no next token and is masked."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for b, example in enumerate(examples):
        ids[b, : len(example.ids)] = example.ids
        mask[b, : len(example.ids) - 1] = example.spoken[:-1]
    return Batch(ids, mask, torch.tensor([len(example.ids) for example in examples]), numbers)


def order(lengths: Sequence[int], *, batch_size: int, world: int, pool: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of an epoch's batches, each of ``batch_size * world`` conversations; a last incomplete one is dropped.

    With ``pool`` > 1, conversations of like length among so many batches come together.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * world
    batches = []
    for start in range(0, len(shuffled), size * pool):
        chunk = shuffled[start : start + size * pool]
        if pool > 1:
            chunk.sort(key=lambda i: lengths[i])
        batches += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
    if pool > 1:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches
