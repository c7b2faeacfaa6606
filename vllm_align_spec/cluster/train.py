"""Training of drafters on Ray Train: the loop of `train.loop`, in as many workers as asked for.

A worker that is lost ends its group; Ray starts another, which goes on from the last checkpoint in ``config.out``. That
folder, the data and the target must be the same for all workers: on one machine, or on a file system that they share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_align_spec.train.config import TrainConfig

RETRIES = 3
RESULT = "ray.json"
"""In ``config.out``: what the last run did, or why it failed. Ray keeps only what comes with a checkpoint."""


class TrainingError(RuntimeError):
    """Training ended without a drafter, or before its time."""


def train(config: TrainConfig, *, workers: int, gpus: float, address: str | None) -> dict[str, Any]:
    """Trains in a group of workers.

    Args:
        config: as for `train.loop.train`; ``batch_size`` is each worker's.
        workers: how many.
        gpus: of each; 0 trains on CPUs.
        address: a Ray cluster; None starts one on this machine.

    Returns:
        ``steps``, ``best`` (tokens per forward) and ``best_step``.

    Raises:
        TrainingError: as `train.loop.train` failed, or workers were lost more often than is made good.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from vllm_align_spec.train.loop import LAST

    config = config.model_copy(
        update={name: _absolute(getattr(config, name)) for name in ("target", "out", "start_from", "feature_cache")}
    )
    config = config.model_copy(update={"data": tuple(_absolute(path) for path in config.data)})
    if (config.out / LAST).exists() and not config.resume:
        raise TrainingError(f"{config.out / LAST} has a checkpoint: go on from it with --resume, or train elsewhere")
    own = {} if address else {"num_cpus": max(os.cpu_count() or 1, workers + 1)}
    (config.out / RESULT).unlink(missing_ok=True)
    ray.init(address=address, **own)
    try:
        needs = {"CPU": 1.0} | ({"GPU": gpus} if gpus else {})
        trainer = TorchTrainer(
            _worker,
            train_loop_config=config.model_dump(mode="json"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=needs),
            run_config=RunConfig(
                name="ray", storage_path=str(config.out), failure_config=FailureConfig(max_failures=RETRIES)
            ),
        )
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"{type(error).__name__}: {error}") from error
    finally:
        ray.shutdown()
    found: dict[str, Any] = json.loads((config.out / RESULT).read_text(encoding="utf-8"))
    if "error" in found:
        raise TrainingError(found["error"])
    return found


def _absolute(path: Any) -> Any:
    """Workers have folders of their own. A target may be a name and no folder."""
    if path is None or not Path(path).exists():
        return path if path is None or isinstance(path, str) else Path(path).absolute()
    return type(path)(Path(path).absolute())


def _worker(given: dict[str, Any]) -> None:
    import ray

    from vllm_align_spec.train.loop import LAST, DivergedError
    from vllm_align_spec.train.loop import train as train_here

    config = TrainConfig.model_validate(given)
    # The group that was lost left a checkpoint; that there was none when it began was made sure of.
    resume = config.resume or (config.out / LAST).exists()
    try:
        result = train_here(config.model_copy(update={"resume": resume}))
    except (DivergedError, ValueError, OSError) as error:  # would happen again
        found: dict[str, Any] = {"error": str(error)}
    else:
        state = result.state
        found = {"steps": state.step, "best": state.best, "best_step": state.best_step}
    if ray.train.get_context().get_world_rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / RESULT).write_text(json.dumps(found), encoding="utf-8")
