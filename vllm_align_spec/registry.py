"""What there is, in the order in which it acts. The one place to add a line.

Functions, because the front end needs no torch and the workers need no HTTP client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_align_spec.processors.rows import Processor
    from vllm_align_spec.strategies.base import Strategy


def processors() -> tuple[type[Processor], ...]:
    """The methods of the token plane, in the order in which they see a step's rows."""
    from vllm_align_spec.processors.asap import AsapProcessor
    from vllm_align_spec.processors.cards import CardsProcessor
    from vllm_align_spec.processors.wsd import WsdProcessor

    return (WsdProcessor, AsapProcessor, CardsProcessor)


def strategies() -> tuple[Strategy, ...]:
    """The methods of the sequence plane."""
    from vllm_align_spec.strategies.asap import AsapStrategy
    from vllm_align_spec.strategies.bon import BonStrategy
    from vllm_align_spec.strategies.cards import CardsStrategy
    from vllm_align_spec.strategies.deal import DealStrategy
    from vllm_align_spec.strategies.wsd import WsdStrategy

    return (WsdStrategy(), AsapStrategy(), CardsStrategy(), BonStrategy(), DealStrategy())
