"""The fault lab: the production stack of a small run, under seeded faults and a virtual clock.

`schedule` draws a world and its faults from a seed, `lab` runs them, `contracts` judges.
"""
