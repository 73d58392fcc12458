"""Planning: what a program needs on machines that are not here.

    target       devices to compile for, from their description
    hardware     what they compute, hold and are joined by (hardware.toml)
    job          a run's training program without its data
    programs     the functions that the composition roots jit, lowered
    hlo          a compiled program's text as records
    collectives  what it sends: kind, dtype, mesh axes, bytes, time
    memory       what it holds, and its biggest buffers
    schedule     how long its schedule takes, and what stands exposed
    plan         all of it in one report, with faults and advice
    search       the layouts that divide, ranked
    table        a report as text

`python -m tools.plan_run` is the command (docs/scaling.md).
"""
