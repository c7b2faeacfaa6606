"""What can judge a response: a reward model in this process, a pooling server, or a program.

Judges are named and made by the operator's options; a request can only pick one by its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_align_spec.options import HttpRewardOptions, ModelRewardOptions, RewardOptions
from vllm_align_spec.rewards.base import Answer, Guard, JudgeError, Scorer

__all__ = ["Answer", "Guard", "JudgeError", "judges"]


def judges(options: Mapping[str, RewardOptions]) -> dict[str, Guard]:
    """The judges of one API server process, by name. Models begin to load.

    Raises:
        OptionError: a program is unknown, or its parameters are not what it takes.
    """
    return {name: Guard(name, one, _scorer(name, one)) for name, one in options.items()}


def _scorer(name: str, options: RewardOptions) -> Scorer:
    if isinstance(options, ModelRewardOptions):
        from vllm_align_spec.rewards.model import ModelScorer

        return ModelScorer(name, options)
    if isinstance(options, HttpRewardOptions):
        from vllm_align_spec.rewards.http import HttpScorer

        return HttpScorer(options)
    from vllm_align_spec.rewards.programs import ProgramScorer

    return ProgramScorer(name, options)
