"""The trust boundary: the only package that may see a private example.

For an audit of the guarantee read, in this order:
1. accounting.py, shard_accounting.py: the epsilon of a list of planned releases.
2. ledger.py: the plan is solved once for the whole budget; every query is booked before it runs.
3. noise.py: secret randomness, and the only place where a sum meets its noise.
4. mechanisms.py, outer_products.py: clipping, which bounds the sensitivity.
5. private_data.py, records.py: the queries that methods may make, and the access to records behind them.
6. dpsgd.py, sanitize.py: the two training mechanisms.  7. row_by_row.py, validate.py: tests on public images.
8. disclosure.py, card.py: what is revealed without noise, and the report.  sampling.py and gradients/ are speed only:
   they compute clipped gradient sums, and exactness is what to check there (gradients/per_example.py first).
"""
