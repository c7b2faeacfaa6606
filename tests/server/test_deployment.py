"""Ways of running the server that cost a server of their own."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import MODELS, PROMPT, SPECULATION, start_server, stop_server

pytestmark = pytest.mark.slow


def test_a_pilot_that_we_start_answers_and_ends_with_the_server(tmp_path):
    engine_args = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    pilot = {"model": str(MODELS / "pilot-other"), "engine_args": engine_args, "timeout_s": 120}
    options = {"align_spec": {"wsd": {"pilot": pilot}}}
    server = start_server(tmp_path / "log", "--additional-config", json.dumps(options))
    server.client = server.client.with_options(timeout=400)
    try:
        response = server.chat(xargs={"wsd": "handover", "wsd_gamma": 1, "wsd_max_draft": 12})
        (choice,) = server.report(response.id)["choices"]
        assert (choice["reason"], choice["draft_tokens_kept"]) == ("max_draft", 12)
        # Without a draft model there is no pilot to share.
        with pytest.raises(openai.BadRequestError, match="needs the pilot as the engine's draft model"):
            server.complete(xargs={"wsd": "shared"})
    finally:
        stop_server(server)
    assert _processes_that_mention(str(MODELS / "pilot-other")) == []


def test_with_several_api_servers_metrics_add_up(tmp_path):
    server = start_server(tmp_path / "log", "--speculative-config", SPECULATION, "--api-server-count", "2")
    try:
        for _ in range(6):
            # Connections of their own, so that both servers get some.
            with openai.OpenAI(base_url=f"{server.root}/v1", api_key="none") as client:
                client.completions.create(
                    model="base", prompt=PROMPT, max_tokens=8, extra_body={"vllm_xargs": {"wsd": "shared"}}
                )
        assert server.metric("align_spec:requests_total", method="wsd", outcome="completed") == 6
        assert server.metric("vllm:request_success_total") >= 6
    finally:
        stop_server(server)


def test_the_kill_switch_leaves_vllm_and_refuses_our_options(tmp_path):
    options = {"align_spec": {"enabled": False}}
    server = start_server(
        tmp_path / "log", "--speculative-config", SPECULATION, "--additional-config", json.dumps(options)
    )
    try:
        with pytest.raises(openai.BadRequestError, match="switched off"):
            server.complete(xargs={"wsd": "shared"})
        assert server.complete(max_tokens=4).usage.completion_tokens == 4
        assert json.loads(server.get("/v1/align_spec/info")[1])["enabled"] is False
    finally:
        stop_server(server)


def test_a_server_that_drains_finishes_responses_that_have_yet_to_ask_the_engine(tmp_path):
    options = {"align_spec": {"rewards": {"good": {"kind": "model", "model": str(MODELS / "judge")}}}}
    server = start_server(
        tmp_path / "log", "--additional-config", json.dumps(options), "--shutdown-timeout", "100", "--max-num-seqs", "8"
    )
    asks = [
        (None, 400),
        ({"bon": 12, "bon_parallel": 1}, 40),  # one sample after the other
        ({"cards": "on", "cards_threshold": -100}, 200),  # segments of 64 tokens at most
    ]
    try:
        with ThreadPoolExecutor(len(asks)) as pool:
            jobs = [
                pool.submit(
                    server.chat, xargs=xargs, max_tokens=tokens, temperature=1.0, extra_body={"ignore_eos": True}
                )
                for xargs, tokens in asks
            ]
            while server.metric("vllm:num_requests_running") < len(asks):
                assert not any(job.done() for job in jobs)
                time.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            answers = [job.result(110) for job in jobs]
        for (_, tokens), answer in zip(asks, answers, strict=True):
            assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", tokens)
        server.process.wait(60)
    finally:
        stop_server(server)


def _processes_that_mention(text):
    import time
    from pathlib import Path

    for _ in range(60):
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if text in command and "vllm_align_spec.engine.pilot" in command:
                    found.append(command)
        if not found:
            return []
        time.sleep(0.5)
    return found
