"""Speculative drafters and decoding-time alignment for a stock vLLM server."""

__version__ = "0.1.0"
