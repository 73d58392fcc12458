"""Meshes and the tables that map logical axes to them. Imports jax and nothing of ours."""
