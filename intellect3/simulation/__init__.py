"""The orchestrator under a virtual clock: production code, simulated servers, trainer and disk."""
