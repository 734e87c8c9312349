"""The fault matrix: real processes under load, struck at random moments, again and again.

`python -m tests.faults` (or `scripts/faults`) runs it at length and prints what was expected and what was
seen; `tests/system/test_faults.py` runs each case once. `rig` has the processes and the load, `shim` makes
disks, memory and clocks fail inside of the real processes, `wire` stands between them, and the cases are in
`deaths`, `gateway`, `resources` and `messages`.
"""
