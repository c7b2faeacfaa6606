"""Time, reward and judge calls of cascade reward sampling on the lab's models, against ARGS as it is published.

Reward and price are also those of best-of-N with the same judge, so that one picture shows what a reward costs.

The published loop (`args_loop`) and CARDS are guided by one judge; rewards are those of another, which no decoding
consults. Time is taken twice. Of equally long answers, one prompt at a time, each way right after the other: as long as
CARDS' own, because tokens beyond an answer's natural end please no judge and would be tried again and again. And of
answers of natural length to the held-out prompts whose rewards are compared, until the last one is there: the engine is
asked for three answers of each prompt, all at once, the loop knows nothing but one after the other. Thresholds come
from the reward and entropy quantiles of plain samples, as ``vllm-align-spec calibrate`` proposes them, on prompts that
are not used again.
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
from vllm_align_spec.bench.measure import PAUSE_S, Figure, Result, axes, console, mean, median, ratios, start_engine
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
TIMED = 3
"""Answers of each prompt that are asked for at once, where that is timed."""
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
    repeats, prompts, calibration = (4, 12, 6) if quick else (12, 64, 24)
    result = Result("cards")
    result.setting |= {
        "models": {"base": "lab base", "judge": "lab judge", "evaluation": "lab judge-other"},
        "max_tokens": TOKENS,
        "repeats": repeats,
        "reward_prompts": prompts,
        "answers_at_once": TIMED * prompts,
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
            max_num_seqs=64,
            additional_config={"align_spec": {"rewards": rewards}},
        ) as engine,
    ):
        asked = [
            engine.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in questions
        ]
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("calibration", total=3)
            targets = _calibrate(engine, questions[-calibration:])
            options = targets[SHARES[1]]
            result.setting["cards"] = {f"quantile {share:g}": one for share, one in targets.items()}
            progress.update(task, advance=1, description="time")
            _times(engine, loop, options, asked, repeats, result)
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
        for choice in _answers(engine, questions, [_params(seed, plain)] * len(questions))[2]
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
) -> tuple[float, list[Any], list[dict[str, Any]]]:
    """Seconds until all conversations are answered, outputs, and the reports of those that used a method."""
    began = time.perf_counter()
    outputs = engine.chat(list(questions), list(params), use_tqdm=False)
    seconds = time.perf_counter() - began
    reports = [engine.report(output) for output in outputs]
    return seconds, outputs, [report["choices"][0] for report in reports if report is not None]


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
    # So many requests fill the engine: candidates that turn out not to be needed would only take room. The answers are
    # the same.
    targets = {share: {**options, "cards_candidates": 1} for share, options in targets.items()}
    texts: dict[str, list[str]] = {}
    dearness: dict[str, list[float]] = result.samples.setdefault("sampled_tokens_per_token", {})
    ways = {"plain": None, **{_of_share(share): options for share, options in targets.items()}}
    ways |= {f"best_of_{n}": {"bon": n, "bon_reward": "judge"} for n in BEST_OF}
    seconds: dict[str, list[float]] = result.samples.setdefault("seconds_all_at_once", {})
    tokens: dict[str, list[int]] = result.samples.setdefault("response_tokens", {})

    def answers(way: str, seeds: Sequence[int]) -> tuple[list[Any], list[dict[str, Any]]]:
        time.sleep(PAUSE_S)
        params = [_params(seed + i, ways[way]) for seed in seeds for i in range(count)]
        spent, outputs, choices = _answers(engine, [*questions] * len(seeds), params)
        if len(seeds) == TIMED:
            seconds.setdefault(way, []).append(spent / TIMED)
        return outputs, choices

    for way in ways:
        timed = way in ("plain", "cards")
        outputs, choices = answers(way, range(1000, 1000 * (TIMED if timed else 1) + 1, 1000))
        texts[way] = [output.outputs[0].text for output in outputs[:count]]
        tokens[way] = [len(output.outputs[0].token_ids) for output in outputs]
        dearness[way] = [one["sampled_tokens"] / max(one["response_tokens"], 1) for one in choices] or [1.0] * count
    time.sleep(PAUSE_S)
    began = time.perf_counter()
    found = [loop(prompt, TOKENS, [tokenizer.eos_token_id]) for prompt in asked[:count]]
    seconds["args_loop"] = [time.perf_counter() - began]
    texts["args_loop"] = [tokenizer.decode(answer, skip_special_tokens=True) for answer in found]
    tokens["args_loop"] = [len(answer) for answer in found]
    for way in ("plain", "cards"):
        answers(way, range(5000, 5000 + 1000 * TIMED, 1000))
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
    at_once = result.samples["seconds_all_at_once"]
    loops = at_once["args_loop"] * len(at_once["cards"])
    figures["time_ratio_to_args_loop_all_at_once"] = median(ratios(at_once["cards"], loops), "<= 0.2")
    figures["time_ratio_to_plain_all_at_once"] = median(ratios(at_once["cards"], at_once["plain"]))
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
    (time_axis, all_axis, reward_axis, trade_axis), save = axes(
        out, "cards", 4, "Cascade reward sampling on the lab models"
    )

    def bars(axis: Any, found: dict[str, Figure]) -> None:
        errors = [[f.value - f.low for f in found.values()], [f.high - f.value for f in found.values()]]
        axis.bar(list(found), [f.value for f in found.values()], yerr=errors, capsize=4)
        axis.tick_params(axis="x", labelrotation=20)

    prompts = f"{result.setting['reward_prompts']} held-out prompts"
    names = ("plain", "cards", "args_loop")
    bars(time_axis, {way: median(result.samples["seconds"][way]) for way in WAYS})
    time_axis.set(ylabel="seconds, answers of one length", title="one prompt at a time", ylim=0)
    bars(all_axis, {name: median(result.samples["seconds_all_at_once"][name]) for name in names})
    all_axis.set(ylabel="seconds an answer of each", title=f"{prompts}; the loop one by one", yscale="log")
    bars(reward_axis, {name: result.figures[f"reward_{name}"] for name in names})
    reward_axis.axhline(0, color="black", linewidth=0.8)
    reward_axis.set(ylabel="reward (judge-other)", title=prompts)
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
