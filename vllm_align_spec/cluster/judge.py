"""A reward model as a Ray Serve deployment, which judges of ``kind: http`` ask.

It answers the route ``/classify`` as a pooling server of vLLM's does, so that engines need no second way to ask, and
may be anywhere. Replicas and autoscaling are Ray Serve's; requests that wait at one replica share its forward passes
(`rewards.model`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application

from vllm_align_spec.options import ModelRewardOptions
from vllm_align_spec.rewards.base import Answer, JudgeError
from vllm_align_spec.rewards.model import ModelScorer

_STATUS = {"refused": 422, "busy": 503}
"""Of a `JudgeError`'s reasons; anything else is 500."""

api = FastAPI(title="vllm-align-spec judge")


class JudgeArgs(BaseModel):
    """``args`` of the application ``vllm_align_spec.cluster.judge:build``."""

    model_config = ConfigDict(extra="forbid")

    judge: ModelRewardOptions = Field(description="The model, as under the engine option `rewards`, `kind: model`.")
    deployment: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray Serve's options of the deployment: num_replicas or autoscaling_config, ray_actor_options, ...",
    )


class ClassifyRequest(BaseModel):
    """What `rewards.http` sends: texts or token ids in ``input``, or one conversation."""

    input: list[str] | list[list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("send either input or messages")
        if self.messages is not None and not self.messages:
            raise ValueError("messages is empty; accepted: a conversation")
        if self.messages and not self.add_generation_prompt and self.messages[-1].get("role") != "assistant":
            raise ValueError("a conversation ends with the assistant's message, or send add_generation_prompt")
        return self

    def answers(self) -> list[Answer]:
        """As the scorer reads them."""
        if self.messages is not None:
            unfinished = self.continue_final_message or self.add_generation_prompt
            return [Answer([], "", self.messages, [], "", not unfinished)]
        return [_answer(one) for one in self.input or ()]


def _answer(one: str | Sequence[int]) -> Answer:
    return Answer([], one, None, [], "", True) if isinstance(one, str) else Answer(one, "", None, [], "", True)


@serve.ingress(api)
class Judge:
    """One replica: one copy of the model on a thread of its own.

    Args:
        options: `ModelRewardOptions` as a mapping.
    """

    async def __init__(self, options: Mapping[str, Any]) -> None:  # type: ignore[misc] # Ray Serve awaits it
        self._scorer = ModelScorer("judge", ModelRewardOptions.model_validate(options))
        await self._scorer.ready()

    @api.post("/classify")
    async def classify(self, request: ClassifyRequest) -> dict[str, Any]:
        """Rewards, in order, where vLLM's route has the classes' scores."""
        try:
            rewards = await self._scorer.score(request.answers())
        except JudgeError as error:
            raise HTTPException(_STATUS.get(error.reason, 500), str(error)) from error
        return {"data": [{"index": i, "probs": [reward]} for i, reward in enumerate(rewards)]}


def build(args: dict[str, Any]) -> Application:
    """The application of one judge, for Ray Serve's ``import_path``.

    Args:
        args: `JudgeArgs`.

    Raises:
        pydantic.ValidationError: something in them is not accepted.
    """
    parsed = JudgeArgs.model_validate(args)
    deployment = serve.deployment(Judge, **{"name": "judge", "max_ongoing_requests": 256, **parsed.deployment})
    application: Application = deployment.bind(parsed.judge.model_dump())
    return application
