"""Inference: SGLang's protocol, the pool of servers, weight sync, and `engine/`, our own server."""
