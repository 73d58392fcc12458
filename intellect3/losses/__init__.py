"""Losses and advantages: pure functions of arrays, importable alone.

This package imports nothing else of ours, and its modules are imported one by one
(`from intellect3.losses import policy_gradient`): `advantages` must stay usable without jax.
"""
