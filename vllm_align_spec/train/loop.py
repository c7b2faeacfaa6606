"""Trains a drafter against a frozen target, whose features are computed batch by batch, or once and then read.

Nothing depends on the clock or on how often a run was interrupted: the order of an epoch and the noise of a step follow
from the seed, so a resumed run takes the steps that an uninterrupted one would have.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_align_spec.drafters.config import EMBEDDING, IGNORED, DrafterConfig, check_target, for_target
from vllm_align_spec.drafters.config import read as read_drafter
from vllm_align_spec.drafters.fspad import Drafter
from vllm_align_spec.train import acceptance, data
from vllm_align_spec.train.config import TrainConfig
from vllm_align_spec.train.features import FeatureCache, identity
from vllm_align_spec.train.losses import Terms, Weights, hits, next_mask, terms
from vllm_align_spec.train.target import Target

LAST, LOG, CURVES, BOARD = "last", "log.jsonl", "curves.png", "tensorboard"
MAY_CHANGE = ("resume", "max_steps", "feature_cache", "feature_cache_gb")
"""Options that a resumed run may have otherwise."""
SMOOTHING = 0.98
NOISE_LENGTH = 512


class DivergedError(RuntimeError):
    """The loss is no number any more, or far above what it was."""


@dataclass
class State:
    """What a checkpoint keeps besides tensors."""

    step: int = 0  # optimiser steps taken
    epoch: int = 0
    batch: int = 0  # batches of this epoch that were used
    tokens: int = 0
    best: float = 0.0  # tokens per forward of the best drafter so far
    best_step: int = 0
    smoothed: float | None = None
    lowest: float = math.inf
    workers: int = 1
    data: str = ""  # digest of the conversations


@dataclass
class Result:
    """What a run did."""

    state: State
    acceptance: acceptance.Acceptance
    seconds: float
    parameters: int
    complaints: data.Complaints


@dataclass(frozen=True)
class Micro:
    """One forward pass's share of an optimiser step."""

    ids: Tensor  # [B, T]
    masks: list[Tensor]  # one [B, T] bool a pass
    features: Tensor  # [B, T, H] of the target
    noisy: Tensor  # [B, T, H], what the drafter sees
    embedded: Tensor  # [B, T, H] of the tokens that follow


@dataclass
class Workers:
    """The processes that train together; one, without torchrun."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Workers:
        """Joins those that torchrun started."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all of them, in place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers


def train(config: TrainConfig, *, console: Console | None = None) -> Result:
    """Trains, and leaves the best drafter in ``config.out``.

    Raises:
        DivergedError: the run was stopped; its last good checkpoint and its best drafter are there.
        ValueError: data, target and options do not fit.
    """
    return _Run(config, console or Console()).go()


class _Run:
    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.device = _device(config.device)
        self.workers = Workers.join(self.device)
        self.out = config.out
        self.target = Target(config.target, config.target_dtype, self.device)
        self.data = data.load(
            config.data, self.target.tokenizer, max_length=config.max_length, held_out=config.held_out
        )
        torch.manual_seed(config.seed)
        self.drafter = Drafter(self._drafter_config()).to(self.device)
        if config.start_from is not None:
            self.drafter.load_state_dict(_weights(config.start_from / "model.safetensors", self.device))
        self.optimiser = torch.optim.AdamW(
            self.drafter.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.cache: FeatureCache | None = None
        if config.feature_cache is not None:
            made_of = identity(self.target.model, config.precision, self.data.train)
            limit = int(config.feature_cache_gb * 1e9)
            # Two checkpoints at a time, float32 with two moments each, and the best drafter.
            reserve = 32 * self.drafter.config.parameters()
            self.cache = FeatureCache(config.feature_cache, limit, made_of, self.workers.size, reserve)
        self.weights = Weights(config.regress_weight, config.predict_weight, config.top_k_share)
        self.state = State(workers=self.workers.size, data=data.digest(self.data.train))
        self._board: Any = None
        self._cached = 0  # conversations since the last line of the log whose features were read
        self._last = acceptance.Acceptance(0, 0, ())
        last = self.out / LAST
        if config.resume:
            self._load(last)
        elif last.exists():
            raise ValueError(f"{last} has a checkpoint: go on from it with --resume, or train into another folder")

    def _drafter_config(self) -> DrafterConfig:
        config = self.config
        if config.start_from is None:
            return for_target(self.target.config, config.variant, config.intermediate_size)
        found = read_drafter(config.start_from)
        sizes = self.target.config
        check_target(
            found,
            str(config.start_from),
            target=config.target,
            hidden_size=sizes["hidden_size"],
            vocab_size=sizes["vocab_size"],
        )
        if found.variant != config.variant:
            raise ValueError(f"variant={config.variant!r}, but {config.start_from} is a {found.variant} drafter")
        return found

    # The run ---------------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """All steps."""
        try:
            return self._go()
        finally:
            if self.cache is not None:
                self.cache.write()
            if self._board is not None:
                self._board.close()

    def _go(self) -> Result:
        config = self.config
        lead = self.workers.rank == 0
        begin = time.monotonic()
        total = self._total_steps()
        if lead:
            self.out.mkdir(parents=True, exist_ok=True)
            self._describe()
            (self.out / "training.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
            self._board = _board(self.out / BOARD, self.state.step)
        told = self._continuations() if lead else None
        evaluated = -1
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, disable=not lead
        ) as progress:
            task = progress.add_task(config.variant, total=total, completed=self.state.step, status="")
            since, tokens = time.monotonic(), 0
            for batches in self._steps():
                if self.state.step >= total:
                    break
                seen = self.state.tokens
                numbers = self.step(batches)
                tokens += self.state.tokens - seen
                self._watch(numbers["loss"])
                step = self.state.step
                if step % config.log_every == 0 or step == total:
                    speed = tokens / (time.monotonic() - since)
                    since, tokens = time.monotonic(), 0
                    if self.cache is not None:
                        numbers["features_read"] = self._cached
                        self._cached = 0
                    self._log({"step": step, **numbers, "tokens_per_second": round(speed), "tokens": self.state.tokens})
                    progress.update(
                        task, completed=step, status=f"loss {self.state.smoothed:.3f}, {speed:,.0f} tokens/s"
                    )
                if told is not None and (step % config.evaluate_every == 0 or step == total):
                    self._evaluate(told)
                    evaluated = step
                if step % config.checkpoint_every == 0 or step == total:
                    if self.cache is not None:
                        self.cache.write()  # a resumed run reads what this one would have read
                    if lead:
                        self._save()
        if told is not None:
            if evaluated != self.state.step:
                self._evaluate(told)
            self._curves()
        if self.workers.size > 1:
            dist.barrier()
        return Result(
            self.state, self._last, time.monotonic() - begin, self.drafter.config.parameters(), self.data.complaints
        )

    def _total_steps(self) -> int:
        per_step = self.config.batch_size * self.workers.size * self.config.accumulation
        whole = self.config.epochs * (len(self.data.train) // per_step)
        total = min(whole, self.config.max_steps or whole)
        if total == 0:
            raise ValueError(f"{len(self.data.train)} conversations do not make one step of {per_step}")
        return total

    def _steps(self) -> Iterator[list[data.Batch]]:
        """The batches of each step that is left, this worker's share of them."""
        config, workers = self.config, self.workers
        lengths = [len(example.ids) for example in self.data.train]
        share = slice(workers.rank * config.batch_size, (workers.rank + 1) * config.batch_size)
        for epoch in range(self.state.epoch, config.epochs):
            batches = data.order(
                lengths,
                batch_size=config.batch_size,
                world=workers.size,
                pool=config.length_pool,
                seed=config.seed,
                epoch=epoch,
            )
            first = self.state.batch if epoch == self.state.epoch else 0
            if self.cache is not None:
                self.cache.write()
                if workers.size > 1:
                    dist.barrier()
                self.cache.refresh()
            for start in range(first, len(batches) - config.accumulation + 1, config.accumulation):
                chosen = batches[start : start + config.accumulation]
                self.state.epoch, self.state.batch = epoch, start + config.accumulation
                yield [data.collate([self.data.train[i] for i in batch[share]], batch[share]) for batch in chosen]

    def step(self, batches: list[data.Batch]) -> dict[str, float]:
        """One optimiser step; its figures, over all workers."""
        micros = [self._micro(batch, number) for number, batch in enumerate(batches)]
        passes = self.config.passes
        counts = torch.stack([torch.stack([micro.masks[j].sum() for micro in micros]).sum() for j in range(passes)])
        counts = self.workers.sum(counts.double())
        normalisers = counts.tolist()
        figures = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, regress, predict of pass 1, tokens
        self.optimiser.zero_grad(set_to_none=True)
        for micro in micros:
            loss, first = self._loss(micro, normalisers)
            loss.backward()
            figures[:3] += torch.stack([loss, first.regress, first.predict]).detach().double()
            figures[3] += micro.ids.numel()
        gradients = [p.grad for p in self.drafter.parameters() if p.grad is not None]
        if self.workers.size > 1:
            flat = self.workers.sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        torch.nn.utils.clip_grad_value_(self.drafter.parameters(), self.config.clip)
        rate = self.config.rate(self.state.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss_sum, regress, predict, tokens = self.workers.sum(figures).tolist()
        if not math.isfinite(loss_sum):
            raise DivergedError(self._told(f"the loss is {loss_sum}"))
        self.optimiser.step()
        self.state.step += 1
        self.state.tokens += int(tokens)
        rows = normalisers[0] + 1e-5
        return {"loss": loss_sum, "regress": regress / rows, "predict": predict / rows, "learning_rate": rate}

    def _micro(self, batch: data.Batch, number: int) -> Micro:
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device)
        features = self._features(ids, batch)
        # Noise follows from (seed, step, worker, share): a resumed run sees what it would have seen.
        key = ((self.config.seed * 1_000_003 + self.state.step) * 4096 + self.workers.rank) * 4096 + number
        generator = torch.Generator().manual_seed(key % 2**63)
        uniform = torch.rand(features.shape, generator=generator).to(self.device) - 0.5
        width = self.config.noise * NOISE_LENGTH / batch.length.to(self.device)
        noisy = features + uniform * width[:, None, None]
        micro = Micro(ids, [mask], features, noisy, self.target.following(ids))
        if self.config.passes > 1:
            self._mask_later_passes(micro)
        return micro

    def _features(self, ids: Tensor, batch: data.Batch) -> Tensor:
        if self.cache is None:
            with self._autocast():
                return self.target.features(ids)
        known = [self.cache.get(number) for number in batch.numbers]
        missing = [b for b, found in enumerate(known) if found is None]
        features = torch.zeros(*ids.shape, self.drafter.config.hidden_size, device=self.device)
        if missing:
            with self._autocast():
                features[missing] = self.target.features(ids[missing])
        for b, (number, length, found) in enumerate(zip(batch.numbers, batch.length.tolist(), known, strict=True)):
            if found is not None:
                features[b, :length] = found.to(self.device)
            else:
                # What a target in bfloat16 computes is no finer than that.
                kept = torch.bfloat16 if self.target.dtype == torch.bfloat16 else torch.float32
                self.cache.put(number, features[b, :length].to(kept))
        self._cached += len(batch.numbers) - len(missing)
        return features

    def _mask_later_passes(self, micro: Micro) -> None:
        # A forward pass of its own: all rows of all workers are to be counted before the first gradient.
        with torch.no_grad(), self._autocast():
            chain = self.drafter.chain(micro.embedded, micro.noisy, self.config.passes - 1)
            for p, _ in chain:
                mask, top = micro.masks[-1], self.config.mask_top
                hit = hits(p, micro.ids, mask, self.target.logits, top) if top else None
                micro.masks.append(next_mask(mask, hit, micro.masks[0]))

    def _loss(self, micro: Micro, normalisers: list[float]) -> tuple[Tensor, Terms]:
        following = torch.nn.functional.pad(micro.features[:, 1:], (0, 0, 0, 1))
        total = torch.zeros((), device=self.device)
        found = []
        with self._autocast():
            chain = self.drafter.chain(micro.embedded, micro.noisy, self.config.passes)
            for (p, r), mask, rows in zip(chain, micro.masks, normalisers, strict=True):
                sums = terms(p, r, following, mask, self.target.logits, top_k=self.weights.top_k > 0)
                total = total + sums.loss(self.weights, rows)
                found.append(sums)
        return total, found[0]

    def _autocast(self) -> AbstractContextManager[Any]:
        wanted = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def _watch(self, loss: float) -> None:
        state = self.state
        state.smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        state.lowest = min(state.lowest, state.smoothed)
        if state.smoothed > self.config.diverged * state.lowest:
            raise DivergedError(self._told(f"the smoothed loss rose from {state.lowest:.4g} to {state.smoothed:.4g}"))

    def _told(self, why: str) -> str:
        checkpoint = self.out / LAST
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        return f"step {self.state.step}: {why}; {kept}, the best drafter is that of step {self.state.best_step}"

    # Evaluation ------------------------------------------------------------------------------------------------

    def _continuations(self) -> acceptance.Continuations:
        prompts = []
        for example in self.data.held_out[: self.config.evaluate_prompts]:
            assert example.messages is not None
            first = next(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            prompts.append(
                self.target.tokenizer.apply_chat_template(
                    example.messages[:first], add_generation_prompt=True, return_dict=False
                )
            )
        found = acceptance.continuations(self.target, prompts, self.config.evaluate_tokens)
        if not found.sequences:
            raise ValueError(f"the target answers none of {len(prompts)} held-out requests with two tokens or more")
        return found

    def _evaluate(self, told: acceptance.Continuations) -> acceptance.Acceptance:
        self.drafter.eval()
        found = self._last = acceptance.measure(self.drafter, self.target, told, self.config.evaluate_drafts)
        self.drafter.train()
        self._log(
            {
                "step": self.state.step,
                "tokens_per_forward": found.tokens_per_forward,
                "accepted": list(found.accepted),
                "forwards": found.forwards,
            }
        )
        if found.tokens_per_forward > self.state.best:
            self.state.best, self.state.best_step = found.tokens_per_forward, self.state.step
            save_drafter(self.drafter, self.out)
        return found

    # What is written -------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        told, bad = self.data, self.data.complaints
        self.console.print(
            f"{len(told.train)} conversations, {len(told.held_out)} held out; {bad.count} lines left out; "
            f"{self.drafter.config.variant} drafter of {self.drafter.config.parameters():,} parameters"
        )
        for line in bad.first:
            self.console.print(f"  left out: {line}", markup=False)

    def _log(self, record: dict[str, Any]) -> None:
        if self.workers.rank == 0:
            with (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                places = (
                    {f"{name}/{j}": x for j, x in enumerate(value, 1)} if isinstance(value, list) else {name: value}
                )
                for place, x in places.items():
                    self._board.add_scalar(place, x, record["step"])
            self._board.flush()

    def _save(self) -> None:
        """The checkpoint, moved into place when it is whole."""
        new, place = self.out / f".{LAST}.new", self.out / LAST
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file(dict(self.drafter.state_dict()), new / "model.safetensors")
        moments = {
            f"{name}.{key}": value.contiguous()
            for name, parameter in self.drafter.named_parameters()
            for key, value in self.optimiser.state[parameter].items()
        }
        save_file(moments, new / "optimiser.safetensors")
        (new / "state.json").write_text(json.dumps(self.state.__dict__), encoding="utf-8")
        old = self.out / f".{LAST}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        new.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self, folder: Path) -> None:
        if not (folder / "state.json").exists():
            raise ValueError(f"resume: there is no checkpoint in {folder}")
        before = json.loads((self.out / "training.json").read_text(encoding="utf-8"))
        now = json.loads(self.config.model_dump_json())
        changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if changed:
            raise ValueError(
                "resume: the run was begun otherwise: "
                + "; ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
            )
        self.drafter.load_state_dict(_weights(folder / "model.safetensors", self.device))
        moments = load_file(folder / "optimiser.safetensors")
        for name, parameter in self.drafter.named_parameters():
            self.optimiser.state[parameter] = {
                key: moments[f"{name}.{key}"].to("cpu" if key == "step" else self.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        state = State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        if state.workers != self.workers.size:
            raise ValueError(f"resume: {state.workers} workers began the run, and now there are {self.workers.size}")
        if state.data != self.state.data:
            raise ValueError("resume: the data files do not have the conversations that the run was begun with")
        self.state = state
        if self.workers.rank == 0:
            # What was logged after the checkpoint comes again.
            log = (self.out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in log if line.endswith("}\n")]  # the last may have been cut off
            kept = [line for line in whole if json.loads(line)["step"] <= state.step]
            (self.out / LOG).write_text("".join(kept), encoding="utf-8")

    def _curves(self) -> None:
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        records = [json.loads(line) for line in (self.out / LOG).read_text(encoding="utf-8").splitlines()]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
        for what in ("loss", "regress", "predict"):
            points = [(r["step"], r[what]) for r in records if what in r]
            left.plot([x for x, _ in points], [y for _, y in points], label=what)
        measured = [(r["step"], r["tokens_per_forward"]) for r in records if "tokens_per_forward" in r]
        right.plot([x for x, _ in measured], [y for _, y in measured], marker="o")
        left.set(title="losses", xlabel="step", yscale="log")
        left.legend()
        right.set(title=f"tokens per forward, chains of {self.config.evaluate_drafts}", xlabel="step")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(self.out / CURVES, dpi=80)
        pyplot.close(figure)


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, if it is installed; what an earlier run logged after ``step`` is not shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes what vLLM serves: ``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to(dtype or x.dtype).contiguous().cpu() for name, x in drafter.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # written readable by its owner alone
    written = json.dumps(drafter.config.to_hf(), indent=1) + "\n"
    (folder / "config.json").write_text(written, encoding="utf-8")


def _weights(file: Path, device: torch.device) -> dict[str, Tensor]:
    return {
        name: tensor.float().to(device)
        for name, tensor in load_file(file).items()
        if name != EMBEDDING and name not in IGNORED
    }


def _device(wish: str) -> torch.device:
    if wish == "auto":
        wish = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return torch.device(wish)
