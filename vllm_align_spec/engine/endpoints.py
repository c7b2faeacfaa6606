"""HTTP routes under ``/v1/align_spec/``, where the server's ``--api-key`` guards them, and the inspector's page.

vLLM loads endpoint plugins only if ``VLLM_PLUGINS`` names them (``vllm-align-spec serve`` sees to that).
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse

from vllm_align_spec import __version__
from vllm_align_spec.engine import frontend
from vllm_align_spec.options import METHODS, EngineOptions

PREFIX = "/v1/align_spec"
INSPECTOR = "/align_spec"
"""A page that anybody may load: what it shows it asks of guarded routes, with the key that its user enters."""


class AlignSpecEndpoints:
    """The endpoint plugin: what the server can do, and what happened to a response."""

    name: ClassVar[str] = "align_spec"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.get(f"{PREFIX}/info")(_info)
        app.get(f"{PREFIX}/reports/{{response_id:path}}")(_report)
        for file in ("index.html", "inspector.css", "inspector.js"):
            path = f"{INSPECTOR}/{'' if file == 'index.html' else file}"
            app.get(path, include_in_schema=False)(partial(_file, file))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keeps this process's front end for the routes. A judge that cannot be loaded ends the start-up."""
        state.align_spec = frontend.of(engine_client) if engine_client is not None else None
        if state.align_spec is not None:
            await state.align_spec.ready()


async def _file(name: str) -> FileResponse:
    """A part of the inspector; it is never shown inside of another site's page."""
    headers = {"Content-Security-Policy": "frame-ancestors 'none'", "Cache-Control": "no-cache"}
    return FileResponse(Path(__file__).parent / "inspector" / name, headers=headers)


async def _info(request: Request) -> JSONResponse:
    """Version, methods, the JSON schemas of all options, and whether requests reach us."""
    ours: frontend.Frontend | None = request.app.state.align_spec
    return JSONResponse(
        {
            "version": __version__,
            "enabled": ours is not None and ours.options.enabled,
            "front_end_hook": front_end_hook(),
            "methods": {cls.method: cls.model_json_schema() for cls in METHODS},
            "engine_options": EngineOptions.model_json_schema(),
        }
    )


def front_end_hook() -> bool:
    """Whether ``AsyncLLM.generate`` is ours in this process: vLLM's own is an asynchronous generator function."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return not inspect.isasyncgenfunction(AsyncLLM.generate)


async def _report(request: Request, response_id: str) -> JSONResponse:
    """The report of one response, by the ``id`` in the client's JSON; see `vllm_align_spec.report`."""
    ours: frontend.Frontend | None = request.app.state.align_spec
    report = await ours.reports.find(response_id) if ours is not None else None
    elsewhere = getattr(request.app.state, "align_spec_elsewhere", None)  # where there are replicas: cluster.serving
    if report is None and elsewhere is not None:
        report = await elsewhere(response_id)
    if report is not None:
        return JSONResponse(report)
    keeps = (
        ""
        if ours is None
        else (
            f" This server keeps the last {ours.options.reports.max_reports} for {ours.options.reports.max_age_s:g} s."
        )
    )
    message = (
        f"No report for response {response_id!r}. Reports exist for responses that used an align_spec option and have "
        f"ended.{keeps} With several API server processes a report stays with the one that served the response: "
        "ask again on a new connection, or serve with --api-server-count 1."
    )
    return JSONResponse({"error": {"message": message, "type": "NotFoundError", "param": "id", "code": 404}}, 404)
