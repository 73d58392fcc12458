"""Models: Mixture-of-Experts transformers in Flax Linen, one set of modules for every use."""
