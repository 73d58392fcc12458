"""Planning: what a program needs on machines that are not here.

    target       devices to compile for, from their description
    hardware     what they compute, hold and are joined by (hardware.toml)
    job          a run's training program without its data
    programs     the functions that the composition roots jit, lowered
    hlo          a compiled program's text as records
    collectives  what it sends: kind, dtype, mesh axes, bytes, time
    host_copies  what it moves between a device and its host
    memory       what it holds, and its biggest buffers
    schedule     how long its schedule takes, and what stands exposed
    travel       weights that travel in float32
    advice       what is wrong, and which knob to turn
    plan         all of it in one report
    bounds       what a layout takes at the least, told without compiling
    search       the layouts that divide and can fit, compiled and ranked
    table        a report as text

`python -m tools.plan_run` is the command (docs/scaling.md).
"""
