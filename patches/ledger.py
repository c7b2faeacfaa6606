"""Every patch there is."""

from vllm_align_spec.patches import (
    Patch,
    chat_messages,
    cpu_expand,
    cpu_top_k,
    front_end,
    v1_draft_rows,
    v1_drafter_fits,
    v1_facade,
    v1_rows,
    v1_truncation,
    v2_truncation,
    worker_reports,
)

LEDGER: tuple[Patch, ...] = (
    front_end.PATCH,
    chat_messages.PATCH,
    worker_reports.PATCH,
    v1_facade.PATCH,
    v1_rows.PATCH,
    v1_drafter_fits.PATCH,
    v1_draft_rows.PATCH,
    v1_truncation.PATCH,
    v2_truncation.PATCH,
    cpu_expand.PATCH,
    cpu_top_k.PATCH,
)
