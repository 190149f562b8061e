"""Benchmarks: each module is run with ``python -m`` from the repository's root and prints what `docs/benchmarks.md` holds."""
