"""Bench `asap` against enumerated languages: `exact` on a model that is a table, and all samplers on the lab's bits."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_align_spec import lab
from vllm_align_spec.bench import asap_table
from vllm_align_spec.bench.asap_engine import Answer, Ask, drive
from vllm_align_spec.bench.asap_language import Floats, Language, prefixes
from vllm_align_spec.bench.asap_steps import exactly
from vllm_align_spec.bench.measure import Figure, Result, mean, start_engine

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

GRAMMAR = 'root ::= "00000" | "1" [01] [01] [01] [01]'
SENTENCES = ["00000", *("1" + "".join(bits) for bits in itertools.product("01", repeat=4))]
TABLE, TABLE_LANES = (4, 0.7), 32
"""Seed and spread: all 17 sentences are about as likely, and a mask alone is far off (0.62), so a wrong law shows."""
BLOCKS = 20

QUESTION = "Give me a binary string of 8 bits of your choice."
LENGTH = 8
RULES: dict[str, Callable[[str], bool]] = {
    "palindromes": lambda bits: bits == bits[::-1],
    "two ones": lambda bits: bits.count("1") == 2,
    'no "11"': lambda bits: "11" not in bits,
}
"""Some of the lab's own rules (`lab.world`), which the question does not tell the model."""
LANES = 16
RESAMPLED = 10
"""GCD draws of which importance resampling keeps one."""
SAMPLERS = ("gcd", "resampled", "adaptive", "weighted", "exact")


def exact(result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """`exact` in lanes side by side, a number of samples that is fixed before the first one is drawn."""
    count = 600 if quick else 4000
    logits = asap_table.table(*TABLE)
    language = Language(
        SENTENCES,
        asap_table.rows_of(logits, SENTENCES),
        (asap_table.ZERO_ID, asap_table.ZERO_ID + 1),
        asap_table.END_ID,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = asap_table.write(Path(folder), logits)
        control = {"align_spec": {"control_ids": list(asap_table.CONTROL_IDS)}}
        with start_engine(
            model, "a model that is a table", max_model_len=128, max_num_seqs=TABLE_LANES, additional_config=control
        ) as engine:
            tick()
            asks = [
                Ask((asap_table.BOS_ID,), {"grammar": GRAMMAR}, 1 + i, 12, "exact", max_attempts=4096)
                for i in range(count)
            ]
            _, answers = drive(engine, asks, TABLE_LANES)
            tick()
    # Every one of them was accepted: leaving out those that run out of attempts would bend the law.
    assert all(answer.error is None for answer in answers), "a choice ran out of attempts"
    distance = language.distance(language.counts([answer.text for answer in answers]))
    noise = language.noise(count)
    attempts = [float(answer.report["attempts"]) for answer in answers]
    masked = language.distance(language.next_law(()))
    bound = float(np.quantile(noise, 0.999))
    result.samples["exact"] = {
        "samples": count,
        "lanes": TABLE_LANES,
        "total_variation": distance,
        "bound": bound,
        "noise_quantiles": {str(q): float(np.quantile(noise, q)) for q in (0.5, 0.95, 0.999)},
        "masked_total_variation": masked,
        "log_mass": language.log_mass,
        "attempts": attempts,
    }
    result.figures["exact_tv_over_bound"] = exactly(distance / bound, "<= 1")
    result.figures["masked_tv_over_bound"] = exactly(masked / bound)
    result.figures["attempts_per_sample"] = mean(attempts)
    result.figures["attempts_per_sample_last"] = mean(attempts[-(count // BLOCKS) :])


def blocks(values: Sequence[float], count: int = BLOCKS) -> list[Figure]:
    """Means of consecutive blocks."""
    size = len(values) // count
    return [mean(values[i * size : (i + 1) * size]) for i in range(count)]


def lab_languages(prompt: Sequence[int], end: int) -> dict[str, Language]:
    """Each rule's strings under the lab's base model, by an independent forward pass over all of them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = lab.model_path("base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits = [i for i in range(len(tokenizer)) if (text := tokenizer.decode([i])) and not text.strip("01")]
    assert [tokenizer.decode([i]) for i in bits] == ["0", "1"], "a string of bits has one tokenisation"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    strings = ["".join(s) for s in itertools.product("01", repeat=LENGTH)]
    fed = torch.tensor([[*prompt, *(bits[int(bit)] for bit in string)] for string in strings])
    with torch.no_grad():
        rows = model(fed).logits[:, len(prompt) - 1 :].double().log_softmax(-1).numpy()
    after: dict[str, Floats] = {s[:i]: row[i] for s, row in zip(strings, rows, strict=True) for i in range(LENGTH + 1)}
    return {
        name: Language([s for s in strings if rule(s)], after, (bits[0], bits[1]), end) for name, rule in RULES.items()
    }


def samplers(engine: LLM, result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """Five ways to sample the same languages; the distance to the truth after so and so many samples."""
    count, runs, rules = (128, 1, 2) if quick else (512, 2, len(RULES))
    tokenizer = engine.get_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    languages = dict(list(lab_languages(prompt, tokenizer.eos_token_id).items())[:rules])
    sizes = [2**i for i in range(1, int(math.log2(count)) + 1)]
    curves: dict[str, list[list[float]]] = {name: [] for name in (*SAMPLERS, "truth", "next sample")}
    cost: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    told: dict[str, Any] = {}
    for name, language in languages.items():
        told[name] = {
            "strings": len(language.strings),
            "log_mass": language.log_mass,
            "masked_total_variation": language.distance(language.next_law(())),
        }
        for run in range(runs):
            drawn = _draw(engine, tuple(prompt), language, f"{name} {run}", count, run)
            weights = [math.exp(answer.log_weight or 0.0) for answer in drawn["weighted"]]
            words = {way: [answer.text for answer in answers] for way, answers in drawn.items()}
            words["resampled"] = _resample(language, words["gcd"], run)
            for way in SAMPLERS:
                weighted = weights if way == "weighted" else None
                curves[way].append(
                    [
                        language.distance(language.counts(words[way][:n], weighted and weighted[:n]))
                        for n in sizes
                    ]
                )  # fmt: skip
            curves["truth"].append([float(language.noise(n, 500).mean()) for n in sizes])
            curves["next sample"].append(
                [language.distance(language.next_law(prefixes(words["adaptive"][:n]))) for n in sizes]
            )
            for way in SAMPLERS:
                attempts = [float(answer.report.get("attempts", 1)) for answer in drawn.get(way, ())] or [RESAMPLED]
                cost[way].append(sum(attempts) / len(attempts))
            told[name].setdefault("z_estimate", []).append(sum(weights) / len(weights))
            tick()
    result.samples["samplers"] = {
        "question": QUESTION,
        "languages": told,
        "sizes": sizes,
        "total_variation": curves,
        "attempts_per_sample": cost,
    }
    result.setting |= {"samplers_samples": count, "samplers_runs": runs}
    for way in (*SAMPLERS, "truth"):
        result.figures[f"tv_{way}"] = mean([curve[-1] for curve in curves[way]])
    result.figures["tv_next_sample_adaptive"] = mean([curve[-1] for curve in curves["next sample"]])
    result.figures["samplers_attempts_exact"] = mean(cost["exact"])


def _draw(
    engine: LLM, prompt: tuple[int, ...], language: Language, salt: str, count: int, run: int
) -> dict[str, list[Answer]]:
    """Samples of each way that the engine knows; every one learns from its own trie only."""
    grammar = {"choice": language.strings}
    found = {}
    for way, mode, number in (
        ("gcd", None, RESAMPLED * count),
        ("adaptive", "adaptive", count),
        ("weighted", "weighted", count),
        ("exact", "exact", count),
    ):
        asks = [
            Ask(prompt, grammar, 1_000_000 * run + i, LENGTH + 4, mode, f"{salt} {way}" if mode else "", 4096)
            for i in range(number)
        ]
        lanes = LANES if mode else 4 * LANES
        _, answers = drive(engine, asks, lanes)
        assert all(answer.error is None for answer in answers), "every choice was accepted"
        found[way] = answers
    return found


def _resample(language: Language, words: Sequence[str], seed: int) -> list[str]:
    """One of every ten GCD draws, by importance; what a mask does is known from the enumeration, so it is free."""
    weight = dict(zip(language.strings, np.exp(language.log_p) / language.next_law(()), strict=True))
    rng = np.random.default_rng(seed)
    found = []
    for i in range(0, len(words), RESAMPLED):
        group = list(words[i : i + RESAMPLED])
        weights = np.array([weight[word] for word in group])
        found.append(group[rng.choice(len(group), p=weights / weights.sum())])
    return found
