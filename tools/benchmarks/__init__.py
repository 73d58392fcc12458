"""Benchmarks that print a table and write JSON; the figures they gave are in docs/performance.md."""
