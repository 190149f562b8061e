"""Times steps of a model whose features are split over two ranks, with two halves of the batch that take turns and without, in one run.

As `tests.benchmarks.prefetch` does for gathers begun ahead: a Llama-like model under ``tp=2``, measured beside what its plans predict.
"""

from __future__ import annotations

from tests.benchmarks.prefetch import make_parser, make_race


def main() -> None:
    """Run the benchmark and print a table."""
    arguments = make_parser(__doc__).parse_args()
    make_race(arguments, {name: {"tp": 2, "half_batches": name == "halves"} for name in ("whole", "halves")}).run()


if __name__ == "__main__":
    main()
