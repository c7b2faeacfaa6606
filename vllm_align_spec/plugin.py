"""The entry point that vLLM calls in every one of its processes, before an engine is built."""

from __future__ import annotations

import os

from vllm_align_spec import disabled, drafters
from vllm_align_spec.patches import after_import, install
from vllm_align_spec.patches.ledger import LEDGER

HOOKS = {
    "front_end": "vllm_align_spec.engine.frontend:generate",
    "shutdown": "vllm_align_spec.engine.frontend:drain",
    "chat_messages": "vllm_align_spec.engine.frontend:attach_messages",
    "grammar_control": "vllm_align_spec.engine.control:without",
    "worker_calls": "vllm_align_spec.engine.facade:call",
    "worker_shutdown": "vllm_align_spec.engine.facade:closing",
    "drafter_fits": "vllm_align_spec.drafters.config:refuse_misfit",
    "v1_facade": "vllm_align_spec.engine.facade:AlignSpecLogitsProcessor",
    "v1_grammar_mask": "vllm_align_spec.engine.v1:before_mask",
    "v1_rows": "vllm_align_spec.engine.v1:before_sample",
    "v1_drafter_fits": "vllm_align_spec.engine.v1:note_drafts",
    "v1_draft_rows": "vllm_align_spec.engine.v1:edit_draft_rows",
    "v1_truncation": "vllm_align_spec.engine.v1:truncate",
    "v2_inputs": "vllm_align_spec.engine.v2:before_forward",
    "v2_grammar_mask": "vllm_align_spec.engine.v2:before_mask",
    "v2_truncation": "vllm_align_spec.engine.v2:truncate",
}
"""What fills each patch; imported only when its target is."""

ALLOW_UNVERIFIED_ENV = "VLLM_ALIGN_SPEC_ALLOW_UNVERIFIED"
"""Set to 1 to only warn about a vLLM whose patched functions nobody verified."""


def register() -> None:
    """Arms the patches and names the draft models. Idempotent and light: nothing of vLLM or torch is imported here.

    Raises:
        PatchMismatchError: a patched function of this vLLM is none that was verified.
    """
    if disabled():
        return
    install(LEDGER, HOOKS, allow_unverified=os.environ.get(ALLOW_UNVERIFIED_ENV, "") not in ("", "0"))
    after_import("vllm.model_executor.models.registry", drafters.register_model)
    after_import("vllm.transformers_utils.configs.speculators.algos", drafters.register_format)
