"""Bad inputs, one row each: what was passed, and the error that says so.

A module of rows has a list `ROWS`, which `test_bad_inputs` finds. Rows share what `fitted` has.
"""
