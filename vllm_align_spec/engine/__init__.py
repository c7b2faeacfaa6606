"""The only code that knows vLLM: its runners turned into rows and back, and its front end handed to strategies."""
