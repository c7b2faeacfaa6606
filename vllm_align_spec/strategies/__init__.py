"""Methods that steer whole responses, one file each, written against `base`, never against vLLM."""
