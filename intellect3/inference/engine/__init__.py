"""The embedded engine: a JAX server that speaks SGLang's HTTP protocol.

    python -m intellect3.inference.engine --model DIR --port P

For laptops, CI and notebooks, where the ring turns without SGLang; the client cannot tell them
apart. Read in this order: `request` (what a client may ask), `batcher` (who runs at each step, no
JAX; `steps` are its arrays), `device` (the two compiled functions), `loop` (the thread that joins
them), `reply`, `app` (the routes), `server` and `__main__` (the process).
"""
