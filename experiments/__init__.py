"""Entry points: flags, gin, one call."""
