"""A reward model in this process: a sequence classifier of transformers on a thread of its own.

The thread takes whatever waits, up to a bound in tokens, into one forward pass. The event loop never waits for it, and
nobody who has given up is judged.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm_align_spec.options import ModelRewardOptions
from vllm_align_spec.rewards.base import Answer, JudgeError
from vllm_align_spec.rewards.http import joined

logger = logging.getLogger(__name__)


@dataclass
class _Scoring:
    """Answers that came together, and who waits for them."""

    answers: Sequence[Answer]
    future: Future[list[float]]


class ModelScorer:
    """Loads the model at once, on its thread.

    Args:
        name: the judge's, for logs.
        options: which model, and how much of it at a time.
    """

    def __init__(self, name: str, options: ModelRewardOptions) -> None:
        self._name, self._options = name, options
        self._waiting: queue.SimpleQueue[_Scoring] = queue.SimpleQueue()
        self._count = 0  # answers that wait or are judged
        self._lock = threading.Lock()
        self._loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"align-spec-{name}", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """See `rewards.base.Scorer`."""
        await asyncio.wrap_future(self._loaded)

    async def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """See `rewards.base.Scorer`."""
        if self._loaded.done():
            self._loaded.result()
        if not self._thread.is_alive():
            raise JudgeError("has lost its thread")
        with self._lock:
            if self._count + len(answers) > self._options.max_waiting:
                raise JudgeError(
                    f"has {self._count} answers waiting, of max_waiting={self._options.max_waiting}", "busy"
                )
            self._count += len(answers)
        scoring = _Scoring(answers, Future())
        scoring.future.add_done_callback(lambda _: self._forget(len(answers)))
        self._waiting.put(scoring)
        return await asyncio.wrap_future(scoring.future)

    def _forget(self, count: int) -> None:
        with self._lock:
            self._count -= count

    def _run(self) -> None:
        try:
            model = _Model(self._options)
        except Exception as error:
            logger.exception("Judge %s cannot be loaded", self._name)
            failed = JudgeError(f"cannot be loaded: {type(error).__name__}: {error}")
            self._loaded.set_exception(failed)
            while not self._waiting.empty():  # who asked before this was known
                waiting = self._waiting.get().future
                if waiting.set_running_or_notify_cancel():
                    waiting.set_exception(failed)
            return
        self._loaded.set_result(None)
        while True:
            scorings = [self._waiting.get()]
            while not self._waiting.empty():
                scorings.append(self._waiting.get())
            self._judge(model, [one for one in scorings if one.future.set_running_or_notify_cancel()])

    def _judge(self, model: _Model, scorings: Sequence[_Scoring]) -> None:
        rewards: dict[int, float] = {}
        encoded: list[tuple[int, list[int]]] = []
        places: list[tuple[_Scoring, range]] = []
        for scoring in scorings:
            try:
                ids = [model.encode(answer) for answer in scoring.answers]
            except Exception as error:
                scoring.future.set_exception(error)
                continue
            first = len(encoded)
            encoded += enumerate(ids, first)
            places.append((scoring, range(first, len(encoded))))
        try:
            for batch in _batches(encoded, self._options.max_batch_tokens):
                rewards |= zip((place for place, _ in batch), model.score([ids for _, ids in batch]), strict=True)
        except Exception as error:
            logger.exception("Judge %s failed", self._name)
            for scoring, _ in places:
                scoring.future.set_exception(JudgeError(f"failed: {type(error).__name__}: {error}"))
            return
        for scoring, places_of in places:
            scoring.future.set_result([rewards[place] for place in places_of])


def _batches(encoded: Sequence[tuple[int, list[int]]], most: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Answers of about one length together, as many as the bound on padded tokens lets."""
    batch: list[tuple[int, list[int]]] = []
    for item in sorted(encoded, key=lambda item: len(item[1])):
        if batch and (len(batch) + 1) * len(item[1]) > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class _Model:
    """The model and its tokenizer; everything here runs on the judge's thread."""

    def __init__(self, options: ModelRewardOptions) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._torch = torch
        self._options = options
        if options.device == "cpu":
            torch.set_num_threads(options.threads)  # this thread's
        self._model, told = AutoModelForSequenceClassification.from_pretrained(
            options.model,
            revision=options.revision,
            dtype=getattr(torch, options.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if told["missing_keys"]:
            raise ValueError(f"{options.model} is no reward model: it lacks {sorted(told['missing_keys'])}")
        if options.label >= self._model.config.num_labels:
            raise ValueError(f"label={options.label}, but {options.model} has {self._model.config.num_labels}")
        self._model = self._model.to(options.device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=False
        )
        limit = getattr(self._model.config, "max_position_embeddings", None) or options.max_len
        self._max_len = min(options.max_len, limit)
        self._vocab_size = self._model.get_input_embeddings().weight.shape[0]

    def encode(self, answer: Answer) -> list[int]:
        """Token ids of prompt and response, as the model reads them.

        Raises:
            JudgeError: there are too many, or none, or they are another model's, or its chat template refuses.
        """
        kind = self._options.input
        if kind == "token_ids":
            ids = [*answer.prompt_token_ids, *answer.response_token_ids]
        elif kind == "messages" and answer.messages is not None:
            try:
                text = self._render(answer)
            except Exception as error:  # templates raise what they like
                message = f"has a chat template that cannot write this conversation ({type(error).__name__}: {error})"
                raise JudgeError(message, "refused") from error
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(answer.prompt_text + answer.response_text)["input_ids"]
        if not 0 < len(ids) <= self._max_len:
            raise JudgeError(f"reads at most {self._max_len} tokens, prompt and response have {len(ids)}", "refused")
        if max(ids) >= self._vocab_size:
            raise JudgeError(f"knows no token {max(ids)}: its tokenizer is not the target's (input='token_ids')")
        return ids

    def _render(self, answer: Answer) -> str:
        messages = list(answer.messages or ())
        if answer.finished:
            text: str = self._tokenizer.apply_chat_template(joined(messages, answer.response_text), tokenize=False)
            return text
        begun = bool(messages) and messages[-1].get("role") == "assistant"
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        return text + answer.response_text

    def score(self, batch: Sequence[list[int]]) -> list[float]:
        """One forward pass over ragged rows of token ids."""
        torch = self._torch
        lengths = torch.tensor([len(ids) for ids in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for row, one in zip(ids, batch, strict=True):
            row[: len(one)] = torch.tensor(one)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        ids, mask, last = (x.to(self._options.device) for x in (ids, mask, lengths - 1))
        with torch.inference_mode():
            if hasattr(self._model, "score"):
                # Decoders: the usual head looks for the last token that is not padding, and takes an answer's own
                # padding token (often the end of sequence) for that.
                hidden = self._model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
                logits = self._model.score(hidden[torch.arange(len(batch), device=hidden.device), last])
            else:
                logits = self._model(input_ids=ids, attention_mask=mask).logits
        rewards: list[float] = logits[:, self._options.label].float().tolist()
        return rewards
