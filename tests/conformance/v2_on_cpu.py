"""Runs vLLM's model runner V2 without a GPU, under Triton's interpreter. Import before vLLM. A test aid, and slow."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import numpy as np
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter


class InterpretedCpuDriver:
    """What vLLM and Triton ask a driver for before a kernel is interpreted."""

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench


# vLLM's CPU build switches Triton on only where a backend of this name exists.
triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpretedCpuDriver)
driver.set_active(InterpretedCpuDriver())

_masked_store = interpreter.InterpreterBuilder.create_masked_store


def _bool_masked_store(self, ptrs, value, mask, *args, **kwargs):
    # The interpreter stores under bool masks only; the grammar kernel mixes int and bool.
    if mask.data.dtype != np.bool_:
        mask.data = mask.data.astype(np.bool_)
    return _masked_store(self, ptrs, value, mask, *args, **kwargs)


interpreter.InterpreterBuilder.create_masked_store = _bool_masked_store
