"""Writes the rendered people that ship with the package.

    python -m benchmarks.rendered_set

The first of the series of the model card: what ships and what is rendered later are one series.
"""

from __future__ import annotations

import argparse

from diffusionact.assets import benchmark_path
from diffusionact.commands.eval.people import rendered_person
from diffusionact.evaluation.rendered import SEED, SIZE, save_people

PEOPLE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rendered people that ship.")
    parser.add_argument("--people", type=int, default=PEOPLE)
    arguments = parser.parse_args()
    made = [rendered_person(SEED, i, SIZE) for i in range(arguments.people)]
    save_people(benchmark_path(), made)
    print(f"{benchmark_path()}: {benchmark_path().stat().st_size} bytes, {len(made)} people")


if __name__ == "__main__":
    main()
