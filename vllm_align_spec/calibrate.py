"""``vllm-align-spec calibrate``: thresholds of CARDS for the model and judge of a running server.

CARDS with one try per segment accepts whatever the model says, so its responses are plain samples (at temperature
beta, from the top-k), and its reports hold the judge's rewards and the entropy before every token. From these come

- r*, a quantile of the rewards of whole responses: the higher, the better a response and the more it costs;
- tau_u, the entropy at which the segments of these very samples would have had the wished length.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.table import Table

from vllm_align_spec.processors.cards import LONGEST, SHORTEST

QUANTILES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Samples:
    """What plain responses are like."""

    prompt_rewards: list[float]
    rewards: list[float]
    entropies: list[list[float]]  # of each response, one a token


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def segments(entropies: Sequence[float], threshold: float) -> list[int]:
    """Lengths of the segments into which a response of these entropies falls; the last one may be cut off."""
    lengths, length = [], 0
    for entropy in entropies:
        if length == LONGEST or (length >= SHORTEST and entropy >= threshold):
            lengths.append(length)
            length = 0
        length += 1
    return [*lengths, length] if length else lengths


def entropy_for(entropies: Sequence[Sequence[float]], wished: float) -> float:
    """The entropy at which the mean segment comes nearest to a length.

    Raises:
        ValueError: there are no entropies.
    """
    seen = sorted({round(entropy, 2) for response in entropies for entropy in response})
    if not seen:
        raise ValueError("no entropies")

    def mean_length(threshold: float) -> float:
        return statistics.fmean(length for response in entropies for length in segments(response, threshold))

    return min(seen, key=lambda threshold: abs(mean_length(threshold) - wished))


def expected_tries(rewards: Iterable[float], threshold: float, beta: float, most: int) -> float:
    """Candidates of a segment that is held to r* itself, if segments' rewards were those of whole responses."""
    accepted = statistics.fmean(math.exp(min(0.0, (reward - threshold) / beta)) for reward in rewards)
    return (1 - (1 - accepted) ** most) / accepted if accepted else float(most)


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Requests' ``messages`` or ``prompt``, from lines of JSON with one of the two.

    Raises:
        ValueError: a line has neither, or is no JSON.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key = next(key for key in ("messages", "prompt") if key in record)
        except (ValueError, TypeError, StopIteration):
            raise ValueError(f"{file}:{number} has to be a JSON object with 'messages' or 'prompt'") from None
        found.append({key: record[key]})
    if not found:
        raise ValueError(f"{file} has no prompts")
    return found


def sample(
    url: str, prompts: Sequence[dict[str, Any]], *, reward: str, n: int, max_tokens: int, beta: float, top_k: int,
    api_key: str, model: str | None = None, concurrency: int = 8,
) -> Samples:  # fmt: skip
    """Plain responses of a running server, with what its judge and its model think of them.

    Args:
        url: the server's, up to ``/v1``.
        prompts: as `read_prompts` gives them.
        reward: name of the judge; empty for the only one.
        n: responses a prompt.

    Raises:
        openai.APIError: the server refuses them.
        RuntimeError: it gave no report.
    """
    client = openai.OpenAI(base_url=url, api_key=api_key)
    model = model or client.models.list().data[0].id
    options = {"cards": "on", "cards_threshold": 0.0, "cards_max_tries": 1, "cards_beta": beta, "cards_top_k": top_k}
    extra = {"vllm_xargs": options | ({"cards_reward": reward} if reward else {})}

    def ask(prompt: dict[str, Any]) -> list[dict[str, Any]]:
        known: dict[str, Any] = {"model": model, "n": n, "max_tokens": max_tokens, "temperature": 1.0}
        create: Any = client.chat.completions.create if "messages" in prompt else client.completions.create
        response = create(**prompt, **known, extra_body=extra)
        headers = {"Authorization": f"Bearer {api_key}"}
        found = httpx.get(f"{url}/align_spec/reports/{response.id}", headers=headers, timeout=60)
        if found.status_code != 200:
            raise RuntimeError(f"no report of {response.id}: {found.text[:300]}")
        choices: list[dict[str, Any]] = found.json()["choices"]
        return choices

    with ThreadPoolExecutor(concurrency) as pool:
        choices = [choice for of_prompt in pool.map(ask, prompts) for choice in of_prompt if choice["segments"]]
    return Samples(
        [choice["prompt_reward"] for choice in choices],
        [choice["segments"][-1]["reward"] for choice in choices],
        [choice.get("entropies", []) for choice in choices],
    )


def calibrate(
    prompts: Path, url: str, *, reward: str, n: int, max_tokens: int, beta: float, top_k: int, share: float,
    segment_tokens: float, plot: Path | None, api_key: str,
) -> int:  # fmt: skip
    """Samples, shows the quantiles and proposes options; returns the exit status."""
    console = Console()
    with console.status("sampling plain responses"):
        found = sample(
            url, read_prompts(prompts), reward=reward, n=n, max_tokens=max_tokens, beta=beta, top_k=top_k,
            api_key=api_key,
        )  # fmt: skip
    flat = [entropy for response in found.entropies for entropy in response]
    target, boundary = quantile(found.rewards, share), entropy_for(found.entropies, segment_tokens)
    table = Table(title=f"{len(found.rewards)} plain responses", title_justify="left")
    for column in ("quantile", "reward", "tries at this r*", "entropy", "mean segment at this tau"):
        table.add_column(column, justify="right")
    for q in QUANTILES:
        r, entropy = quantile(found.rewards, q), quantile(flat, q)
        lengths = [length for response in found.entropies for length in segments(response, entropy)]
        tries = expected_tries(found.rewards, r, beta, 21)
        table.add_row(f"{q:.0%}", f"{r:.3f}", f"{tries:.1f}", f"{entropy:.2f}", f"{statistics.fmean(lengths):.1f}")
    console.print(table)
    console.print(f"mean reward of the prompts alone: {statistics.fmean(found.prompt_rewards):.3f}")
    options = {"cards": "on", "cards_threshold": round(target, 3), "cards_entropy": boundary, "cards_beta": beta}
    console.print("proposed, to be sent as vllm_xargs:")
    console.print_json(json.dumps(options | ({"cards_reward": reward} if reward else {})))
    if plot is not None:
        _draw(found, target, boundary, plot)
    return 0


def _draw(found: Samples, target: float, boundary: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, entropies) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, values, chosen, name in (
        (rewards, found.rewards, target, "reward of a response"),
        (entropies, [entropy for response in found.entropies for entropy in response], boundary, "entropy of a token"),
    ):
        shares = [i / max(1, len(values) - 1) for i in range(len(values))]
        axis.plot(sorted(values), shares)
        axis.axvline(chosen, color="black", linewidth=0.8, label=f"proposed: {chosen:.3g}")
        axis.set(xlabel=name, ylabel="share below")
        axis.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
