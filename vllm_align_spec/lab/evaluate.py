"""Does a weak aligned pilot lift the unaligned base? Weak-to-strong decoding, offline, on held-out prompts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_align_spec import lab
from vllm_align_spec.lab.judge import Judge
from vllm_align_spec.lab.training import token_ids
from vllm_align_spec.processors.wsd import switch_index

MAX_TOKENS = 160
BATCH = 32


@dataclass(frozen=True)
class Answers:
    """What one way of decoding said, and what the judge and base think of it."""

    texts: list[str]
    rewards: list[float]
    lengths: list[int]  # tokens
    perplexity: float  # under base


def _left_padded(sequences: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [N, longest]."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


@torch.inference_mode()
def _continue(
    model: LlamaForCausalLM, prompts: Sequence[list[int]], *, sample: bool, pad: int, end: int
) -> list[list[int]]:
    """Up to ``MAX_TOKENS`` more tokens for every prompt, without the end token."""
    result: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        ids, mask = _left_padded(prompts[start : start + BATCH], pad)
        # The generation settings are spelled out: top_k would otherwise default to 50.
        generate: Any = model.generate
        output = generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=sample,
            top_k=0 if sample else None,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=pad,
            eos_token_id=end,
        )
        for row in output[:, ids.shape[1] :].tolist():
            result.append(row[: row.index(end)] if end in row else row)
    return result


@torch.inference_mode()
def _probabilities(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> list[float]:
    """The model's untempered probability of each answer token."""
    if not answer:
        return []
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    probabilities: list[float] = chosen.tolist()
    return probabilities


def interval(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def evaluate(models: Path, out: Path, *, prompts: int = 96, seed: int = 0) -> dict[str, Any]:
    """Decode held-out chat prompts with base, pilot and weak-to-strong decoding; have ``judge-other`` score them.

    Writes ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` into ``out`` and returns the JSON's content.
    """
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(models / "base")
    base, pilot = (
        LlamaForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval() for name in ("base", "pilot")
    )
    pad, end = (tokenizer.convert_tokens_to_ids(str(t)) for t in (tokenizer.pad_token, tokenizer.eos_token))
    questions = lab.heldout_prompts("chat")[:prompts]
    asked = [token_ids(tokenizer, question, ask=True) for question in questions]
    judge = Judge("judge-other")

    def judged(answers: list[list[int]]) -> Answers:
        texts = [tokenizer.decode(answer) for answer in answers]
        conversations = [[*q, {"role": "assistant", "content": t}] for q, t in zip(questions, texts, strict=True)]
        surprises = [
            -math.log(max(p, 1e-9))
            for prompt, answer in zip(asked, answers, strict=True)
            for p in _probabilities(base, prompt, answer)
        ]
        perplexity = math.exp(sum(surprises) / len(surprises))
        return Answers(texts, judge.score(conversations), list(map(len, answers)), perplexity)

    drafts = _continue(pilot, asked, sample=False, pad=pad, end=end)
    switches = [
        switch_index(_probabilities(base, p, d), gamma=0.8, window=6) for p, d in zip(asked, drafts, strict=True)
    ]
    openings = [draft[: switch + 1] for draft, switch in zip(drafts, switches, strict=True)]
    begun = [prompt + opening for prompt, opening in zip(asked, openings, strict=True)]
    continued = _continue(base, begun, sample=True, pad=pad, end=end)
    results = {
        "base, sampled": judged(_continue(base, asked, sample=True, pad=pad, end=end)),
        "base, greedy": judged(_continue(base, asked, sample=False, pad=pad, end=end)),
        "WSD": judged([opening + rest for opening, rest in zip(openings, continued, strict=True)]),
        "pilot, greedy": judged(drafts),
    }
    uplift = [w - b for w, b in zip(results["WSD"].rewards, results["base, sampled"].rewards, strict=True)]
    report: dict[str, Any] = {
        "prompts": len(questions),
        "seed": seed,
        "methods": {
            name: {
                "reward": sum(a.rewards) / len(a.rewards),
                "reward_interval": interval(a.rewards, seed=seed),
                "tokens": sum(a.lengths) / len(a.lengths),
                "perplexity_under_base": a.perplexity,
                "examples": a.texts[:3],
            }
            for name, a in results.items()
        },
        "wsd": {
            "reward_uplift": sum(uplift) / len(uplift),
            "reward_uplift_interval": interval(uplift, seed=seed),
            "opening_tokens": sum(map(len, openings)) / len(openings),
            "whole_draft_kept": sum(s == len(d) - 1 for s, d in zip(switches, drafts, strict=True)) / len(drafts),
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "evaluation.md").write_text(_markdown(report), encoding="utf-8")
    _draw(report, out / "evaluation.png")
    _print(report)
    return report


_COLUMNS = ("decoding", "mean reward", "95% interval", "tokens", "perplexity under base")


def _cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{m['reward']:.2f}",
            "{:.2f} to {:.2f}".format(*m["reward_interval"]),
            f"{m['tokens']:.0f}",
            f"{m['perplexity_under_base']:.2f}",
        )
        for name, m in report["methods"].items()
    ]


def _markdown(report: dict[str, Any]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *_cells(report)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _print(report: dict[str, Any]) -> None:
    table = Table(*_COLUMNS)
    for cells in _cells(report):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    wsd = report["wsd"]
    low, high = wsd["reward_uplift_interval"]
    console.print(
        f"WSD lifts base by {wsd['reward_uplift']:.2f} ({low:.2f} to {high:.2f}), keeping {wsd['opening_tokens']:.0f} "
        f"draft tokens; the whole draft is kept for {wsd['whole_draft_kept']:.0%}"
    )


def _draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["methods"])
    means = [report["methods"][name]["reward"] for name in names]
    ends = [report["methods"][name]["reward_interval"] for name in names]
    below = [mean - low for mean, (low, _) in zip(means, ends, strict=True)]
    above = [high - mean for mean, (_, high) in zip(means, ends, strict=True)]
    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    axis.bar(names, means, yerr=[below, above], capsize=4)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="reward (judge-other)", title=f"{report['prompts']} held-out prompts, 95% bootstrap intervals")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
