"""Draft models: what a drafter is made of, its equations, and the model that vLLM serves it with."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "EagleFspadForCausalLM"
"""The name in a drafter's ``config.json``. It begins with Eagle, so vLLM's ``eagle`` method leaves it as it is."""

SERVED = "vllm_align_spec.drafters.served:EagleFspadForCausalLM"
SPECULATORS_TYPE = "eagle"
"""The type under which a ``speculators`` config names a drafter of ours: it is also vLLM's name of the method."""


def register_model(module: Any) -> None:
    """Makes the drafter known to ``vllm.model_executor.models.registry``, which is imported without the drafter."""
    if ARCHITECTURE not in module.ModelRegistry.get_supported_archs():
        module.ModelRegistry.register_model(ARCHITECTURE, SERVED)


def register_format(module: Any) -> None:
    """Adds ours to the formats in ``vllm.transformers_utils.configs.speculators.algos``."""
    module.SUPPORTED_SPECULATORS_TYPES.setdefault(SPECULATORS_TYPE, from_speculators)


def from_speculators(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Completes the config of a drafter's layer from the ``speculators`` config around it.

    Raises:
        ValueError: it is the config of another drafter.
    """
    named = config_dict.get("architectures") or []
    if named != [ARCHITECTURE]:
        raise ValueError(
            f"a speculators config of type {SPECULATORS_TYPE!r} names architectures={named}; served are "
            f"[{ARCHITECTURE!r}]"
        )
    pre_trained_config["architectures"] = [ARCHITECTURE]
    pre_trained_config.setdefault("model_type", "llama")
