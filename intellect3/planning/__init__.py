"""Planning: what a program needs on machines that are not here.

`target` makes devices to compile for.
"""
