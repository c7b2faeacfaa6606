"""Speculative drafters and decoding-time alignment for a stock vLLM server."""

import os

__version__ = "0.1.0"

DISABLE_ENV = "VLLM_ALIGN_SPEC_DISABLE"
"""Environment variable; set to 1 it leaves a stock vLLM, whatever the engine options say."""


def disabled() -> bool:
    """Whether the environment's kill switch is thrown."""
    return os.environ.get(DISABLE_ENV, "") not in ("", "0")
