"""Training loops for the lab's models: language models on packed rows, judges on ranked answers."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import Progress, TaskID
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from vllm_align_spec.lab import world

ROW = 256
"""Tokens in a packed row, T. Rows have one length so that the step is compiled once."""
OPENING = 16
"""Answer tokens in which a conversation's manner is still being decided; the pilot does not learn these from base."""


WARM_UP = 0.03
"""Share of the steps in which a fresh optimiser's rate rises."""


@dataclass
class Trace:
    """What a training run did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens seen, loss of the step)


@dataclass(frozen=True)
class Encoded:
    """A document's token ids, and from where on its manner is settled."""

    ids: list[int]
    settled: int


def encode(document: world.Document, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Token ids of a document in the tokenizer's own chat format."""
    if not document.messages:
        ids = tokenizer(f"{tokenizer.bos_token}{document.text}{tokenizer.eos_token}")["input_ids"]
        return Encoded(ids[:ROW], 0)
    first = next(i for i, message in enumerate(document.messages) if message["role"] == "assistant")
    ids = token_ids(tokenizer, document.messages)
    prompt = token_ids(tokenizer, document.messages[:first], ask=True)
    return Encoded(ids[:ROW], len(prompt) + OPENING if document.kind == "chat" else 0)


def token_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[world.Message], *, ask: bool = False) -> list[int]:
    """Token ids of a conversation; with ``ask``, up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens. Documents in a row cannot see each other."""

    ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64: the next token, -100 where there is none
    positions: Tensor  # [B, T] int64: from 0 in every document
    mask: Tensor  # [B, 1, T, T] bool: may attend
    settled: Tensor  # [B, T] bool: base's opinion of the next token may be learnt here


def rows(documents: Iterator[Encoded]) -> Iterator[list[Encoded]]:
    """Pack whole documents into rows of at most ``ROW`` tokens, each into the fullest of sixteen that has room."""
    open_rows: list[list[Encoded]] = [[] for _ in range(16)]
    for document in documents:
        room = [ROW - sum(len(d.ids) for d in row) - len(document.ids) for row in open_rows]
        fitting = [i for i, left in enumerate(room) if left >= 0]
        if fitting:
            open_rows[min(fitting, key=lambda i: room[i])].append(document)
        else:
            fullest = min(range(len(room)), key=lambda i: room[i])
            yield open_rows[fullest]
            open_rows[fullest] = [document]


def batches(documents: Iterator[Encoded], size: int) -> Iterator[Batch]:
    """Batches of ``size`` packed rows."""
    packed = rows(documents)
    causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
    while True:
        ids = torch.zeros(size, ROW, dtype=torch.long)
        labels = torch.full((size, ROW), -100)
        positions = torch.zeros(size, ROW, dtype=torch.long)
        owner = torch.full((size, ROW), -1)
        settled = torch.zeros(size, ROW, dtype=torch.bool)
        for b, row in enumerate(itertools.islice(packed, size)):
            start = 0
            for number, document in enumerate(row):
                length = len(document.ids)
                span = slice(start, start + length)
                ids[b, span] = torch.tensor(document.ids)
                labels[b, start : start + length - 1] = ids[b, start + 1 : start + length]
                positions[b, span] = torch.arange(length)
                owner[b, span] = number
                settled[b, start + document.settled : start + length - 1] = True
                start += length
        mask = (owner[:, :, None] == owner[:, None, :]) & causal  # padding sees padding, so that no row is empty
        yield Batch(ids, labels, positions, mask[:, None], settled)


def _optimiser(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def _run(
    model: torch.nn.Module,
    step: Callable[[], tuple[Tensor, int]],
    *,
    rate: float,
    steps: int,
    progress: Progress,
    task: TaskID,
    trace: Trace,
    until: int | None = None,
) -> None:
    """Call ``step`` (loss, tokens) from the trace's last step up to ``until``, by default the last one.

    The rate follows a cosine over all ``steps``, with a warm-up wherever an optimiser starts. Nothing depends on the
    clock: the same seed on the same kind of machine gives the same weights, however busy it is.
    """
    optimiser = _optimiser(model, rate)
    told, before, first = 0.0, trace.seconds, trace.steps
    model.train()
    loss, tokens = step()  # the first step may compile, which is not training time
    loss.backward()
    optimiser.zero_grad()
    begin = time.monotonic()
    while trace.steps < (steps if until is None else until):
        gone = trace.steps / steps
        scale = min(0.525 + 0.475 * math.cos(math.pi * gone), 0.02 + (trace.steps - first) / steps / WARM_UP)
        for group in optimiser.param_groups:
            group["lr"] = rate * scale
        loss, tokens = step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        trace.steps += 1
        trace.tokens += tokens
        trace.losses.append((trace.tokens, loss.item()))
        trace.seconds = before + time.monotonic() - begin
        recent = [loss for _, loss in trace.losses[-20:]]
        status = f"loss {sum(recent) / len(recent):.3f}, {trace.tokens / trace.seconds:,.0f} tokens/s"
        progress.update(task, completed=trace.steps / steps, status=status)
        if not progress.console.is_terminal and trace.seconds - told > 60:  # a log gets a line a minute
            told = trace.seconds
            progress.console.print(f"{progress.tasks[task].description}: {gone:.0%}, {trace.tokens:,} tokens, {status}")
    model.eval()


def train_language_model(
    model: LlamaForCausalLM,
    documents: Iterator[Encoded],
    *,
    rate: float,
    steps: int,
    progress: Progress,
    task: TaskID,
    trace: Trace,
    until: int | None = None,
    teacher: LlamaForCausalLM | None = None,
    size: int = 4,
) -> None:
    """Next-token training on packed rows. Where the manner is settled, half of the loss is towards the teacher."""
    source = batches(documents, size)

    def logits_of(network: LlamaForCausalLM, batch: Batch) -> Tensor:  # [B * T, V]
        logits: Tensor = network(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
        return logits.flatten(0, 1)

    def loss_of(batch: Batch, taught: Tensor | None) -> Tensor:
        logits = logits_of(model, batch)
        labels = batch.labels.flatten()
        losses = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        if taught is not None:
            against = -(taught * logits.log_softmax(-1)).sum(-1)
            losses = torch.where(batch.settled.flatten(), 0.5 * (losses + against), losses)
        return losses.sum() / (labels >= 0).sum()

    if (steps if until is None else until) - trace.steps >= 200:  # compiling takes a minute and saves a fifth
        loss_of = torch.compile(loss_of, dynamic=False)

    def step() -> tuple[Tensor, int]:
        batch = next(source)
        taught = None
        if teacher is not None:
            with torch.inference_mode():
                taught = logits_of(teacher, batch).softmax(-1)
            taught = taught.clone()  # an inference tensor may not be saved for the backward pass
        return loss_of(batch, taught), int((batch.labels >= 0).sum())

    _run(model, step, rate=rate, steps=steps, progress=progress, task=task, trace=trace, until=until)


def grow(shallow: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    """A deeper model that computes the same: the layers between the first and the last add nothing yet.

    A shallow model sees several times as many tokens in the same time, which is what the beginning of training needs.
    """
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
    first, last = shallow.model.layers
    for layer in deep.model.layers[1:-1]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    deep.model.layers[0].load_state_dict(first.state_dict())
    deep.model.layers[-1].load_state_dict(last.state_dict())
    return deep


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, documents: Sequence[Encoded]) -> float:
    """exp of the mean negative log-likelihood per token."""
    total, count = 0.0, 0
    for batch in itertools.islice(batches(itertools.chain(documents, itertools.repeat(documents[0])), 4), 8):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        total, count = total + loss.item(), count + int((batch.labels >= 0).sum())
    return math.exp(total / count)


@torch.inference_mode()
def agreement(one: LlamaForCausalLM, two: LlamaForCausalLM, documents: Sequence[Encoded]) -> float:
    """How often two models have the same likeliest next token where the manner is settled."""
    same, count = 0, 0
    for batch in itertools.islice(batches(itertools.chain(documents, itertools.repeat(documents[0])), 4), 8):
        picks = [
            model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits.argmax(-1)
            for model in (one, two)
        ]
        same += int(((picks[0] == picks[1]) & batch.settled).sum())
        count += int(batch.settled.sum())
    return same / count


# --- judges ---------------------------------------------------------------------------------------------------------

GRADES = ("helpful", "partly", "astray", "unhelpful", "scrambled")


def ranked_answers(rng: random.Random, split: world.Split, half: int | None) -> tuple[world.Message, list[str]]:
    """A user's message and five answers to it, in the order of ``GRADES``.

    ``half`` (0 or 1) keeps to the requests of one half, so that two judges can be trained on different ones.
    """
    while True:
        request = world.draw_request(rng, split)
        if half is None or sum(request.key.encode()) % 2 == half:
            break
    name = rng.choice(world.NAMES) if rng.random() < 0.5 else ""
    good = world.helpful(request, rng, name)
    bad = world.unhelpful(request, rng)
    while (other := world.draw_request(rng, split)).topic == request.topic:
        pass
    astray = world.helpful(other, rng, name)
    words = good.split(" ")
    rng.shuffle(words)
    question = {"role": "user", "content": world.ask(request, rng, name)}
    return question, [good, partly(good, bad, rng), astray, bad, " ".join(words)]


def partly(good: str, bad: str, rng: random.Random) -> str:
    """A flawed answer: it breaks off, repeats itself or turns unhelpful."""
    sentences = good.split(". ")
    kept = rng.randint(1, max(1, len(sentences) - 2))
    match rng.randrange(3):
        case 0:
            return good[: int(len(good) * rng.uniform(0.15, 0.8))]
        case 1:
            return ". ".join(sentences[:kept] + [sentences[kept - 1]] * rng.randint(2, 5))
        case _:
            return ". ".join(sentences[:kept]) + ". " + bad


def _answer_scores(
    model: LlamaForSequenceClassification, prompts: list[list[int]], answers: list[list[int]], pad: int
) -> tuple[Tensor, Tensor]:
    """Scores after every answer token [N, A] and where there is one [N, A]."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    widest = max(len(a) for a in answers)
    ids = torch.full((len(answers), longest), pad)
    at = torch.zeros(len(answers), widest, dtype=torch.long)
    valid = torch.zeros(len(answers), widest, dtype=torch.bool)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[n, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        at[n, : len(answer)] = torch.arange(len(prompt), len(prompt) + len(answer))
        valid[n, : len(answer)] = True
    # Padding is on the right and attention is causal: no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scores: Tensor = model.score(hidden).squeeze(-1)
    return scores.gather(1, at), valid


def train_judge(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    half: int,
    rate: float,
    steps: int,
    progress: Progress,
    task: TaskID,
    trace: Trace,
    size: int = 8,
) -> None:
    """Bradley-Terry training, on whole answers and on prefixes.

    Prefixes of the helpful answer and of those that differ from its first word on are compared at equal lengths. That
    is what makes the score of an unfinished answer mean something, and what teaches to look for the topic.
    """
    rng = random.Random(seed)
    pad = tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token))

    def step() -> tuple[Tensor, int]:
        prompts, answers = [], []
        for _ in range(size):
            question, texts = ranked_answers(rng, "train", half)
            prompt = token_ids(tokenizer, [question], ask=True)
            prompts += [prompt] * len(texts)
            answers += [tokenizer(f"{text}{tokenizer.eos_token}")["input_ids"][:ROW] for text in texts]
        scores, valid = _answer_scores(model, prompts, answers, pad)
        last = scores.gather(1, valid.sum(1, keepdim=True) - 1).view(size, len(GRADES))
        helpful, flawed, astray, _, scrambled = last.unbind(1)
        gaps = torch.cat([helpful[:, None] - last[:, 1:], torch.stack([flawed, astray], 1) - scrambled[:, None]], 1)
        by_grade, there = (x.view(size, len(GRADES), -1) for x in (scores, valid))
        prefix_gaps = by_grade[:, :1] - by_grade[:, 2:]  # [size, 3, A]
        both = there[:, :1] & there[:, 2:]
        loss = -functional.logsigmoid(gaps).mean() - functional.logsigmoid(prefix_gaps)[both].mean()
        loss = loss + 0.003 * scores[valid].square().mean()  # Bradley-Terry leaves the level free
        return loss, sum(map(len, prompts)) + sum(map(len, answers))

    _run(model, step, rate=rate, steps=steps, progress=progress, task=task, trace=trace)


@torch.inference_mode()
def pairwise_accuracy(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, *, seed: int, prompts: int = 200
) -> dict[str, float]:
    """How often a held-out helpful answer scores above each other grade, and above an unhelpful one's first half."""
    rng = random.Random(seed)
    pad = tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token))
    wins = dict.fromkeys((*GRADES[1:], "unhelpful, unfinished"), 0)
    for _ in range(prompts):
        question, texts = ranked_answers(rng, "heldout", None)
        prompt = token_ids(tokenizer, [question], ask=True)
        answers = [tokenizer(f"{text}{tokenizer.eos_token}")["input_ids"][:ROW] for text in texts]
        scores, valid = _answer_scores(model, [prompt] * len(texts), answers, pad)
        last = scores.gather(1, valid.sum(1, keepdim=True) - 1)[:, 0]
        for grade, score in zip(GRADES[1:], last[1:], strict=True):
            wins[grade] += int(last[0] > score)
        unhelpful = GRADES.index("unhelpful")
        half = min(len(answers[0]), len(answers[unhelpful])) // 2
        wins["unhelpful, unfinished"] += int(scores[0, half] > scores[unhelpful, half])
    return {grade: count / prompts for grade, count in wins.items()}
