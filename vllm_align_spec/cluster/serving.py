"""Replicas of vLLM's own API server as a Ray Serve application: ``import_path: vllm_align_spec.cluster.serving:build``.

Every replica serves the whole HTTP application of vLLM, our routes included, behind Ray Serve's proxy, so whatever a
single server does, they do. What a single server has and replicas do not share are reports: a replica that knows
nothing of a response asks the others.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.llm._internal.serve.utils.broadcast import broadcast
from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer

from vllm_align_spec.cli import server_environment
from vllm_align_spec.metrics import collect_with
from vllm_align_spec.options import parse_engine


class ServingArgs(BaseModel):
    """``args`` of the application."""

    model_config = ConfigDict(extra="forbid")

    llm_config: dict[str, Any] = Field(
        description="Ray's own LLMConfig: model, engine_kwargs (vLLM's arguments, additional_config among them), "
        "deployment_config (replicas, autoscaling), placement groups, runtime_env."
    )


class AlignSpecServer(LLMServer):  # type: ignore[misc]
    """One replica."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc] # Ray Serve awaits it
        from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

        def histogram(*args: Any, buckets: Sequence[float], **kwargs: Any) -> Any:
            return RayHistogramWrapper(*args, buckets=[bound for bound in buckets if bound > 0], **kwargs)

        collect_with(RayCounterWrapper, RayGaugeWrapper, histogram)
        await super().__init__(llm_config, **kwargs)

    async def __serve_build_asgi_app__(self) -> Any:
        """vLLM's application."""
        app = await super().__serve_build_asgi_app__()
        self._state = app.state
        app.state.align_spec_elsewhere = self._ask_others
        return app

    async def align_spec_report(self, response_id: str) -> dict[str, Any] | None:
        """The report of a response of this replica's."""
        found: dict[str, Any] | None = await self._state.align_spec.reports.find(response_id)
        return found

    async def _ask_others(self, response_id: str) -> dict[str, Any] | None:
        here = serve.get_replica_context()
        handle = serve.get_deployment_handle(here.deployment, here.app_name)
        found = await asyncio.to_thread(broadcast, handle, "align_spec_report", (response_id,))
        return next((report for report in found if report is not None), None)


def checked(args: ServingArgs) -> LLMConfig:
    """Ray's configuration, with engine options of ours that are right.

    Raises:
        pydantic.ValidationError: Ray does not accept it.
        OptionError: we do not.
    """
    config = LLMConfig.model_validate(args.llm_config)
    parse_engine(config.engine_kwargs.get("additional_config"))
    return config


def build(args: dict[str, Any]) -> Application:
    """The application of one model, for Ray Serve's ``import_path``.

    Args:
        args: `ServingArgs`.

    Raises:
        pydantic.ValidationError: something in them is not accepted.
        OptionError: an engine option of ours is not.
    """
    config = checked(ServingArgs.model_validate(args))
    environment = dict(config.runtime_env or {})
    given = environment.get("env_vars", {})
    needed = server_environment({**os.environ, **given})
    ours = {name: needed[name] for name in ("VLLM_PLUGINS", "LD_PRELOAD") if name in needed}
    config.runtime_env = {**environment, "env_vars": {**ours, **given, "VLLM_PLUGINS": ours["VLLM_PLUGINS"]}}
    application: Application = build_llm_deployment(config, deployment_cls=serve.ingress()(AlignSpecServer))
    return application
