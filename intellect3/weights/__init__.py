"""Publishing weights to the inference servers: atomic directories, manifests, fingerprints."""
