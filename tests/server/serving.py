"""Real servers for tests, and a hand-over pilot whose endpoint runs in this process so that tests can break it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

import vllm_align_spec.lab

MODELS = Path(vllm_align_spec.lab.__file__).parent / "models"
START_TIMEOUT_S = 600
MESSAGES = [{"role": "user", "content": "How can I keep my desk tidy?"}]
PROMPT = f"<|bos|><|user|>\n{MESSAGES[0]['content']}<|end|>\n<|assistant|>\n"
"""The same as the lab's chat template writes it: the pilot answers at some length."""
PARTS = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
"""The same as many clients write it."""
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
TOOLS_USED = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "noon"}]},
]


class Server:
    """A running API server."""

    def __init__(self, process, port, log):
        self.process, self.log = process, log
        self.root = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path):
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(self.root + path, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def report(self, response_id):
        status, body = self.get(f"/v1/align_spec/reports/{response_id}")
        assert status == 200, body
        report = json.loads(body)
        assert report["complete"], report
        return report

    def metric(self, name, **labels):
        """A sample's value, 0 if it is not there yet."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            of_name = line.startswith(name) and line[len(name)] in " {"
            if of_name and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def complete(self, prompt=PROMPT, xargs=None, **kwargs):
        """A completion with temperature 0 unless said otherwise."""
        kwargs = {"temperature": 0, "max_tokens": 24, **kwargs}
        extra = {**kwargs.pop("extra_body", {}), **({"vllm_xargs": xargs} if xargs else {})}
        return self.client.completions.create(model="base", prompt=prompt, extra_body=extra, **kwargs)

    def chat(self, messages=MESSAGES, xargs=None, **kwargs):
        kwargs = {"temperature": 0, "max_tokens": 24, **kwargs}
        extra = {**kwargs.pop("extra_body", {}), **({"vllm_xargs": xargs} if xargs else {})}
        return self.client.chat.completions.create(model="base", messages=messages, extra_body=extra, **kwargs)

    def wait_idle(self, timeout_s=20):
        """Until the engine has no request."""
        until = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < until, "requests are still running"
            time.sleep(0.2)


def start_server(log_path, *arguments, env=None, model="base"):
    """Starts vLLM's server on a lab model, by default the base model, and waits until it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODELS / model)]
    command += ["--served-model-name", model, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--block-size", "32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "16"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "align_spec", **(env or {})}
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    server = Server(process, port, Path(log_path))
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if server.get("/health")[0] == 200:
                return server
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            stop_server(server)
            pytest.fail("the server did not start:\n" + server.log.read_text()[-3000:])
        time.sleep(0.5)


def stop_server(server):
    if server.process.poll() is None:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


SPECULATION = json.dumps(
    {"method": "draft_model", "model": str(MODELS / "pilot"), "num_speculative_tokens": 5}, separators=(",", ":")
)


class PilotEndpoint:
    """The lab's other pilot as an OpenAI-compatible endpoint, greedy, that can be told to misbehave."""

    def __init__(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(MODELS / "pilot-other")
        self.model = AutoModelForCausalLM.from_pretrained(MODELS / "pilot-other", dtype=torch.float32).eval()
        self.fault = None
        self.bodies = []
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint._answer(self)

            def log_message(self, *args):
                pass

        self._handler = Handler
        self._port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def open(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def prompt_ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def pieces(self, prompt_ids, limit):
        """Text after each greedy token, until the pilot ends."""
        ids, sent, cache = list(prompt_ids), "", None
        feed = ids
        for _ in range(min(limit, 1024 - len(prompt_ids))):
            with self._torch.inference_mode(), self._lock:
                out = self.model(self._torch.tensor([feed]), past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                return
            ids.append(token)
            feed = [token]
            text = self.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                yield text[len(sent) :]
                sent = text

    def _answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.bodies.append((handler.path, body))
        if self.fault == "http 500":
            handler.send_error(500, "out of order")
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        if self.fault == "slow":
            time.sleep(8)
        chat = "messages" in body
        ids = (
            self.prompt_ids(body["messages"])
            if chat
            else self.tokenizer.encode(body["prompt"] or self.tokenizer.bos_token)
        )
        pieces = () if self.fault == "empty" else self.pieces(ids, body.get("max_tokens") or 1024)

        def send(text, finish=None):
            choice = {"delta": {"content": text}} if chat else {"text": text}
            event = {"choices": [{"index": 0, **choice, "finish_reason": finish}]}
            handler.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        try:
            for count, piece in enumerate(pieces):
                if self.fault == "nonsense":
                    handler.wfile.write(b'data: {"choices": "none today"}\n\n')
                    return
                if self.fault == "breaks off" and count == 20:
                    return
                send(piece)
            send("", "stop")
            handler.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the draft was long enough


class JudgeEndpoint:
    """Answers ``/classify`` as a pooling server does, with a number made of the text, and misbehaves as told."""

    def __init__(self):
        self.fault, self.delay, self.asked = None, 0.0, 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                endpoint._answer(self)

            def log_message(self, *args):
                pass

        class Http(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.asked += 1
        fault = self.fault
        time.sleep(12 if fault == "hang" else self.delay)
        read = [body["messages"][-1]["content"]] if "messages" in body else body["input"]
        data = [{"index": i, "probs": [float(sum(map(ord, str(text))) % 7)]} for i, text in enumerate(read)]
        if fault == "nan":
            data[0]["probs"][0] = float("nan")
        if fault == "wrong count":
            data = []
        if fault == "die":
            handler.close_connection = True
            handler.connection.close()
            return
        sent = json.dumps({"data": data}).encode()
        try:
            handler.send_response(500 if fault == "http 500" else 200)
            handler.send_header("Content-Length", str(len(sent)))
            handler.end_headers()
            handler.wfile.write(sent)
        except OSError:
            pass  # who asked has given up
