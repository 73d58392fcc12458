"""The off-policy lab: which correction survives which staleness, measured.

Place in the ring: beside it. Nothing that trains imports the lab; its notebooks (`notebooks/`) call
it with parameters and show what it returns. `statistics` and `plots` know of no experiment; the
exact half (`policy`, `corrections`, `estimators`, `training`) works on a policy so small that every
expectation is a finite sum.
"""
