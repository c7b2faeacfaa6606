"""``vllm-align-spec demo``: the same prompts, plain and with weak-to-strong decoding, on a real server."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_align_spec import lab
from vllm_align_spec.bench.server import SERVED_NAME, Server, ServerError

DRAFTS_PER_STEP = 5
MAX_TOKENS = 160

COLOURS = {"opening": "black on bright_green", "draft": "cyan", "base": "default", "unknown": "bright_black"}
MEANING = {"opening": "pilot's opening", "draft": "accepted draft", "base": "base model's own"}

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One response and what it took."""

    ident: str
    text: str
    token_ids: list[int]
    seconds: float
    reward: float
    tokens_per_forward: float
    report: dict[str, Any] | None  # None without a method


def demo(*, prompts: int = 3, keep: bool = False, port: int = 0) -> int:
    """Runs the demo and stops the server, also when interrupted.

    Args:
        prompts: how many held-out prompts.
        keep: leave the server up.
        port: 0 takes a free one.
    """
    console = Console()
    log = Path(tempfile.mkdtemp(prefix="vllm-align-spec-")) / "server.log"
    speculation = {
        "method": "draft_model",
        "model": str(lab.model_path("pilot")),
        "num_speculative_tokens": DRAFTS_PER_STEP,
    }
    console.print(f"[bold]vllm serve[/] on the lab's base model, its pilot as the draft model. Log: {log}")
    try:
        with Server(["--speculative-config", json.dumps(speculation)], log, port=port) as server:
            console.print(f"up after {server.wait(console):.0f} s at {server.root}")
            _show(server, console, lab.heldout_prompts("chat")[:prompts])
            if keep:
                server.keep = True
                _tell_how_to_ask(server, console)
    except ServerError as error:
        console.print(f"[bold red]{type(error).__name__}[/]", Text(str(error)))
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped")
        return 130
    if not keep:
        console.print("the server is stopped")
    return 0


def _show(server: Server, console: Console, prompts: list[list[Message]]) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from vllm_align_spec.lab.judge import Judge

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(lab.model_path("base"))
    judge = Judge("judge-other")
    client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(messages: list[Message], options: dict[str, Any] | None, seed: int = 0) -> Answer:
        before = _forwards(server)
        start = time.perf_counter()
        response = client.chat.completions.create(
            model=SERVED_NAME,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=1,
            seed=seed,
            extra_body={"return_token_ids": True, **({"vllm_xargs": options} if options else {})},
        )
        seconds = time.perf_counter() - start
        choice = response.choices[0]
        text, token_ids = choice.message.content or "", list(choice.model_extra["token_ids"])  # type: ignore[index]
        report = None
        if options:
            found = httpx.get(f"{server.root}/v1/align_spec/reports/{response.id}", timeout=30)
            report = found.raise_for_status().json()
            per_forward = report["choices"][0]["tokens_per_forward"]
        else:
            per_forward = len(token_ids) / max(1.0, _forwards(server) - before)
        (reward,) = judge.score([[*messages, {"role": "assistant", "content": text}]])
        return Answer(response.id, text, token_ids, seconds, reward, per_forward, report)

    ask(prompts[0], None)  # the first request warms the engine up
    console.print("\nWhere a token comes from:", *(Text(MEANING[name], COLOURS[name]) for name in MEANING))
    answers: list[tuple[Answer, Answer]] = []
    for seed, messages in enumerate(prompts):
        pair = ask(messages, None, seed), ask(messages, {"wsd": "shared"}, seed)
        answers.append(pair)
        console.rule()
        for message in messages:
            console.print(Text(f"{message['role']}: ", "bold"), Text(message["content"]), sep="")
        console.print("\n[bold]plain[/]")
        console.print(Text(pair[0].text))
        console.print('\n[bold]with {"vllm_xargs": {"wsd": "shared"}}[/]')
        console.print(_coloured(pair[1], tokenizer))
    console.rule()
    console.print(_table(answers))
    console.print(
        "Plain requests are sped up by the same pilot, losslessly: their answers are the base model's own. The reward "
        "is judge-other's, a model that no decoding here consults."
    )
    last = answers[-1][1]
    console.print(f"\n[bold]GET /v1/align_spec/reports/{last.ident}[/]")
    console.print(Text(_compact(last.report)))
    console.print("\n[bold]GET /metrics[/], what begins with align_spec: (buckets and zeros left out)")
    for name, value in server.metrics("align_spec:").items():
        if value and "_bucket" not in name and "_created" not in name:
            console.print(Text(f"  {name} {value:g}"))


def _compact(report: Any) -> str:
    """JSON with the long list of origins on one line."""
    origins = [choice["origins"] for choice in report["choices"]]
    bare = {**report, "choices": [{**choice, "origins": f"<{i}>"} for i, choice in enumerate(report["choices"])]}
    text = json.dumps(bare, indent=2)
    for i, runs in enumerate(origins):
        text = text.replace(f'"<{i}>"', json.dumps(runs))
    return text


def _forwards(server: Server) -> float:
    """Steps the engine has made so far; each is one forward pass of the target."""
    return sum(server.metrics("vllm:iteration_tokens_total_count").values())


def _coloured(answer: Answer, tokenizer: Any) -> Text:
    assert answer.report is not None
    told = Text()
    done = 0
    before = ""
    for origin, count in answer.report["choices"][0]["origins"]:
        done += count
        # Decoded from the beginning each time: a character may be spread over tokens.
        text = tokenizer.decode(answer.token_ids[:done], skip_special_tokens=True)
        told.append(text[len(before) :], COLOURS[origin])
        before = text
    return told


def _table(answers: list[tuple[Answer, Answer]]) -> Table:
    table = Table()
    table.add_column("prompt")
    table.add_column("decoding")
    for name in ("reward", "tokens", "seconds", "ms per\ntoken", "tokens per\nforward", "pilot's\ntokens"):
        table.add_column(name, justify="right")
    table.add_column("its end")
    for number, pair in enumerate(answers, 1):
        for name, answer in zip(("plain", "WSD"), pair, strict=True):
            choice = answer.report["choices"][0] if answer.report else {}
            tokens = len(answer.token_ids)
            table.add_row(
                str(number) if name == "plain" else "",
                name,
                f"{answer.reward:.2f}",
                str(tokens),
                f"{answer.seconds:.2f}",
                f"{1000 * answer.seconds / max(1, tokens):.1f}",
                f"{answer.tokens_per_forward:.2f}",
                f"{choice['draft_tokens_kept']}" if choice else "",
                f"switched at {choice['switch_index']}"
                if choice.get("reason") == "switched"
                else choice.get("reason", ""),
                end_section=name == "WSD",
            )
    return table


def _tell_how_to_ask(server: Server, console: Console) -> None:
    body = {
        "model": SERVED_NAME,
        "messages": lab.heldout_prompts("chat")[0],
        "max_tokens": MAX_TOKENS,
        "vllm_xargs": {"wsd": "shared"},
    }
    console.print("\nThe server stays up. Ask it:")
    line = f"curl {server.root}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    console.print(Text(line), soft_wrap=True)
    console.print(f"Stop it: kill {server.process.pid}")
