"""Builds everything the lab ships, from a seed: tokenizers, models, held-out prompts, curves and a report."""

from __future__ import annotations

import itertools
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from vllm_align_spec.lab import MODELS, tokenizer, training, world

REPORT = "report.json"
PROMPTS = "prompts.jsonl"
CURVES = "curves.png"


@dataclass(frozen=True)
class Plan:
    """A model's shape and its part of the build."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    rate: float  # peak learning rate
    steps: int
    shallow: int = 0  # of the steps, those taken two layers deep
    helpful_share: float = 1.0  # of the chat answers that it learns from
    form: tokenizer.Format = tokenizer.MAIN
    half: int | None = None  # of the requests, for a judge


PLANS: dict[str, Plan] = {
    "base": Plan(256, 8, 4, 2, 768, rate=2e-3, steps=2200, shallow=900, helpful_share=world.HELPFUL_SHARE),
    "pilot": Plan(192, 2, 3, 1, 448, rate=3e-3, steps=1000),
    "pilot-other": Plan(192, 2, 3, 1, 320, rate=3e-3, steps=900, form=tokenizer.OTHER),
    "judge": Plan(128, 2, 4, 2, 352, rate=2e-3, steps=450, half=0),
    "judge-other": Plan(128, 2, 4, 2, 352, rate=2e-3, steps=450, half=1),
}


def _config(plan: Plan, words: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=plan.form.vocab_size,
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.hidden // plan.heads,
        intermediate_size=plan.intermediate,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=words.convert_tokens_to_ids(plan.form.pad),
        bos_token_id=words.convert_tokens_to_ids(plan.form.bos),
        eos_token_id=words.convert_tokens_to_ids(plan.form.end),
    )


def _tokenizer_texts(seed: int) -> Iterator[str]:
    for document in itertools.islice(world.stream(seed, "train"), 20_000):
        yield "\n".join(message["content"] for message in document.messages) or document.text
    for name, text in world.docstrings():
        if world.split_of(f"prose/{name}") == "train":
            yield text


def _documents(
    words: PreTrainedTokenizerFast, seed: int, split: world.Split, helpful_share: float
) -> Iterator[training.Encoded]:
    for document in world.stream(seed, split, helpful_share=helpful_share):
        yield training.encode(document, words)


def _sample(
    words: PreTrainedTokenizerFast, kind: world.Kind, helpful_share: float, count: int = 120
) -> list[training.Encoded]:
    rng = random.Random(f"held out {kind}")
    return [training.encode(world.draw(kind, rng, "heldout", helpful_share=helpful_share), words) for _ in range(count)]


def data_digest(seed: int) -> str:
    """A digest of the training data: it changes when the generator does, or Python's docstrings do."""
    digest = blake2b(digest_size=16)
    for document in itertools.islice(world.stream(seed, "train"), 5_000):
        digest.update(repr(document).encode())
    return digest.hexdigest()


def write_prompts(path: Path, seed: int) -> None:
    """Held-out prompts as JSON lines of ``kind`` and ``messages``: 240 of chat, at most 60 of each other kind."""
    rng = random.Random(f"prompts {seed}")
    with path.open("w", encoding="utf-8") as file:
        for kind in world.KINDS:
            seen: set[str] = set()
            for _ in range(5_000):
                document = world.draw(kind, rng, "heldout")
                first = next((i for i, m in enumerate(document.messages) if m["role"] == "assistant"), 0)
                prompt = json.dumps(document.messages[:first], ensure_ascii=False)
                if first and prompt not in seen:
                    seen.add(prompt)
                    file.write(json.dumps({"kind": kind, "messages": document.messages[:first]}) + "\n")
                if len(seen) == (240 if kind == "chat" else 60):
                    break


def _progress() -> Progress:
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(width=100))


def _save(model: LlamaForCausalLM | LlamaForSequenceClassification, words: PreTrainedTokenizerFast, to: Path) -> None:
    model.to(torch.float16).save_pretrained(to)
    words.save_pretrained(to)
    for file in to.iterdir():
        file.chmod(0o644)  # weights are written readable by their owner alone
    # Written without indentation, a tokenizer is half as large.
    path = to / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":")),
        encoding="utf-8",
    )


def _swap(new: Path, place: Path) -> None:
    """Put a finished folder in its place; readers see the old one or the new one, never half of one."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _train(
    name: str, folder: Path, out: Path, words: PreTrainedTokenizerFast, *, seed: int, scale: float, progress: Progress
) -> dict[str, Any]:
    """Train one model into ``folder``; its figures. A pilot learns from the base model in ``out``."""
    plan = PLANS[name]
    torch.manual_seed(seed + MODELS.index(name))
    config = _config(plan, words)
    trace = training.Trace()
    steps = max(4, round(plan.steps * scale))
    run: dict[str, Any] = {
        "rate": plan.rate,
        "steps": steps,
        "progress": progress,
        "task": progress.add_task(name, total=1.0, status=""),
        "trace": trace,
    }
    figures: dict[str, Any] = {}
    model: LlamaForCausalLM | LlamaForSequenceClassification
    if plan.half is not None:
        config.num_labels = 1
        config.problem_type = "regression"  # so that servers return the score itself, not its sigmoid
        model = LlamaForSequenceClassification(config)
        training.train_judge(model, words, seed=seed + 1000 + plan.half, half=plan.half, **run)
        figures["pairwise_accuracy"] = training.pairwise_accuracy(model, words, seed=seed)
    else:
        documents = _documents(words, seed + 2000 + MODELS.index(name), "train", plan.helpful_share)
        teacher = None
        if name == "pilot" and (out / "base" / "model.safetensors").exists():
            teacher = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
        if plan.shallow:
            model = LlamaForCausalLM(_config(replace(plan, layers=2), words))
            training.train_language_model(model, documents, until=steps * plan.shallow // plan.steps, **run)
            model = training.grow(model, config)
            training.train_language_model(model, documents, **run)
        elif teacher is not None:
            model = LlamaForCausalLM(config)
            training.train_language_model(model, documents, until=steps // 2, **run)
            training.train_language_model(model, documents, teacher=teacher, **run)
            figures["agreement_with_base"] = training.agreement(teacher, model, _sample(words, "chat", 1.0))
        else:
            model = LlamaForCausalLM(config)
            training.train_language_model(model, documents, **run)
        figures["perplexity"] = _perplexities(model, words, both=plan.helpful_share < 1)
    parameters = sum(p.numel() for p in model.parameters())
    _save(model, words, folder)
    figures |= {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "steps": trace.steps,
        "tokens_seen": trace.tokens,
        "seconds": round(trace.seconds, 1),
        "threads": torch.get_num_threads(),
        "curve": _thinned(trace.losses),  # (tokens seen, loss)
    }
    return figures


def _perplexities(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, *, both: bool) -> dict[str, float]:
    result = {"chat, helpful": training.perplexity(model, _sample(words, "chat", 1.0))}
    if both:
        result["chat, unhelpful"] = training.perplexity(model, _sample(words, "chat", 0.0))
    for kind in world.KINDS[1:]:
        result[kind] = training.perplexity(model, _sample(words, kind, 1.0))
    return result


def _thinned(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about sixty points of a curve, each the mean of its neighbours."""
    width = max(1, len(losses) // 60)
    groups = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [(group[-1][0], round(sum(loss for _, loss in group) / len(group), 4)) for group in groups]


def _draw_curves(models: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, figures in models.items():
        axis = axes[1 if "judge" in name else 0]
        axis.plot([tokens / 1e6 for tokens, _ in figures["curve"]], [loss for _, loss in figures["curve"]], label=name)
    for axis, title in zip(axes, ("language models: nats per token", "judges: Bradley-Terry loss"), strict=True):
        axis.set(title=title, xlabel="million tokens seen")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def build(out: Path, *, only: Sequence[str] | None = None, scale: float = 1.0, seed: int = 0) -> None:
    """Build the lab's models into ``out/<name>/``, with ``prompts.jsonl``, ``report.json`` and ``curves.png``.

    Each model is trained in a temporary folder beside its place and moved there when it is complete. With ``only``,
    the tokenizer and the figures of what is already in ``out`` are kept.

    Args:
        out: the folder to fill; made if missing.
        only: names of the models to build; all of them by default.
        scale: how many of the usual training steps; the models that ship took all of them.
        seed: seeds the data, the weights and the held-out prompts.

    Raises:
        ValueError: a name in ``only`` is not a lab model's.
    """
    names = [name for name in MODELS if only is None or name in only]
    if unknown := set(only or ()) - set(MODELS):
        raise ValueError(f"only: no lab model is called {sorted(unknown)[0]!r}; there are {', '.join(MODELS)}")
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report_path = out / REPORT
    whole = set(names) == set(MODELS)
    report: dict[str, Any] = {} if whole or not report_path.exists() else json.loads(report_path.read_text())
    models: dict[str, Any] = report.get("models", {})
    tokenizers: dict[tokenizer.Format, PreTrainedTokenizerFast] = {}
    for form, owner in ((tokenizer.MAIN, "base"), (tokenizer.OTHER, "pilot-other")):
        if owner not in names and (out / owner).exists():
            tokenizers[form] = AutoTokenizer.from_pretrained(out / owner)
        else:
            tokenizers[form] = tokenizer.train(_tokenizer_texts(seed), form)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch, _progress() as progress:
        for name in names:
            plan, folder = PLANS[name], Path(scratch) / name
            models[name] = _train(name, folder, out, tokenizers[plan.form], seed=seed, scale=scale, progress=progress)
            _swap(folder, out / name)
    write_prompts(out / PROMPTS, seed)
    _draw_curves(models, out / CURVES)
    report |= {
        "seed": seed,
        "scale": scale,
        "wall_seconds": round(report.get("wall_seconds", 0) + time.monotonic() - begin, 1),  # of all its parts
        "data_digest": data_digest(seed),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "models": models,
    }
    report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
