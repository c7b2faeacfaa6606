"""The benchmarks behind ``vllm-align-spec bench``."""
