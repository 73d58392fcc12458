"""Chat messages to token ids and back. Imports level 0 only; no jax."""
