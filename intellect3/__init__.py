"""Post-training of Mixture-of-Experts language models by asynchronous reinforcement learning.

Importing this package imports nothing else: each sub-package is imported by the process that needs
it (see `docs/design/0001-the-ring.md` for who imports whom).
"""
