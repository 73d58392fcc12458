"""The processes of one program over one mesh: how they start, agree and end together.

    cluster     from the environment (Slurm, Kubernetes, plain variables): who is who    (no jax)
    meeting     finds the others, says who is missing, hears of their end                (no jax)
    processes   starts jax.distributed; barriers, broadcasts and gathers between the processes
    arrays      what is computed together, on every host
    watchdog    ends a process that makes no progress, with its stacks in the log        (no jax)

Place in the ring: level 0. What is started here is the trainer of `rl` and `sft`; the other roles
are processes of their own that speak HTTP.
"""
