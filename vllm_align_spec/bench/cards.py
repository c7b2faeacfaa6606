"""Time, reward and judge calls of cascade reward sampling on the lab's models, against ARGS as it is published.

Reward and price are also those of best-of-N with the same judge, so that one picture shows what a reward costs.

The published loop (`args_loop`) and CARDS are guided by one judge; rewards are those of another, which no decoding
consults. Time is that of equally long answers, one prompt at a time, each way right after the other: as long as CARDS'
own, because tokens beyond an answer's natural end please no judge and would be tried again and again. It is also taken
of many prompts, which the engine answers at once, and the loop, as it can, one after the other. Reward is that
of answers of natural length to held-out prompts, paired by prompt. Thresholds come from the reward and
entropy quantiles of plain samples, as ``vllm-align-spec calibrate`` proposes them, on prompts that are not used again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab
from vllm_align_spec.bench.args_loop import args_loop
from vllm_align_spec.bench.measure import PAUSE_S, Result, axes, console, mean, median, ratios, start_engine
from vllm_align_spec.calibrate import entropy_for, quantile

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

TOKENS = 160
ARGS = {"weight": 1.5, "top_k": 10}
"""As published."""
CANDIDATES = (1, 2, 4)
MAIN = 2
SHARES = (0.5, 0.75, 0.9)
"""Quantiles of plain answers' rewards that become the target; the middle one, which `calibrate` proposes, is the one
that all other figures are of."""
SEGMENT_TOKENS = 12
MARGIN = 0.5
"""Reward that CARDS may lie below ARGS and still count as not inferior; the judge's spread is about ten times that."""
TOGETHER = 16
"""Prompts that are answered at once."""
WAYS = ("plain", "args_loop", *(f"cards_{n}" for n in CANDIDATES))


BEST_OF = (2, 4, 8, 16)


def _of_share(share: float) -> str:
    """Answers of one target among the samples."""
    return "cards" if share == SHARES[1] else f"cards_at_{share:g}"


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: few repeats and prompts.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    repeats, groups, prompts, calibration = (4, 1, 12, 6) if quick else (12, 3, 64, 24)
    result = Result("cards")
    result.setting |= {
        "models": {"base": "lab base", "judge": "lab judge", "evaluation": "lab judge-other"},
        "max_tokens": TOKENS,
        "repeats": repeats,
        "together": TOGETHER,
        "groups": groups,
        "reward_prompts": prompts,
        "calibration_prompts": calibration,
        "args": ARGS,
        "reward_margin": MARGIN,
        "quick": quick,
    }
    rewards = {"judge": {"kind": "model", "model": str(lab.model_path("judge")), "timeout_s": 120.0}}
    loop = _Loop()
    questions = lab.heldout_prompts("chat")
    with (
        result.kept(out),
        start_engine(
            str(lab.model_path("base")),
            "a judge",
            max_model_len=1024,
            max_num_seqs=16,
            additional_config={"align_spec": {"rewards": rewards}},
        ) as engine,
    ):
        asked = [
            engine.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in questions
        ]
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("calibration", total=4)
            targets = _calibrate(engine, questions[-calibration:])
            options = targets[SHARES[1]]
            result.setting["cards"] = {f"quantile {share:g}": one for share, one in targets.items()}
            progress.update(task, advance=1, description="time")
            _times(engine, loop, options, asked, repeats, result)
            progress.update(task, advance=1, description=f"time of {TOGETHER} prompts at once")
            _times_together(engine, loop, options, asked, groups, result)
            progress.update(task, advance=1, description="rewards")
            _rewards(engine, loop, targets, questions[:prompts], asked, result)
            progress.advance(task)
    del engine
    gc.collect()  # an engine that is only collected as the interpreter exits complains
    with result.kept(out):
        _figures(result)
        _draw(result, out)
    result.finish(json_file, out, started)


class _Loop:
    """The published loop on the lab's models."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._base, self._judge = (
            kind.from_pretrained(lab.model_path(name), dtype=torch.float32).eval()
            for kind, name in ((AutoModelForCausalLM, "base"), (AutoModelForSequenceClassification, "judge"))
        )

    def __call__(self, prompt: Sequence[int], tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        return args_loop(
            self._base,
            self._judge,
            prompt,
            weight=ARGS["weight"],
            top_k=int(ARGS["top_k"]),
            max_new_tokens=tokens,
            stop_ids=stop_ids,
        )


def _calibrate(engine: LLM, questions: Sequence[list[dict[str, str]]]) -> dict[float, dict[str, Any]]:
    """Options for each of `SHARES`."""
    plain = {"cards": "on", "cards_threshold": 0.0, "cards_max_tries": 1}
    choices = [
        choice
        for seed in range(4)
        for choice in _answers(engine, questions, [_params(seed, plain)] * len(questions))[1]
    ]
    rewards = [choice["segments"][-1]["reward"] for choice in choices]
    boundary = entropy_for([choice["entropies"] for choice in choices], SEGMENT_TOKENS)
    same = {"cards": "on", "cards_entropy": boundary, "cards_candidates": MAIN}
    return {share: {**same, "cards_threshold": round(quantile(rewards, share), 2)} for share in SHARES}


def _params(seed: int, extra: dict[str, Any] | None, *, tokens: int | None = None) -> Any:
    """Of one answer; of ``tokens`` tokens, or of natural length."""
    from vllm import SamplingParams

    own = extra is not None and "cards" in extra  # it draws with parameters of its own: those that the others get
    return SamplingParams(
        temperature=1.0 if own else 0.7,
        top_k=0 if own else 40,
        seed=seed,
        max_tokens=tokens or TOKENS,
        ignore_eos=tokens is not None,
        extra_args=extra,
    )


def _answers(
    engine: LLM, questions: Sequence[list[dict[str, str]]], params: Sequence[Any]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Outputs of conversations, and the reports of those that used a method."""
    outputs = engine.chat(list(questions), list(params), use_tqdm=False)
    reports = [engine.report(output) for output in outputs]
    return outputs, [report["choices"][0] for report in reports if report is not None]


def _times(
    engine: LLM, loop: _Loop, options: dict[str, Any], asked: Sequence[list[int]], repeats: int, result: Result
) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    costs: dict[str, list[dict[str, Any]]] = {f"cards_{n}": [] for n in CANDIDATES}
    lengths: list[int] = []
    questions = lab.heldout_prompts("chat")
    for repeat in range(-1, repeats):  # the first round warms up
        place = max(repeat, 0)
        spent: dict[str, float] = {}

        def timed(way: str, what: Callable[[], Any], spent: dict[str, float] = spent) -> Any:
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            found = what()
            spent[way] = time.perf_counter() - start
            return found

        def ask(params: Any, place: int = place) -> Any:
            return engine.chat([questions[place]], [params], use_tqdm=False)[0]

        tokens = 0
        for n in CANDIDATES:
            params = _params(repeat + 7, {**options, "cards_candidates": n})
            output = timed(f"cards_{n}", partial(ask, params))
            tokens = len(output.outputs[0].token_ids)
            if repeat >= 0:
                report = engine.report(output)
                assert report is not None
                costs[f"cards_{n}"].append(report["choices"][0])
        timed("plain", partial(ask, _params(repeat + 7, None, tokens=tokens)))
        timed("args_loop", partial(loop, asked[place], tokens))
        if repeat >= 0:
            for way, elapsed in spent.items():
                seconds[way].append(elapsed)
            lengths.append(tokens)
    result.samples["tokens"] = lengths
    result.samples["seconds"] = seconds
    result.samples["costs"] = costs


def _times_together(
    engine: LLM, loop: _Loop, options: dict[str, Any], asked: Sequence[list[int]], groups: int, result: Result
) -> None:
    """Seconds until the last of many answers is there, of equal lengths as in `_times`."""
    seconds: dict[str, list[float]] = {"plain": [], "args_loop": [], "cards": []}
    questions = lab.heldout_prompts("chat")
    for group in range(-1, groups):  # the first one warms up
        of_group = slice(max(group, 0) * TOGETHER, (max(group, 0) + 1) * TOGETHER)
        lengths: list[int] = []
        for way in ("cards", "plain", "args_loop"):
            time.sleep(PAUSE_S)
            seeds = range(100 * group, 100 * group + TOGETHER)
            began = time.perf_counter()
            if way == "cards":
                params = [_params(seed, options) for seed in seeds]
                outputs = engine.chat(questions[of_group], params, use_tqdm=False)
                lengths = [len(output.outputs[0].token_ids) for output in outputs]
            elif way == "plain":
                params = [_params(seed, None, tokens=n) for seed, n in zip(seeds, lengths, strict=True)]
                engine.chat(questions[of_group], params, use_tqdm=False)
            elif group >= 0:
                for prompt, n in zip(asked[of_group], lengths, strict=True):
                    loop(prompt, n)
            if group >= 0:
                seconds[way].append(time.perf_counter() - began)
    result.samples["seconds_together"] = seconds


def _rewards(
    engine: LLM,
    loop: _Loop,
    targets: dict[float, dict[str, Any]],
    questions: Sequence[list[dict[str, str]]],
    asked: Sequence[list[int]],
    result: Result,
) -> None:
    from vllm_align_spec.lab.judge import Judge

    tokenizer = engine.get_tokenizer()
    count = len(questions)
    texts: dict[str, list[str]] = {}
    dearness: dict[str, list[float]] = result.samples.setdefault("sampled_tokens_per_token", {})
    ways = {"plain": None, **{_of_share(share): options for share, options in targets.items()}}
    ways |= {f"best_of_{n}": {"bon": n, "bon_reward": "judge"} for n in BEST_OF}
    for way, extra in ways.items():
        outputs, choices = _answers(engine, questions, [_params(1000 + i, extra) for i in range(count)])
        texts[way] = [output.outputs[0].text for output in outputs]
        dearness[way] = [one["sampled_tokens"] / max(one["response_tokens"], 1) for one in choices] or [1.0] * count
    texts["args_loop"] = [
        tokenizer.decode(loop(prompt, TOKENS, [tokenizer.eos_token_id]), skip_special_tokens=True)
        for prompt in asked[:count]
    ]
    for name in ("judge-other", "judge"):
        judge = Judge(name)
        result.samples[f"rewards_{name}"] = {
            way: judge.score(
                [[*q, {"role": "assistant", "content": t}] for q, t in zip(questions, of_way, strict=True)]
            )
            for way, of_way in texts.items()
        }
    result.samples["examples"] = {way: of_way[:3] for way, of_way in texts.items()}


def _figures(result: Result) -> None:
    seconds, costs = result.samples["seconds"], result.samples["costs"]
    main = f"cards_{MAIN}"
    figures = result.figures
    together = result.samples["seconds_together"]
    figures[f"time_ratio_to_args_loop_batch_{TOGETHER}"] = median(
        ratios(together["cards"], together["args_loop"]), "<= 0.2"
    )
    figures[f"time_ratio_to_plain_batch_{TOGETHER}"] = median(ratios(together["cards"], together["plain"]))
    figures["time_ratio_to_args_loop"] = median(ratios(seconds[main], seconds["args_loop"]))
    figures["time_ratio_to_plain"] = median(ratios(seconds[main], seconds["plain"]))
    rewards = result.samples["rewards_judge-other"]

    def differences(way: str, other: str) -> list[float]:
        return [a - b for a, b in zip(rewards[way], rewards[other], strict=True)]

    figures["reward_difference"] = mean(differences("cards", "args_loop"), f"low > -{MARGIN:g}")
    figures["reward_uplift_over_plain"] = mean(differences("cards", "plain"), "> 0")
    for way, found in rewards.items():
        figures[f"reward_{way}"] = mean(found)
    figures["judge_calls_per_128_tokens"] = mean([128 * c["judge_calls"] / c["response_tokens"] for c in costs[main]])
    for fate in ("accepted", "best", "rejected", "surplus"):
        figures[f"candidates_{fate}"] = mean([c["candidates"][fate] for c in costs[main]])
    figures["segment_tokens"] = mean([s["tokens"] for c in costs[main] for s in c["segments"]])
    for way, dear in result.samples["sampled_tokens_per_token"].items():
        if way != "plain":
            figures[f"sampled_tokens_per_token_{way}"] = mean(dear)
    for n in CANDIDATES[1:]:
        figures[f"time_ratio_{n}_at_once_to_one"] = median(ratios(seconds[f"cards_{n}"], seconds["cards_1"]))


def _draw(result: Result, out: Path) -> None:
    (time_axis, reward_axis, trade_axis), save = axes(out, "cards", 3, "Cascade reward sampling on the lab models")
    seconds = result.samples["seconds"]
    found = [median(seconds[way]) for way in WAYS]
    errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
    time_axis.bar(WAYS, [f.value for f in found], yerr=errors, capsize=4)
    time_axis.tick_params(axis="x", labelrotation=20)
    time_axis.set(ylabel="seconds for answers of one length", yscale="log")
    names = ("plain", "cards", "args_loop")
    found = [result.figures[f"reward_{name}"] for name in names]
    errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
    reward_axis.bar(names, [f.value for f in found], yerr=errors, capsize=4)
    reward_axis.axhline(0, color="black", linewidth=0.8)
    reward_axis.set(ylabel="reward (judge-other)", title=f"{result.setting['reward_prompts']} held-out prompts")
    for way, dear in result.samples["sampled_tokens_per_token"].items():
        cost, reward = mean(dear), result.figures[f"reward_{way}"]
        trade_axis.errorbar(
            cost.value,
            reward.value,
            xerr=[[cost.value - cost.low], [cost.high - cost.value]],
            yerr=[[reward.value - reward.low], [reward.high - reward.value]],
            fmt="o",
            capsize=3,
            label=f"cards at {SHARES[1]:g}" if way == "cards" else way.replace("_", " "),
        )
    trade_axis.set(
        xlabel="sampled tokens per token delivered",
        ylabel="reward (judge-other)",
        xscale="log",
        title="price of a reward",
    )
    trade_axis.legend(fontsize=7)
    save()
