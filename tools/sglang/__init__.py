"""A real SGLang server on a CPU: install it, make tiny models for it, launch it.

SGLang lives in a directory of its own, since its pins of torch and its kin must not reach the
trainer; nothing of ours imports it. `docs/sglang.md` has the whole story.
"""
