"""Checkpoints of either kind as streams of tensors: what `tools.convert_checkpoint` is made of.

opened      a directory of either kind: its config and its tensors, made when they are asked for
orbax       Orbax's arrays, read and written one tensor at a time
convert     one kind to the other
compare     whether two directories hold the same
progress    what the terminal, or a log, sees of it
"""
