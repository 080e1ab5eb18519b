"""The tests; a package, so that they can share what lives in `tests.contract` and the like."""
