"""Speed and effect of reward-guided search, and effect of realignment, on the lab's models.

Speed is that of equally long answers (``ignore_eos``), greedy, by one engine: guided and plain requests run one right
after the other, so that a slow moment of the machine hits both. The loop that it is also held against is the published
one with transformers (`args_loop`), on the same prompts; its tokens are compared with the engine's. It can only answer
one prompt after the other; the engine is timed that way and with all prompts at once, until the last answer is there.

Effect is the reward of sampled answers of natural length by the judge that did not guide, and their perplexity under
the base model: over the weight of ARGS, and over the lambda of DeRa with the lab's small aligned model.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import (
    PAUSE_S,
    Result,
    axes,
    console,
    mean,
    median,
    ratios,
    start_engine,
)
from vllm_align_spec.bench.shares import SHARES, measure

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

TOKENS = 128
FOREIGN_LEN = 2048
"""Of the companion with another tokenizer, which needs more tokens for the longest prompts."""
LOOPS = (
    {"batch": 1, "prompt": 0, "tokens": 128, "groups": 6},
    {"batch": 16, "prompt": 0, "tokens": 128, "groups": 2},
    {"batch": 4, "prompt": 768, "tokens": 32, "groups": 2},
)
"""How many prompts of which length the engine answers at once, and how many such groups; see `_loop`."""
TOP_K = 10
REPEATS = {"speed": 6, "growth": 4}
WEIGHT = 1.0
WEIGHT_SIGN, LAMBDA_SIGN = "w = ", "λ = "
"""What the names of sampled answers begin with."""
BASE, BATCHES, TOP_KS, PROMPTS = {"batch": 1, "k": TOP_K, "prompt": 0}, (1, 4, 8, 16), (1, 5, 10, 40), (64, 256, 768)


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: batches 1 and 8, few repeats and prompts.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    settings: list[dict[str, int]] = [{**BASE, "batch": batch} for batch in ((1, 8) if quick else BATCHES)]
    if not quick:
        settings += [{**BASE, "batch": batch, "k": k} for batch in (1, 8) for k in TOP_KS if k != TOP_K]
        settings += [{**BASE, "batch": 8, "prompt": length} for length in PROMPTS]
    weights = (0.0, 1.0, 3.0) if quick else (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
    lambdas = (0.5, 1.0) if quick else (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    answers: dict[str, dict[str, Any] | None] = {"plain": None}
    answers |= {f"{WEIGHT_SIGN}{weight:g}": _options(weight) for weight in weights}
    answers |= {
        f"{LAMBDA_SIGN}{value:g}": {"dera": "on", "dera_model": "aligned", "dera_lambda": value} for value in lambdas
    }
    loops = tuple({**one, "groups": 1} for one in LOOPS) if quick else LOOPS
    count = 32 if quick else 64
    result = Result("args")
    sizes = {name: _size(name) for name in ("base", "judge", "pilot")}
    result.setting |= {
        "models": {"base": "lab base", "reward": "lab judge", "aligned": "lab pilot", "judge": "lab judge-other"},
        "parameters": sizes,
        "tokens": TOKENS,
        "loops": list(loops),
        "repeats": REPEATS,
        "prompts": count,
        "weights": list(weights),
        "lambdas": list(lambdas),
        "quick": quick,
    }
    with result.kept(out), tempfile.TemporaryDirectory() as folder:
        foreign = Path(folder)
        _save_foreign_judge(foreign)
        with (
            _engine(foreign) as engine,
            Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress,
        ):
            prompts = _prompts(engine)
            task = progress.add_task("", total=len(settings) + len(loops) + len(answers))
            for setting in settings:
                progress.update(task, description=", ".join(f"{name} {value}" for name, value in setting.items()))
                _measure(engine, prompts, setting, REPEATS["growth" if _grown(setting) else "speed"], result)
                progress.advance(task)
            for setting in loops:
                progress.update(task, description=f"the published loop, {setting['batch']} prompts")
                _loop(engine, prompts, setting, result)
                progress.advance(task)
            for way, options in answers.items():
                progress.update(task, description=f"answers, {way}")
                _answers(engine, prompts[:count], way, options, result)
                progress.advance(task)
        del engine
        gc.collect()  # an engine that is only collected as the interpreter exits complains
        _shares(result, _settings(foreign), prompts)
    with result.kept(out):
        _figures(result)
        _draw(result, out)
    result.finish(json_file, out, started)


def _save_foreign_judge(folder: Path) -> None:
    """A reward model of the judge's shape that cuts text as the lab's other pilot does; for its speed alone."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab.model_path("pilot-other"))
    config = AutoConfig.from_pretrained(lab.model_path("judge"))
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.max_position_embeddings = FOREIGN_LEN
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _settings(foreign: Path) -> dict[str, Any]:
    companions = {
        "judge": {"model": str(lab.model_path("judge")), "role": "reward"},
        "foreign": {"model": str(foreign), "role": "reward", "max_len": FOREIGN_LEN},
        "aligned": {"model": str(lab.model_path("pilot")), "role": "lm"},
    }
    return {
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,  # prompts come again
        "additional_config": {"align_spec": {"companions": companions}},
    }


def _engine(foreign: Path) -> LLM:
    return start_engine(str(lab.model_path("base")), "its companions", **_settings(foreign))


def _shares(result: Result, settings: dict[str, Any], prompts: list[list[int]]) -> None:
    """Where a step's time goes, plain and guided."""
    from rich.table import Table

    parts = [name for name in SHARES if name != "drafting"]
    table = Table("requests", "batch", *parts, title="share of a step's time", title_justify="left")
    ways = {"plain": None, "guided": _options(WEIGHT)}
    base = str(lab.model_path("base"))
    told = measure(base, "a clock in its worker", settings, prompts, TOKENS, (1, 8), list(ways.values()))
    result.tables["share_of_step_time"] = dict(zip(ways, told, strict=True))
    for way, of_batch in result.tables["share_of_step_time"].items():
        for batch, shares in of_batch.items():
            table.add_row(way, str(batch), *(f"{shares[part]:.2f}" for part in parts))
    console.print(table)


def _options(weight: float, top_k: int = TOP_K, companion: str = "judge") -> dict[str, Any]:
    return {"args": "on", "args_reward": companion, "args_weight": weight, "args_top_k": top_k}


def _size(name: str) -> int:
    from safetensors import safe_open

    total = 0
    with safe_open(str(lab.model_path(name) / "model.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            total += math.prod(file.get_slice(key).get_shape())
    return total


def _prompts(engine: LLM) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in lab.heldout_prompts("chat")
    ]


def _generate(
    engine: LLM,
    prompts: Sequence[list[int]],
    options: dict[str, Any] | None,
    **params: Any,
) -> tuple[float, list[Any]]:
    """Seconds and outputs; without options it is plain decoding."""
    from vllm import SamplingParams

    told = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, **params}
    time.sleep(PAUSE_S)
    began = time.perf_counter()
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [
            SamplingParams(extra_args=options, seed=i if told["temperature"] else None, **told)
            for i in range(len(prompts))
        ],
        use_tqdm=False,
    )
    return time.perf_counter() - began, outputs


def setting_name(setting: dict[str, int]) -> str:
    """The key of one setting among the samples."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def _grown(setting: dict[str, int]) -> bool:
    """Whether it is one of those that show how cost grows, and not one of the batches alone."""
    return any(setting[name] != BASE[name] for name in ("k", "prompt"))


def _measure(engine: LLM, prompts: list[list[int]], setting: dict[str, int], repeats: int, result: Result) -> None:
    """Plain and guided in turn; the first round warms up and does not count."""
    batch, length = setting["batch"], setting["prompt"]
    seconds: dict[str, list[float]] = {"plain": [], "guided": [], "bridged": []}
    for repeat in range(-1, repeats):
        first = max(repeat, 0) * batch
        chosen = _long([prompts[(first + i) % len(prompts)] for i in range(batch)], length)
        ways = {"plain": None, "guided": _options(WEIGHT, setting["k"])}
        if not _grown(setting):
            ways["bridged"] = _options(WEIGHT, companion="foreign")
        for way, options in ways.items():
            spent, _ = _generate(engine, chosen, options)
            if repeat >= 0:
                seconds[way].append(spent)
    result.samples.setdefault("seconds", {})[setting_name(setting)] = seconds


def _loop(engine: LLM, prompts: list[list[int]], setting: dict[str, int], result: Result) -> None:
    """The published loop and the engine on the same prompts: the loop one after the other, the engine all at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    from vllm_align_spec.bench.args_loop import args_loop

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(lab.model_path("base"), dtype=torch.float32).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(lab.model_path("judge"), dtype=torch.float32).eval()
    batch, tokens = setting["batch"], setting["tokens"]
    seconds: dict[str, list[float]] = {"loop": [], "guided": []}
    same: list[float] = []
    for group in range(setting["groups"]):
        chosen = _long(prompts[group * batch : (group + 1) * batch], setting["prompt"])
        _generate(engine, chosen, _options(WEIGHT), max_tokens=tokens)  # warms up
        spent, outputs = _generate(engine, chosen, _options(WEIGHT), max_tokens=tokens)
        seconds["guided"].append(spent)
        began = time.perf_counter()
        found = [
            args_loop(base, judge, prompt, weight=WEIGHT, top_k=TOP_K, max_new_tokens=tokens, stop_ids=())
            for prompt in chosen
        ]
        seconds["loop"].append(time.perf_counter() - began)
        same += [float(a == list(b.outputs[0].token_ids)) for a, b in zip(found, outputs, strict=True)]
    name = setting_name({key: setting[key] for key in ("batch", "prompt")})
    result.samples.setdefault("loop", {})[name] = {"seconds": seconds, "same_tokens": same}


def _long(prompts: list[list[int]], length: int) -> list[list[int]]:
    """Prompts of so many tokens, each repeated until it has them; 0 leaves them as they are."""
    return [(prompt * (length // len(prompt) + 1))[-length:] for prompt in prompts] if length else prompts


def _answers(engine: LLM, prompts: list[list[int]], way: str, options: dict[str, Any] | None, result: Result) -> None:
    """Rewards and log-probabilities of sampled answers."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_align_spec.lab.judge import Judge

    _, outputs = _generate(engine, prompts, options, temperature=1.0, ignore_eos=False, max_tokens=160)
    questions = lab.heldout_prompts("chat")[: len(prompts)]
    said = [
        [*question, {"role": "assistant", "content": output.outputs[0].text}]
        for question, output in zip(questions, outputs, strict=True)
    ]
    base = AutoModelForCausalLM.from_pretrained(lab.model_path("base"), dtype=torch.float32).eval()
    logs: list[float] = []
    lengths: list[int] = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            rows = base(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logs.append(float(rows.gather(1, torch.tensor(tokens)[:, None]).sum()))
            lengths.append(len(tokens))
    result.samples.setdefault("answers", {})[way] = {
        "rewards": Judge("judge-other").score(said),
        "log_p": logs,
        "tokens": lengths,
    }


def _figure_name(way: str) -> str:
    return way.replace(WEIGHT_SIGN, "weight_").replace(LAMBDA_SIGN, "lambda_")


def _figures(result: Result) -> None:
    for name, seconds in result.samples["seconds"].items():
        words = dict(part.split(" ") for part in name.split(", "))
        changed = "".join(f"_{key}_{words[key]}" for key in ("k", "prompt") if words[key] != str(BASE[key]))
        aim = ">= 0.65" if not changed and words["batch"] in ("1", "8") else ""
        found = median(ratios(seconds["plain"], seconds["guided"]), aim)
        result.figures[f"throughput_ratio_batch_{words['batch']}{changed}"] = found
        if seconds["bridged"]:
            found = median(ratios(seconds["plain"], seconds["bridged"]))
            result.figures[f"throughput_ratio_batch_{words['batch']}_other_tokenizer"] = found
    for name, told in result.samples["loop"].items():
        key = "_".join(name.replace(", prompt 0", "").replace(",", "").split(" "))
        found = median(ratios(told["seconds"]["loop"], told["seconds"]["guided"]), ">= 20" if key == "batch_16" else "")
        result.figures[f"speedup_over_loop_{key}"] = found
        result.figures[f"loop_same_tokens_{key}"] = mean(told["same_tokens"])
    answers = result.samples["answers"]
    plain = answers["plain"]["rewards"]
    for way, told in answers.items():
        name = _figure_name(way)
        uplift = [reward - without for reward, without in zip(told["rewards"], plain, strict=True)]
        result.figures[f"reward_{name}"] = mean(told["rewards"])
        if way != "plain":
            result.figures[f"reward_uplift_{name}"] = mean(uplift, "> 0" if way != f"{WEIGHT_SIGN}0" else "")
        perplexity = math.exp(-sum(told["log_p"]) / sum(told["tokens"]))
        result.figures[f"perplexity_{name}"] = median([perplexity])


def _draw(result: Result, out: Path) -> None:
    (batch_axis, growth_axis, weight_axis), save = axes(out, "args", 3, "Reward-guided search on the lab models")

    def line(axis: Any, changed: str, values: Sequence[int], fixed: dict[str, int], label: str) -> None:
        names = {value: setting_name({**BASE, **fixed, changed: value}) for value in values}
        measured = [value for value in values if names[value] in result.samples["seconds"]]
        every = [result.samples["seconds"][names[value]] for value in measured]
        points = [median(ratios(seconds["plain"], seconds["guided"])) for seconds in every]
        errors = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        axis.errorbar(measured, [p.value for p in points], yerr=errors, capsize=3, marker="o", label=label)

    line(batch_axis, "batch", BATCHES, {}, f"k = {TOP_K}")
    batch_axis.set_xscale("log", base=2)
    batch_axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    batch_axis.set(xlabel="batch", ylabel="tokens/s / plain decoding's", ylim=(0, 1.05))
    batch_axis.axhline(0.65, color="black", linewidth=0.8, linestyle=":")
    line(growth_axis, "k", TOP_KS, {"batch": 1}, "candidates k, batch 1")
    line(growth_axis, "k", TOP_KS, {"batch": 8}, "candidates k, batch 8")
    line(growth_axis, "prompt", PROMPTS, {"batch": 8}, "prompt tokens, batch 8")
    growth_axis.set_xscale("log")
    growth_axis.set(xlabel="k, or prompt tokens", ylabel="tokens/s / plain decoding's", ylim=(0, 1.05))
    growth_axis.legend(fontsize=7)
    _draw_effect(weight_axis, result, WEIGHT_SIGN)
    save()
    (lambda_axis,), save = axes(out, "dera", 1, "Realignment on the lab models")
    _draw_effect(lambda_axis, result, LAMBDA_SIGN)
    save()


def _draw_effect(axis: Any, result: Result, sign: str) -> None:
    """Reward, and perplexity on the right, over one knob; plain decoding's as lines across."""
    ways = [way for way in result.samples["answers"] if way.startswith(sign)]
    knob = [float(way.removeprefix(sign)) for way in ways]
    rewards = [result.figures[f"reward_{_figure_name(way)}"] for way in ways]
    errors = [[f.value - f.low for f in rewards], [f.high - f.value for f in rewards]]
    axis.errorbar(knob, [f.value for f in rewards], yerr=errors, capsize=3, marker="o")
    axis.axhline(result.figures["reward_plain"].value, color="C0", linestyle=":", linewidth=0.8)
    axis.set(xlabel=sign.partition(" ")[0], ylabel="reward by judge-other")
    axis.yaxis.label.set_color("C0")
    right = axis.twinx()
    right.plot(knob, [result.figures[f"perplexity_{_figure_name(way)}"].value for way in ways], color="C1", marker="s")
    right.axhline(result.figures["perplexity_plain"].value, color="C1", linestyle=":", linewidth=0.8)
    right.set(ylabel="perplexity under base (dotted: plain)", yscale="log")
    right.yaxis.label.set_color("C1")
    right.yaxis.set_minor_formatter("{x:g}" if sign == WEIGHT_SIGN else "")
