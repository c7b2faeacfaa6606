"""Time and reward of weak-to-strong decoding on the lab's models.

Time is that of equally long answers (``ignore_eos``), as a ratio to the base model's plain decoding in an engine
without speculation; both run one right after the other, so that a slow moment of the machine hits both. Three ways of
decoding stand against it: WSD as it is (the pilot goes on as a lossless drafter), WSD without the speculation that
follows (the opening on the speculative engine, then the rest on the plain one; the sum of both), and speculation alone,
which is as fast as the pilot makes it and changes no answer.

Reward is that of answers of natural length, sampled at temperature 1, by a judge that no decoding consults.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import PAUSE_S, Result, axes, console, mean, median, ratios, start_engine

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

TOKENS = 128
MAIN_DRAFTS = 5
WSD = {"wsd": "shared"}
WINDOW = 6  # the default of wsd_window; no request may be shorter
WAYS = ("plain", "speculation", "wsd", "wsd_no_speculation")


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: batches 1 and 8, one draft length, few repeats.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    batches, drafts, repeats = ((1, 8), (MAIN_DRAFTS,), {1: 8, 8: 4}) if quick else (
        (1, 2, 4, 8, 16), (2, MAIN_DRAFTS, 8), {1: 20, 2: 8, 4: 8, 8: 12, 16: 6},
    )  # fmt: skip
    result = Result("wsd")
    result.setting |= {
        "models": {"base": "lab base", "pilot": "lab pilot", "judge": "lab judge-other"},
        "tokens": TOKENS,
        "num_speculative_tokens": list(drafts),
        "batches": list(batches),
        "repeats": repeats,
        "quick": quick,
    }
    with ExitStack() as stack:
        plain = stack.enter_context(_engine(None))
        speculative = {k: stack.enter_context(_engine(k)) for k in drafts}
        prompts = _prompts(plain)
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
            timer = _Timer(plain, speculative, prompts, result)
            jobs = [(t, b, k) for t in (0.0, 1.0) for k in drafts for b in batches if _wanted(t, b, k, quick)]
            task = progress.add_task("", total=len(jobs) + 1)
            for temperature, batch, k in jobs:
                progress.update(task, description=f"batch {batch}, {k} drafts, temperature {temperature:g}")
                timer.measure(temperature, batch, k, repeats[batch])
                progress.advance(task)
            progress.update(task, description="rewards")
            _rewards(plain, speculative[MAIN_DRAFTS], prompts, 48 if quick else 192, 1 if quick else 3, result)
            progress.advance(task)
        del plain, speculative, timer
    gc.collect()  # an engine that is only collected as the interpreter exits complains
    _figures(result, batches, drafts, quick)
    _draw(result, out, batches, drafts)
    result.finish(json_file, out, started)


def _wanted(temperature: float, batch: int, drafts: int, quick: bool) -> bool:
    # How it grows with the batch is shown for one draft length; sampling only where the figures ask for it.
    if temperature == 0:
        return drafts == MAIN_DRAFTS or batch in (1, 8)
    return drafts == MAIN_DRAFTS and batch in (1, 8) and not quick


def _engine(drafts: int | None) -> LLM:
    speculation: dict[str, Any] = {}
    if drafts is not None:
        speculation["speculative_config"] = {
            "method": "draft_model",
            "model": str(lab.model_path("pilot")),
            "num_speculative_tokens": drafts,
        }
        speculation["per_request_spec_decode_metrics"] = "summary"
    return start_engine(
        str(lab.model_path("base")),
        f"{drafts or 'no'} drafts a step",
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,  # prompts come again
        **speculation,
    )


def _prompts(engine: LLM) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in lab.heldout_prompts("chat")
    ]


def _generate(engine: LLM, prompts: Sequence[list[int]], params: Sequence[Any]) -> tuple[float, list[Any]]:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], list(params), use_tqdm=False)
    return time.perf_counter() - start, outputs


def _params(temperature: float, seed: int, *, tokens: int = TOKENS, wsd: bool = False, natural: bool = False) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=tokens,
        ignore_eos=not natural,
        extra_args=dict(WSD) if wsd else None,
    )


class _Timer:
    """Runs every way of decoding on the same prompts in turn, and notes the seconds."""

    def __init__(self, plain: LLM, speculative: dict[int, LLM], prompts: list[list[int]], result: Result) -> None:
        self._plain, self._speculative, self._prompts = plain, speculative, prompts
        self._seconds: dict[str, dict[str, list[float]]] = result.samples.setdefault("seconds", {})
        self._forwards: dict[str, dict[str, list[float]]] = result.samples.setdefault("tokens_per_forward", {})
        self._kept: dict[str, list[int]] = result.samples.setdefault("draft_tokens_kept", {})

    def measure(self, temperature: float, batch: int, drafts: int, repeats: int) -> None:
        """One setting; the first round warms up and does not count."""
        name = setting_name(temperature, batch, drafts)
        seconds = self._seconds[name] = {way: [] for way in WAYS}
        forwards = self._forwards[name] = {"speculation": [], "wsd": []}
        kept_all = self._kept[name] = []
        engine = self._speculative[drafts]
        for repeat in range(-1, repeats):
            chosen = [self._prompts[(max(repeat, 0) * batch + i) % len(self._prompts)] for i in range(batch)]
            free = [_params(temperature, i) for i in range(batch)]
            steered = [_params(temperature, i, wsd=True) for i in range(batch)]
            plain, _ = _generate(self._plain, chosen, free)
            wsd, answers = _generate(engine, chosen, steered)
            reports = [_choice(engine, answer) for answer in answers]
            kept = [report["draft_tokens_kept"] for report in reports]
            apart = self._apart(engine, chosen, answers, kept, temperature)
            speculation, drafted = _generate(engine, chosen, free)
            if repeat < 0:
                continue
            for way, value in zip(WAYS, (plain, speculation, wsd, apart), strict=True):
                seconds[way].append(value)
            forwards["speculation"] += [_tokens_per_forward(output) for output in drafted]
            forwards["wsd"] += [report["tokens_per_forward"] for report in reports]
            kept_all += kept

    def _apart(
        self, engine: LLM, prompts: list[list[int]], answers: list[Any], kept: list[int], temperature: float
    ) -> float:
        """Seconds of the openings on the speculative engine and of the rest on the plain one."""
        opening, _ = _generate(
            engine,
            prompts,
            [_params(temperature, i, tokens=max(WINDOW, count), wsd=True) for i, count in enumerate(kept)],
        )
        open_ended = [i for i, count in enumerate(kept) if count < TOKENS]
        if not open_ended:
            return opening
        begun = [prompts[i] + list(answers[i].outputs[0].token_ids[: kept[i]]) for i in open_ended]
        rest, _ = _generate(self._plain, begun, [_params(temperature, i, tokens=TOKENS - kept[i]) for i in open_ended])
        return opening + rest


def setting_name(temperature: float, batch: int, drafts: int) -> str:
    """The key of one setting among the samples."""
    return f"temperature {temperature:g}, batch {batch}, {drafts} drafts"


def _choice(engine: LLM, output: Any) -> dict[str, Any]:
    report = engine.report(output)
    assert report is not None, "a request that used a method has a report"
    choice: dict[str, Any] = report["choices"][0]
    return choice


def _tokens_per_forward(output: Any) -> float:
    completion = output.outputs[0]
    # Verification steps, and the prefill that gave the first token.
    forwards = int(sum(completion.spec_decode_metrics.histogram)) + 1
    return len(completion.token_ids) / forwards


def _rewards(plain: LLM, speculative: LLM, prompts: list[list[int]], count: int, seeds: int, result: Result) -> None:
    from transformers.utils import logging

    from vllm_align_spec.lab.judge import Judge

    logging.disable_progress_bar()
    questions = lab.heldout_prompts("chat")[:count]
    ways = {"plain": (plain, False), "speculation": (speculative, False), "wsd": (speculative, True)}
    judge = Judge("judge-other")
    rewards: dict[str, list[list[float]]] = {way: [] for way in ways}
    lengths: dict[str, list[int]] = {way: [] for way in ways}
    for seed in range(seeds):
        for way, (engine, wsd) in ways.items():
            params = [_params(1.0, 1000 * seed + i, wsd=wsd, tokens=160, natural=True) for i in range(count)]
            _, outputs = _generate(engine, prompts[:count], params)
            conversations = [
                [*question, {"role": "assistant", "content": output.outputs[0].text}]
                for question, output in zip(questions, outputs, strict=True)
            ]
            rewards[way].append(judge.score(conversations))
            lengths[way] += [len(output.outputs[0].token_ids) for output in outputs]
    result.samples["rewards"] = rewards
    result.samples["natural_lengths"] = lengths
    result.setting |= {"reward_prompts": count, "reward_seeds": seeds}


def _figures(result: Result, batches: Sequence[int], drafts: Sequence[int], quick: bool) -> None:
    seconds = result.samples["seconds"]

    def ratio(name: str, way: str, target: str = "") -> Any:
        return median(ratios(seconds[name][way], seconds[name]["plain"]), target)

    for batch, target in ((1, "<= 0.70"), (8, "<= 1.00")):
        name = setting_name(0, batch, MAIN_DRAFTS)
        result.figures[f"time_ratio_batch_{batch}"] = ratio(name, "wsd", target)
        result.figures[f"time_ratio_batch_{batch}_no_speculation"] = ratio(name, "wsd_no_speculation", target)
        result.figures[f"time_ratio_batch_{batch}_speculation_only"] = ratio(name, "speculation")
        if not quick:
            sampled = setting_name(1, batch, MAIN_DRAFTS)
            result.figures[f"time_ratio_batch_{batch}_sampled"] = ratio(sampled, "wsd")
            result.figures[f"time_ratio_batch_{batch}_sampled_speculation_only"] = ratio(sampled, "speculation")
    for k in drafts:
        for batch in batches:
            if setting_name(0, batch, k) in seconds and (k, batch) not in ((MAIN_DRAFTS, 1), (MAIN_DRAFTS, 8)):
                result.figures[f"time_ratio_batch_{batch}_drafts_{k}"] = ratio(setting_name(0, batch, k), "wsd")
    name = setting_name(0, 1, MAIN_DRAFTS)
    result.figures["plain_ms_per_token_batch_1"] = median([1000 * s / TOKENS for s in seconds[name]["plain"]])
    result.figures["tokens_per_forward"] = mean(result.samples["tokens_per_forward"][name]["wsd"])
    result.figures["tokens_per_forward_speculation_only"] = mean(
        result.samples["tokens_per_forward"][name]["speculation"]
    )
    result.figures["draft_tokens_kept"] = mean(result.samples["draft_tokens_kept"][name])

    rewards = result.samples["rewards"]

    def uplift(way: str) -> list[float]:
        # Paired by prompt; a prompt's seeds are averaged, so prompts are what the interval is drawn over.
        differences = [
            [w - p for w, p in zip(*pair, strict=True)] for pair in zip(rewards[way], rewards["plain"], strict=True)
        ]
        return [sum(of_prompt) / len(of_prompt) for of_prompt in zip(*differences, strict=True)]

    found = mean(uplift("wsd"), "> 0")
    result.figures["reward_uplift"] = found
    result.figures["reward_uplift_low"] = median([found.low], "> 0")
    result.figures["reward_uplift_speculation_only"] = mean(uplift("speculation"))
    for way, of_seeds in rewards.items():
        result.figures[f"reward_{way}"] = mean([reward for of_seed in of_seeds for reward in of_seed])


def _draw(result: Result, out: Path, batches: Sequence[int], drafts: Sequence[int]) -> None:
    (time_axis, reward_axis), save = axes(out, "wsd", 2, "Weak-to-strong decoding on the lab models")
    seconds = result.samples["seconds"]

    def line(way: str, k: int, label: str, **style: Any) -> None:
        measured = [batch for batch in batches if setting_name(0, batch, k) in seconds]
        names = [setting_name(0, batch, k) for batch in measured]
        points = [median(ratios(seconds[name][way], seconds[name]["plain"])) for name in names]
        errors = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        time_axis.errorbar(
            measured, [p.value for p in points], yerr=errors, capsize=3, marker="o", label=label, **style
        )

    for k in drafts:
        line("wsd", k, f"WSD, {k} drafts a step")
    line("wsd_no_speculation", MAIN_DRAFTS, "WSD, no speculation after it", linestyle="--")
    line("speculation", MAIN_DRAFTS, f"speculation only, {MAIN_DRAFTS} drafts", linestyle=":")
    time_axis.axhline(1, color="black", linewidth=0.8)
    time_axis.set_xscale("log", base=2)
    time_axis.set_xticks(batches, [str(batch) for batch in batches])
    time_axis.set(xlabel="batch", ylabel="time / plain decoding's", ylim=(0, None))
    time_axis.legend(fontsize=7)
    names = ("plain", "speculation", "wsd")
    found = [result.figures[f"reward_{name}"] for name in names]
    errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
    reward_axis.bar(names, [f.value for f in found], yerr=errors, capsize=4)
    reward_axis.axhline(0, color="black", linewidth=0.8)
    reward_axis.set(ylabel="reward (judge-other)", title=f"{result.setting['reward_prompts']} held-out prompts")
    save()
