"""Rollouts: which task is attempted when, by which worker, and what becomes of every attempt.

    messages     what orchestrator and workers say to each other (metadata only)
    difficulty   which task comes next: environment mix, epochs, easy / normal / hard pools
    filters      which rollouts of a finished group carry no gradient, and why
    accounting   contract 3: every dispatched rollout ends exactly once
    scheduler    the pure state machine over all of that
    conversation what an environment talks to; records tokens
    worker       runs environments, holds finished rollouts, writes log shards
    link         how messages travel: in process or over a WebSocket
    ports        what the orchestrator sees of the world
    orchestrator the asyncio shell round the scheduler
    reports      metrics rows, manifests, evaluation scores

No module here imports jax.
"""
