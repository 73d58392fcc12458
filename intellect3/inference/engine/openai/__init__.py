"""OpenAI's routes, as SGLang speaks them, over the same engine."""
