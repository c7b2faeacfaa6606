"""What there is, in the order in which it acts. The one place to add a line.

Functions, because the front end needs no torch and the workers need no HTTP client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_align_spec.options import ArgsOptions, DeraOptions, GenarmOptions, PadOptions

if TYPE_CHECKING:
    from vllm_align_spec.processors.rows import Processor
    from vllm_align_spec.strategies.base import Strategy

GUIDED = (DeraOptions, GenarmOptions, PadOptions, ArgsOptions)
"""Methods that live on the token plane alone: their strategy hands one request on."""


def processors() -> tuple[type[Processor], ...]:
    """The methods of the token plane, in the order in which they see a step's rows."""
    from vllm_align_spec.processors.args import ArgsProcessor
    from vllm_align_spec.processors.asap import AsapProcessor
    from vllm_align_spec.processors.cards import CardsProcessor
    from vllm_align_spec.processors.dera import DeraProcessor
    from vllm_align_spec.processors.genarm import GenarmProcessor
    from vllm_align_spec.processors.pad import PadProcessor
    from vllm_align_spec.processors.wsd import WsdProcessor

    guided = (DeraProcessor, GenarmProcessor, PadProcessor, ArgsProcessor)
    return (WsdProcessor, *guided, AsapProcessor, CardsProcessor)


def strategies() -> tuple[Strategy, ...]:
    """The methods of the sequence plane."""
    from vllm_align_spec.strategies.asap import AsapStrategy
    from vllm_align_spec.strategies.bon import BonStrategy
    from vllm_align_spec.strategies.cards import CardsStrategy
    from vllm_align_spec.strategies.deal import DealStrategy
    from vllm_align_spec.strategies.guided import GuidedStrategy
    from vllm_align_spec.strategies.wsd import WsdStrategy

    guided = (GuidedStrategy(options) for options in GUIDED)
    return (WsdStrategy(), AsapStrategy(), *guided, CardsStrategy(), BonStrategy(), DealStrategy())
