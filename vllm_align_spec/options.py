"""What an operator and a request may say to us, and nothing else.

Engine options are one tree under ``--additional-config '{"align_spec": {...}}'``. Request options are flat keys with
their method's prefix in ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``), because HTTP's field has no nesting.
Keys are names: no option is ever an import path, and only engine options name models or addresses.

This module imports neither vLLM nor torch: the API server, the workers and the command line all read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_align_spec import disabled

MAX_WINDOW = 64
"""Largest ``wsd_window``; the worker keeps this many log-probabilities per request."""

MAX_STOP_IDS = 64
"""Most stop token ids that a request which uses WSD or ASAp may name, end-of-sequence ids included."""


class OptionError(ValueError):
    """A request or engine option that cannot be honoured. The message names the option, the value and what would be.

    Args:
        message: the whole sentence.
        option: name of the option at fault, for metrics; never a name that only a client made up.
    """

    def __init__(self, message: str, option: str = "unknown") -> None:
        super().__init__(message)
        self.option = option


class _Tree(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PilotOptions(_Tree):
    """Where the hand-over pilot of WSD runs: an endpoint that exists, or a model that we start beside the server."""

    url: str | None = Field(None, pattern=r"^https?://", description="Base URL of an OpenAI-compatible API, up to /v1.")
    model: str = Field(description="Served model name at `url`, or, without `url`, the model that we start.")
    engine_args: tuple[str, ...] = Field((), description="More `vllm serve` arguments for a pilot that we start.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key of `url`.")
    timeout_s: float = Field(30.0, gt=0, le=600, description="Longest wait for one chunk of the pilot's draft.")
    chunk_tokens: int = Field(32, ge=4, le=512, description="Pilot tokens per call.")

    @model_validator(mode="after")
    def _engine_args_need_our_pilot(self) -> PilotOptions:
        if self.url is not None and self.engine_args:
            raise ValueError("engine_args belong to a pilot that we start: drop them or drop url")
        return self


class WsdEngineOptions(_Tree):
    """Engine options of weak-to-strong decoding."""

    pilot: PilotOptions | None = Field(None, description="The pilot of `wsd=handover`; `shared` needs none.")


class AsapShareOptions(_Tree):
    """Tries that replicas of one model have in common, through actors of a Ray cluster."""

    address: str | None = Field(
        None,
        pattern="^ray://",
        description="Of the cluster, where the server is no part of one: `ray://HOST:10001`. Ray Serve's replicas are.",
    )
    interval_s: float = Field(5.0, ge=0.05, le=3600, description="Time between two exchanges of what is new.")
    shards: int = Field(1, ge=1, le=64, description="Actors among which the tries are divided.")
    max_bytes: int = Field(2**30, ge=2**16, le=2**40, description="Most memory of one actor's tries, in bytes.")


class AsapEngineOptions(_Tree):
    """Engine options of grammar-aligned sampling."""

    max_bytes: int = Field(
        256 * 2**20, ge=2**16, le=2**40, description="Most memory that the tries of one worker take, in bytes."
    )
    warm_up: bool = Field(
        False,
        description="Load the compiled code at start (some seconds) and not with the first request that needs it.",
    )
    save_path: str | None = Field(
        None, description="Folder in which tries are kept from one start of the engine to the next; none by default."
    )
    save_interval_s: float = Field(60.0, ge=0, description="Shortest time between two savings while requests come.")
    share: AsapShareOptions | None = Field(None, description="Share tries with other replicas; `{}` for the defaults.")


class CompanionOptions(_Tree):
    """A second model in the worker, which follows requests beside the target."""

    model: str = Field(description="Folder or repository with config.json and safetensors.")
    revision: str | None = Field(None, description="Branch, tag or commit of a repository.")
    role: Literal["reward", "lm"] = Field(
        description="`reward`: a sequence classifier with one label, which scores. `lm`: a causal language model."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and cache; `auto` is the target's."
    )
    max_slots: int | None = Field(None, ge=1, description="Requests that it follows at once; default --max-num-seqs.")
    max_len: int | None = Field(
        None, ge=16, description="Longest sequence in its own tokens; default --max-model-len, never more than it can."
    )
    max_candidates: int = Field(40, ge=1, le=256, description="`reward`: most tokens that it scores for each row.")


class _RewardOptions(_Tree):
    """What every judge has: how long it may take, and when it is left alone for a while."""

    timeout_s: float = Field(10.0, gt=0, le=600, description="Longest wait for one scoring, retries included.")
    breaker_failures: int = Field(5, ge=1, le=1000, description="Failures in a row after which nobody asks it.")
    breaker_s: float = Field(10.0, gt=0, le=3600, description="For how long; then one scoring tries it again.")


_Input = Literal["messages", "text", "token_ids"]


class ModelRewardOptions(_RewardOptions):
    """A sequence classifier of transformers, on a thread of the API server."""

    kind: Literal["model"]
    model: str = Field(description="Name or path; safetensors only, and no code of the repository's is run.")
    revision: str | None = Field(None, description="Its revision, where `model` is a name.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of its weights in memory.")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d{1,3})?)$", description="Where it runs.")
    threads: int = Field(1, ge=1, le=256, description="Threads of its operators on a CPU.")
    input: _Input = Field(
        "messages",
        description="What it reads: the conversation in its own chat template (or text, where there is none), the "
        "text in its own tokens, or the tokens of the target, if they share a tokenizer.",
    )
    label: int = Field(0, ge=0, description="Which of its outputs is the reward.")
    max_len: int = Field(4096, ge=1, description="Most tokens of prompt and response; its own limit holds as well.")
    max_batch_tokens: int = Field(8192, ge=1, description="Most tokens, padding included, of one forward pass.")
    max_waiting: int = Field(1024, ge=1, description="Most answers that wait for it; more are refused.")


class HttpRewardOptions(_RewardOptions):
    """A pooling server of vLLM's."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://", description="Base URL of the server, up to the route.")
    route: Literal["classify", "pooling"] = Field("classify", description="The route that is asked.")
    model: str | None = Field(None, description="Served model name; the server's only one if left out.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key of `url`.")
    input: _Input = Field("messages", description="What it is sent, as for a model; messages go one by one.")
    label: int = Field(0, ge=0, description="Which of its outputs is the reward.")
    retries: int = Field(2, ge=0, le=20, description="Further tries where the server is busy, broken or away.")
    backoff_s: float = Field(0.1, gt=0, le=60, description="Wait before the first of them; it doubles with each.")
    max_concurrency: int = Field(64, ge=1, le=4096, description="Most requests in flight; more wait.")


class ProgramRewardOptions(_RewardOptions):
    """A program: one of ours, or one that a package registered in the group ``vllm_align_spec.rewards``."""

    kind: Literal["program"]
    program: str = Field(description="Its name.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="What it is made with.")


RewardOptions = Annotated[ModelRewardOptions | HttpRewardOptions | ProgramRewardOptions, Field(discriminator="kind")]
_RewardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class ReportOptions(_Tree):
    """How many finished requests' reports stay readable, and for how long."""

    max_reports: int = Field(4096, ge=1, le=1_000_000, description="Reports kept per API server, oldest dropped first.")
    max_age_s: float = Field(600.0, gt=0, description="Age at which a report is dropped.")


class EngineOptions(_Tree):
    """The tree under ``additional_config["align_spec"]``."""

    enabled: bool = Field(True, description="False leaves a stock vLLM (kill switch).")
    control_ids: tuple[int, int, int] | None = Field(
        None, description="Token ids that no text contains, by which methods end requests; found by itself if possible."
    )
    reports: ReportOptions = Field(default_factory=lambda: ReportOptions())
    wsd: WsdEngineOptions = Field(default_factory=lambda: WsdEngineOptions())
    asap: AsapEngineOptions = Field(default_factory=lambda: AsapEngineOptions())
    companions: dict[str, CompanionOptions] = Field(
        default_factory=dict, description="Second models in the worker, by the names under which requests know them."
    )
    rewards: dict[_RewardName, RewardOptions] = Field(
        default_factory=dict, description="Judges of responses, by the names that requests call them."
    )


class RequestOptions(BaseModel):
    """Base of every method's request options: one class per method, keys flat and prefixed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    method: ClassVar[str]
    """The method's name, its switch key, and (with ``_``) the prefix of its other keys."""

    align_spec_strict: bool = Field(
        False,
        description="End the request with an error, instead of plain decoding, if the method fails inside a step.",
    )


class WsdOptions(RequestOptions):
    """Request options of weak-to-strong decoding (arXiv 2506.07434, section 3)."""

    method: ClassVar[str] = "wsd"

    wsd: Literal["shared", "handover"] = Field(
        description="`shared`: the engine's draft model is the pilot. `handover`: the pilot runs at its own endpoint."
    )
    wsd_gamma: float = Field(
        0.8, gt=0, le=1, description="Geometric mean of the base model's probabilities at which it takes over."
    )
    wsd_window: int = Field(6, ge=1, le=MAX_WINDOW, description="Draft tokens in that mean; at least so many are kept.")
    wsd_max_draft: int = Field(512, ge=1, le=65536, description="Draft tokens after which the base model takes over.")
    wsd_fallback: Literal["error", "base"] = Field(
        "error", description="`handover` only: what follows when the pilot fails, an error or plain decoding."
    )


class AsapOptions(RequestOptions):
    """Request options of grammar-aligned sampling (arXiv 2405.21047; ``exact``: arXiv 2510.01902)."""

    method: ClassVar[str] = "asap"

    asap: Literal["adaptive", "exact", "weighted"] = Field(
        description="`adaptive`: as published, better with every sample. `exact`: from the model's distribution given "
        "the grammar. `weighted`: one attempt a choice, with its importance weight in the report."
    )
    asap_max_attempts: int = Field(
        64, ge=1, le=4096, description="Attempts per choice before it fails; `weighted` makes one."
    )


_On = Annotated[Literal["on"], BeforeValidator(lambda value: "on" if value in (True, 1) else value)]
"""A switch without modes; JSON's true reaches vllm_xargs as 1."""


_Weight = Annotated[float, Field(ge=-1000, le=1000)]


class ArgsOptions(RequestOptions):
    """Request options of reward-guided search (ARGS, arXiv 2402.01694, section 3)."""

    method: ClassVar[str] = "args"

    args: _On = Field(description="Adds a reward model's score to the likeliest next tokens.")
    args_reward: str | list[str] | None = Field(
        None, description="Companions with the role `reward`; not needed where there is only one."
    )
    args_weight: _Weight | list[_Weight] = Field(
        1.0, description="w, of all rewards or one for each; 0 is decoding among the top k."
    )
    args_top_k: int = Field(10, ge=1, le=256, description="Next tokens that are scored; all others are excluded.")
    args_entropy_gate: float = Field(
        0.0, ge=0, le=20, description="Entropy of a row, in nats, up to which no reward is added."
    )

    @property
    def weights(self) -> list[float]:
        """One for each reward that was named."""
        given = self.args_weight if isinstance(self.args_weight, list) else [self.args_weight]
        return given * len(self.rewards) if len(given) == 1 and len(self.rewards) > 1 else given

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards; empty where none was named."""
        return [self.args_reward] if isinstance(self.args_reward, str) else self.args_reward or []

    @model_validator(mode="after")
    def _weights_fit_rewards(self) -> ArgsOptions:
        if len(self.weights) != max(1, len(self.rewards)) or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(
                f"args_weight={self.args_weight} is not accepted for args_reward={self.args_reward}; accepted: one "
                "number, or one for each reward, each of which is named once"
            )
        return self


class DeraOptions(RequestOptions):
    """Request options of decoding-time realignment (DeRa, arXiv 2402.02992, equation 8)."""

    method: ClassVar[str] = "dera"

    dera: _On = Field(description="Decodes between, or beyond, the served model and an aligned one.")
    dera_model: str | None = Field(
        None, description="Companion with the role `lm`: the aligned model; not needed where there is only one."
    )
    dera_lambda: float = Field(
        1.0, ge=0, le=10, description="0 is the served model, 1 the aligned one, more goes beyond it."
    )


class PadOptions(RequestOptions):
    """Request options of personalised alignment (PAD, arXiv 2410.04070, section 3.3)."""

    method: ClassVar[str] = "pad"

    pad: _On = Field(description="Adds what a personalised model prefers among the likeliest next tokens.")
    pad_model: str | None = Field(None, description="Companion with the role `lm`; not needed where there is only one.")
    pad_weight: float = Field(1.0, ge=-10, le=10, description="w; 0 is decoding among the top k.")
    pad_top_k: int = Field(10, ge=1, le=256, description="Next tokens that are compared; all others are excluded.")
    pad_persona: str | None = Field(
        None, max_length=8192, description="System prompt of the companion alone; needs chat messages."
    )


class GenarmOptions(RequestOptions):
    """Request options of generation with an autoregressive reward model (GenARM, arXiv 2410.08193, equation 8)."""

    method: ClassVar[str] = "genarm"

    genarm: _On = Field(description="Multiplies the model by an autoregressive reward model.")
    genarm_model: str | None = Field(
        None, description="Companion with the role `lm`; not needed where there is only one."
    )
    genarm_alpha: float = Field(1.0, ge=0, le=10, description="Exponent 1 / beta; 0 is plain decoding.")


class CardsOptions(RequestOptions):
    """Request options of cascade reward sampling (arXiv 2406.16306, section 4)."""

    method: ClassVar[str] = "cards"

    cards: _On = Field(description="Switches the method on.")
    cards_reward: str = Field("", description="Name of the judge; may be left out where the engine has only one.")
    cards_threshold: float = Field(
        allow_inf_nan=False, description="r*, the reward asked of a whole response; `vllm-align-spec calibrate`."
    )
    cards_alpha: float = Field(0.5, ge=0, le=1, description="How near r* the threshold begins; 1: at r*.")
    cards_beta: float = Field(0.7, ge=0.01, le=100, description="Temperature of acceptance, and of sampling.")
    cards_entropy: float = Field(
        3.0, ge=0, le=100, description="Entropy of the next token, in nats, at which a segment ends."
    )
    cards_top_k: int = Field(40, ge=0, le=1_000_000, description="Likeliest tokens that are sampled from; 0: all.")
    cards_max_tries: int = Field(21, ge=1, le=1024, description="Candidates per segment; the last takes the best.")
    cards_candidates: int = Field(2, ge=1, le=64, description="How many of them are under way at once.")
    cards_fallback: Literal["error", "base"] = Field(
        "error", description="What follows when the judge fails, an error or plain decoding."
    )


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_Names = Annotated[list[str], BeforeValidator(_one_or_more)]
_Weights = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], BeforeValidator(_one_or_more)]


class BonOptions(RequestOptions):
    """Request options of best-of-N, calibrated as in InfAlign (arXiv 2412.19792, section 4.2)."""

    method: ClassVar[str] = "bon"

    bon: int = Field(ge=1, le=256, description="N, the samples of which the best is the response.")
    bon_reward: _Names = Field([], description="Names of the judges; may be left out where the engine has only one.")
    bon_weights: _Weights = Field([], description="Weight of each; 1 if left out.")
    bon_reference: int = Field(
        0, ge=0, le=256, description="Further samples that rewards are calibrated by; 0: rewards count as they are."
    )
    bon_stop: float = Field(
        1.0, gt=0, le=1, description="Share of the reference that a sample must beat to be taken at once; 1: none is."
    )
    bon_parallel: int = Field(8, ge=1, le=256, description="Samples under way at once.")
    bon_fallback: Literal["error", "first"] = Field(
        "error", description="What follows when a judge fails, an error or the first sample."
    )


class DealOptions(RequestOptions):
    """Request options of DeAL (arXiv 2402.06147, section 3)."""

    method: ClassVar[str] = "deal"

    deal: _On = Field(description="Switches the method on.")
    deal_reward: _Names = Field([], description="Names of the judges; may be left out where the engine has only one.")
    deal_weights: _Weights = Field([], description="Weight of each, lambda included; 1 if left out.")
    deal_top_k: int = Field(10, ge=1, le=256, description="Likeliest next tokens that are looked behind.")
    deal_lookahead: int = Field(32, ge=0, le=1024, description="Tokens that follow each before it is judged.")
    deal_fallback: Literal["error", "base"] = Field(
        "error", description="What follows when a judge fails, an error or plain decoding."
    )


METHODS: tuple[type[RequestOptions], ...] = (
    WsdOptions,
    AsapOptions,
    ArgsOptions,
    DeraOptions,
    PadOptions,
    GenarmOptions,
    CardsOptions,
    BonOptions,
    DealOptions,
)
SHARED_KEYS = frozenset({"align_spec_strict"})
_PREFIXES = (*(f"{cls.method}_" for cls in METHODS), "align_spec_")
METHOD_NAMES = frozenset(cls.method for cls in METHODS)


def is_ours(key: str) -> bool:
    """Whether a key of ``extra_args`` is one of ours, known or not."""
    return key in METHOD_NAMES or key.startswith(_PREFIXES)


def parse_request(extra_args: Mapping[str, Any] | None) -> tuple[RequestOptions, ...]:
    """The options of every method that a request switched on, in the order of ``METHODS``.

    Args:
        extra_args: ``SamplingParams.extra_args`` as the client sent it; keys that are not ours are left alone.

    Raises:
        OptionError: an unknown key with one of our prefixes, a wrong type, a value out of range, or a key whose method
            is not switched on.
    """
    ours = {k: v for k, v in (extra_args or {}).items() if is_ours(k)}
    if not ours:
        return ()
    parsed: list[RequestOptions] = []
    taken: set[str] = set()
    for cls in METHODS:
        if cls.method not in ours:
            continue
        # JSON booleans reach vllm_xargs as integers.
        mine = {k: bool(v) if k in SHARED_KEYS and v in (0, 1) else v for k, v in ours.items() if k in cls.model_fields}
        try:
            parsed.append(cls.model_validate(mine))
        except ValidationError as error:
            raise OptionError(_explain(error, cls), _at_fault(error, cls)) from None
        taken.update(mine)
    for key in ours:
        if key in taken:
            continue
        owners = [cls for cls in METHODS if key in cls.model_fields]
        if owners:
            raise OptionError(
                f"{key}={ours[key]!r} has no effect without {owners[0].method!r}; add "
                f"{owners[0].method}={_accepted(owners[0], owners[0].method)} or drop {key}",
                key,
            )
        known = sorted({name for cls in METHODS for name in cls.model_fields})
        raise OptionError(f"unknown option {key}={ours[key]!r}; accepted are {', '.join(known)}")
    return tuple(parsed)


def parse_engine(additional_config: Any) -> EngineOptions:
    """The engine options in ``vllm_config.additional_config``; the kill switch of the environment wins.

    Raises:
        OptionError: an unknown key, a wrong type or a value out of range.
    """
    raw = additional_config.get("align_spec", {}) if isinstance(additional_config, Mapping) else {}
    try:
        options = EngineOptions.model_validate(raw)
    except ValidationError as error:
        raise OptionError(_explain(error, EngineOptions, prefix="additional_config.align_spec.")) from None
    if disabled():
        options = options.model_copy(update={"enabled": False})
    return options


def _at_fault(error: ValidationError, cls: type[BaseModel]) -> str:
    return next(
        (str(item["loc"][0]) for item in error.errors() if item["loc"][:1] and item["loc"][0] in cls.model_fields),
        "unknown",
    )


def _explain(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> str:
    parts = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if path.partition(".")[0] in cls.model_fields and issubclass(cls, RequestOptions):
            path = path.partition(".")[0]  # what follows is the alternative of a union, or a place in a list
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown option {prefix}{path}={item['input']!r}; accepted are {', '.join(cls.model_fields)}")
        elif item["type"] == "missing":
            missing = f"{prefix}{path} is missing"
            if path in cls.model_fields:
                description = (cls.model_fields[path].description or "").rstrip(".")
                missing += f"; accepted: {_accepted(cls, path)} ({description})"
            parts.append(missing)
        elif not path:
            parts.append(item["msg"].removeprefix("Value error, "))
        else:
            accepted = _accepted(cls, path) if path in cls.model_fields else item["msg"]
            parts.append(f"{prefix}{path or 'value'}={item['input']!r} is not accepted; accepted: {accepted}")
    return "; ".join(dict.fromkeys(parts))


def _accepted(cls: type[BaseModel], field: str) -> str:
    return accepted_by(cls.model_json_schema()["properties"][field])


def accepted_by(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one option in words."""
    if "anyOf" in schema:
        return " or ".join(accepted_by(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each of it {accepted_by(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list, each of it {accepted_by(schema['items'])}"
    if "enum" in schema:
        return " | ".join(repr(v) for v in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    kind = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "a string",
        "object": "an object",
    }.get(schema.get("type", ""), "")
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([kind or str(schema.get("type", "a value")), " and ".join(bounds)]).strip()
