"""The second model in the worker: it follows requests beside the target and scores what may come next."""
