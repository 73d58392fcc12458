"""Programs round the library: the lock, benchmarks, inspection."""
