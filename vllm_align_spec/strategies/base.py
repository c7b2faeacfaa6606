"""What a strategy sees of a request and of the engine, and what it hands back. No vLLM here: ``engine/`` fills it in.

A strategy turns one request into any number of inner ones and yields the tokens that the client shall have, in order
and never taken back. Text, stop strings, usage and the shape of the response are not its business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from vllm_align_spec.options import RequestOptions


@dataclass(frozen=True)
class Chunk:
    """Tokens in the order in which the client shall see them."""

    token_ids: Sequence[int]
    logprobs: Sequence[Any] | None = None
    """One opaque entry a token, as the engine gave it; None unless the client asked for logprobs."""
    finish_reason: str | None = None
    """vLLM's word for why the response ended here; None if it goes on."""
    stop_reason: int | str | None = None
    control: str | None = None
    """``abandon`` or ``segment_end`` where the token processor ended the inner request; there is no token for it."""
    source: Any = None
    """The engine's own output that these tokens came from, if they are its latest; opaque."""

    def drop(self, count: int) -> Chunk:
        """The chunk without its first ``count`` tokens."""
        logprobs = None if self.logprobs is None else self.logprobs[count:]
        return replace(self, token_ids=self.token_ids[count:], logprobs=logprobs)


@dataclass(frozen=True)
class Scored:
    """What the base model thinks of given tokens."""

    probabilities: Sequence[float]
    """Untempered probability of each token after everything before it."""
    logprobs: Sequence[Any] | None
    """Opaque entries fit for `Chunk.logprobs`; None unless the client asked for logprobs."""


@dataclass(frozen=True)
class Request:
    """One choice of one prompt, as the client asked for it."""

    options: Sequence[RequestOptions]
    prompt_token_ids: Sequence[int]
    prompt_text: str | None
    messages: Sequence[Mapping[str, Any]] | None
    """The conversation that the prompt was rendered from, in the chat API's shape; None if there was none."""
    max_tokens: int
    min_tokens: int
    room: int
    """Tokens that the engine's context still holds after the prompt; at least ``max_tokens``."""
    stop_token_ids: Sequence[int]
    """Every id that ends a response: end-of-sequence ids of model and tokenizer, then the client's own."""
    bends: Mapping[str, str] = field(default_factory=dict)
    """What else bends or hides the base model's distribution in this request: name=value, and how to do without."""
    logprobs_of_ids: bool = False
    """Whether the client asked for the log-probabilities of token ids that it named."""
    logprobs: bool = False
    """Whether the client asked for log-probabilities."""
    temperature: float = 1.0
    seed: int | None = None
    """The choice's own."""
    n: int = 1
    """How many choices the client asked for."""
    grammar: str | None = None
    """The structured output asked for, and who enforces it, in one canonical text."""
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    truncates: Mapping[str, str] = field(default_factory=dict)
    """What cuts the sampled distribution (top-p and kin): name=value, and how to do without."""
    scope: str = ""
    """Names whatever else the model's distribution depends on and who may share what is learnt of it: cache salt, LoRA
    adapter."""

    def option(self, kind: type[Any]) -> Any:
        """The request's options of one method."""
        return next(options for options in self.options if isinstance(options, kind))


@dataclass(frozen=True)
class CompanionFacts:
    """What admission must know about a second model in the worker."""

    role: str
    max_len: int
    """Tokens of the longest sequence that it can follow."""
    max_candidates: int
    bridged: bool
    """Whether it has other tokens than the target, and so a prompt of its own."""
    max_slots: int | None
    """Requests that it follows at once; None if as many as the engine runs."""


@dataclass(frozen=True)
class EngineFacts:
    """What admission must know about the engine."""

    draft_method: str | None
    """Method of speculative decoding; None without it."""
    draft_sampling: str
    """How drafts are sampled: ``greedy`` or ``probabilistic``."""
    rejection_method: str
    fixed_draft_length: bool
    """False if the engine changes the number of draft tokens, or how many it verifies, from step to step."""
    shards_sampling: bool
    """Whether tensor-parallel ranks sample different parts of the batch."""
    scores_are_logprobs: bool
    """Whether the engine reports log-probabilities rather than logits where it is asked for them."""
    pilot: bool
    """Whether the operator configured a pilot for WSD's hand-over mode."""
    control_ids: bool
    """Whether the model has token ids to spare by which a processor can end a request."""
    reasoning: bool
    """Whether grammars only begin where a reasoning parser says that reasoning has ended."""
    companions: Mapping[str, CompanionFacts] = field(default_factory=dict)
    render: Callable[[str, str | None, Request], Sequence[int]] = lambda *_: []
    """Companion, system prompt, request -> token ids of its prompt as the companion would write it."""
    rewards: Sequence[str] = ()
    """Names of the judges that the operator configured."""
    max_logprobs: int = 20
    """Most log-probabilities of one position that the engine gives; -1 for all."""


class Engine(Protocol):
    """The engine as one choice of one request sees it. Closing a generator aborts what it launched."""

    @property
    def facts(self) -> EngineFacts:
        """What admission knew."""
        ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        min_tokens: int,
        arguments: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        drawn: bool = False,
        reported: bool = True,
        whole: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        """Continues a prompt with the request's own sampling parameters, except those given.

        Args:
            prompt_token_ids: what to continue.
            max_tokens: most tokens to generate.
            min_tokens: fewest before a stop id may end it.
            arguments: for the token processors in the worker; None for an ordinary request.
            temperature: instead of the request's, and then nothing but ``top_k`` cuts the distribution.
            top_k: likeliest tokens that are sampled from, with ``temperature``; 0 for all.
            seed: instead of the choice's own.
            drawn: the worker draws every token, so a row that vLLM samples from has only one, and how it does that is
                of no consequence but for the time it takes.
            reported: whether the worker's report is wanted, which several requests at once cannot have.
            whole: one chunk at the end, for who does nothing with a part, not even count what an aborted request cost:
                tokens one by one cost this process time.
        """
        ...

    async def candidates(self, prompt_token_ids: Sequence[int], count: int) -> Sequence[tuple[int, float]]:
        """The likeliest next tokens with their untempered log-probabilities, likeliest first."""
        ...

    async def judge(self, name: str, responses: Sequence[Sequence[int]]) -> list[float]:
        """A judge's rewards of responses to the request's prompt, unfinished ones among them.

        Args:
            name: one of `EngineFacts.rewards`; empty for the only one.
            responses: their token ids. One that ends with a stop id, or holds a stop string, is finished.

        Raises:
            JudgeError: it gave none.
        """
        ...

    def stop_at(self, response: Sequence[int]) -> int | None:
        """How many tokens of a response there are up to the end of its first stop string; None if it has none."""
        ...

    async def worker_reports(self) -> Sequence[Mapping[str, Any] | None]:
        """The token processor's report of each inner request of this choice that had arguments, in order."""
        ...

    async def score(self, prompt_token_ids: Sequence[int], start: int) -> Scored:
        """The base model's opinion of ``prompt_token_ids[start:]``; ``start`` is at least 1."""
        ...

    def encode(self, prompt_token_ids: Sequence[int], text: str) -> tuple[list[int], list[int]]:
        """Tokens of a text that follows a prompt.

        Returns:
            token ids, and for each the number of characters of ``text`` up to its end.
        """
        ...

    def draft(self, request: Request) -> AsyncGenerator[str, None]:
        """Text of the pilot's greedy answer, a chunk of its tokens at a time, until it ends by itself.

        Raises:
            PilotError: the pilot is down, slow or answers nonsense.
        """
        ...


class StrategyError(Exception):
    """A method cannot give the response that was asked for, through no fault of the server.

    Args:
        message: what happened, for the client.
    """


class PilotError(Exception):
    """The pilot of WSD's hand-over mode did not deliver.

    Args:
        message: what happened, for the client.
        timed_out: whether it was too slow, rather than wrong.
    """

    def __init__(self, message: str, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


Notes = dict[str, Any]
"""What a strategy remembers of one choice for its report."""


class Strategy(Protocol):
    """A method on the response plane. Instances hold no state of a request."""

    @property
    def method(self) -> str:
        """Its name."""
        ...

    control: ClassVar[bool]
    """Whether its token processor ends requests by control ids."""
    structured: ClassVar[bool]
    """Whether it can do with structured output."""
    adapters: ClassVar[bool]
    """Whether it can do with a LoRA adapter on the target."""

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses what cannot be honoured.

        Raises:
            OptionError: with a message for the client.
        """
        ...

    def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """The response of one choice, ending with the chunk that carries a finish reason."""
        ...

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """What happened to one choice.

        Args:
            notes: as ``run`` left them.
            workers: the token processor's report of each inner request that had one, in order; None for one that did
                not come.
            tokens: response tokens that the client received.
            emitted: response tokens that ``run`` yielded; more than ``tokens`` where a stop string cut some off.
        """
        ...

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Adds to the reports of a request's choices what only all of them together tell."""
        ...
