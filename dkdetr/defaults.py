"""What commands and requests take where a user names nothing; imports nothing, for quick help."""

DEFAULT_TEACHER = "ViT-B-32-quickgelu:openai"
DEFAULT_PROMPTS = "vild63"
DEFAULT_RUNS = "runs"
"""The folder of runs, in the working directory."""
DEFAULT_THRESHOLD = 0.3
"""Least score of a shown detection."""
DEFAULT_PORT = 8537
"""Of the local page."""
