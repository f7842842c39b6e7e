"""The tables of the paper: builds the runs from shipped configs, resumes them, prints ours beside what was published.

    python scripts/reproduce.py table5                  # small: on two cores, on CIFAR-10 as folders of images
    python scripts/reproduce.py table5 --scale full     # the paper's size, for a GPU
    python scripts/reproduce.py table5 --dry-run        # what would run, and what is done already

Runs lie in one folder (--cache), each under the hash of what decides its result, so that tables share trainings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ftnas.heap import keep_memory
from ftnas.reproduction.runner import run
from ftnas.reproduction.study import SCALES, plan, read_scale, read_study, study_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help=f"one of {', '.join(study_names())}, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="for the config of every run")
    parser.add_argument("--scale", choices=SCALES, default="small", help="size of the runs (default: small)")
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduction"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds, in place of the scale's")
    options = parser.parse_args()
    keep_memory()
    try:
        scale = read_scale(options.scale)
        if options.seeds:
            scale = scale.model_copy(update={"seeds": tuple(options.seeds)})
        study = read_study(options.study)
        planned = plan(study, scale=options.scale, settings=scale, cache=options.cache, overrides=options.overrides)
        run(planned)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
