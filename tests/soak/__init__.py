"""The soak: many clients of every kind, good and bad, for minutes, and nothing lost, wrong or leaked.

`scripts/soak_clients` (or `python -m tests.soak`) runs it at length and prints figures; a short form of it is
`tests/system/test_soak.py`. `asked` has what is asked and what must be answered, `clients` the ways in which
clients go about it, `front` the same through the gateway, `ledger` the one ending of each request, `watch`
what the processes say of themselves meanwhile, and `pair` processes to do it to. Not here: processes that
die, which is `tests.faults`.
"""
