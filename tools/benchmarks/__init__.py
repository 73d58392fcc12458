"""Benchmarks: each prints a table and writes JSON; their figures are in docs/performance.md."""
