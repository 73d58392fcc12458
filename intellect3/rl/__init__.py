"""Composition root of reinforcement learning: the ring, closed. Each file is a process.

    roles         what the roles share; `run` checks a run whole and starts one role or all
    checks        of a run's parameters, before anything starts
    trainer       batches -> steps -> published weights, checkpoints     (jax; one or several)
    orchestrator  what is attempted, batched and synced when             (no jax)
    worker        environments against the servers                      (no jax)
    inference     the command line of a server

Stages never import each other; here functions and directories are passed from one to the next.
"""

from intellect3.rl.roles import ROLES, NotStarted, Shared, run

__all__ = ["ROLES", "NotStarted", "Shared", "run"]
