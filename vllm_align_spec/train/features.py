"""The target's features on disk: computed once, and read by later epochs, stages and variants.

Shards of safetensors, each worker writing its own and reading everybody's. What does not fit under the bound is
computed again whenever it is needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_align_spec.train.data import Example, digest

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**26
IDENTITY = "features.json"
OPEN_SHARDS = 256
SAMPLED = 4096
"""Numbers of a tensor that its identity is made of."""


def identity(model: nn.Module, precision: str, examples: Sequence[Example]) -> dict[str, str]:
    """What features depend on: those of another model, precision or set of conversations are others.

    Args:
        model: the target. Samples of all its tensors tell it from one that was trained on, merged with an adapter or
            quantised, whatever its folder is called.
        precision: of the computation.
        examples: the conversations, in order.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED)]
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        weights.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"target": weights.hexdigest(), "precision": precision, "conversations": digest(examples)}


class FeatureCache:
    """Features of the conversations that a run trains on, by their place in the data.

    Args:
        folder: made where there is none.
        max_bytes: of all shards; reached, nothing more is written. Runs that fill a folder at the same time may
            overrun it by a shard for each worker.
        made_of: `identity` of what is cached here.
        workers: how many write, each its part of what is left.
        reserve: bytes of the disk that are left to others, such as checkpoints.

    Raises:
        ValueError: the folder has features of something else.
    """

    def __init__(
        self, folder: Path, max_bytes: int, made_of: dict[str, str], workers: int = 1, reserve: int = 0
    ) -> None:
        self._folder, self._max_bytes, self._workers, self._reserve = folder, max_bytes, workers, reserve
        self._full = False
        self._left = 0
        self._waiting: dict[int, Tensor] = {}
        self._shards: set[Path] = set()
        self._place: dict[int, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        told = folder / IDENTITY
        if not told.exists():  # several workers may come at once
            new = folder / f"{uuid.uuid4().hex}.new"
            new.write_text(json.dumps(made_of) + "\n", encoding="utf-8")
            os.replace(new, told)
        before = json.loads(told.read_text(encoding="utf-8"))
        if changed := [key for key in made_of if before.get(key) != made_of[key]]:
            raise ValueError(f"{folder} has features of another run ({', '.join(changed)} differ); remove it")
        self.refresh()

    def refresh(self) -> None:
        """Writes what waits, and looks for what other workers have written."""
        self.write()
        used = 0
        for shard in sorted(self._folder.glob("*.safetensors")):
            used += shard.stat().st_size
            if shard not in self._shards:
                self._shards.add(shard)
                self._place.update(dict.fromkeys(map(int, _open(shard).keys()), shard))
        self._left = 0 if self._full else (self._max_bytes - used) // self._workers

    def get(self, number: int) -> Tensor | None:
        """Features [T, H] of a conversation, or None."""
        waiting = self._waiting.get(number)
        if waiting is not None or number not in self._place:
            return waiting
        found: Tensor = _open(self._place[number]).get_tensor(str(number))
        return found

    def put(self, number: int, features: Tensor) -> None:
        """Keeps features [T, H] if there is room."""
        size = features.numel() * features.element_size()
        if size > self._left or number in self._waiting or number in self._place:
            return
        self._left -= size
        self._waiting[number] = features.to("cpu", copy=True)
        if sum(x.numel() * x.element_size() for x in self._waiting.values()) >= SHARD_BYTES:
            self.refresh()

    def write(self) -> None:
        """Puts what waits into a shard, which is there whole or not at all. A full disk ends caching, not training."""
        if not self._waiting:
            return
        shard = self._folder / f"{uuid.uuid4().hex}.safetensors"
        new = shard.with_suffix(".new")
        try:
            free = shutil.disk_usage(self._folder).free
            if free < self._reserve + sum(x.numel() * x.element_size() for x in self._waiting.values()):
                raise OSError(f"{free:,} bytes are free on the disk, and checkpoints may need {self._reserve:,}")
            save_file({str(number): features for number, features in self._waiting.items()}, new)
            new.rename(shard)
        except (OSError, SafetensorError) as error:
            logger.warning("No more features are cached: %s", error)
            new.unlink(missing_ok=True)
            self._full = True
            self._left = 0
        else:
            self._shards.add(shard)
            self._place.update(dict.fromkeys(self._waiting, shard))
        self._waiting.clear()


@functools.lru_cache(OPEN_SHARDS)
def _open(shard: Path) -> Any:
    return safe_open(shard, "pt")
