"""The tables of the paper: builds the runs from shipped configs, resumes them, prints ours beside what was published.

    python scripts/reproduce.py table5                  # small: on two cores, on CIFAR-10 as folders of images
    python scripts/reproduce.py table5 --scale full     # the paper's size, for a GPU
    python scripts/reproduce.py table5 --dry-run        # what would run, and what is done already
    python scripts/reproduce.py table5 --report         # the table of what is done already
    python scripts/reproduce.py table5 --row 'VGG*'    # only these rows, e.g. on another machine
    python scripts/reproduce.py table5 --report --earlier /from/there/table5-small    # with what came of them there

Runs lie in one folder (--cache), each under the hash of what decides its result, so that tables share trainings.
"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from ftnas.heap import keep_memory
from ftnas.reproduction import ranges
from ftnas.reproduction.digests import check_agreement
from ftnas.reproduction.jobs import missing, trained
from ftnas.reproduction.result import collect, write
from ftnas.reproduction.runner import run
from ftnas.reproduction.runs import earlier_results
from ftnas.reproduction.study import (
    SCALES,
    Planned,
    check_overrides,
    plan,
    read_published,
    read_scale,
    read_study,
    study_names,
)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help=f"one of {', '.join(study_names())}; or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="for the config of every run")
    parser.add_argument("--scale", choices=SCALES, default="small", help="size of the runs (default: small)")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds, in place of the scale's")
    parser.add_argument(
        "--row", action="append", metavar="NAME", help="run only these rows, e.g. 'W-FTT-Net-20*' (may be repeated)"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduction"), help="folder of all runs")
    parser.add_argument("--out", type=Path, help="folder of the result (default: CACHE/STUDY-SCALE)")
    parser.add_argument(
        "--earlier",
        type=Path,
        action="append",
        default=[],
        metavar="OUT",
        help="take in a result whose runs are not in the cache, by their hashes (may be repeated)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print runs, configs and hashes; run nothing")
    mode.add_argument("--report", action="store_true", help="make the table of what is there; run nothing")
    return parser.parse_intermixed_args()  # overrides may follow options


def chosen(planned: Sequence[Planned], patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the rows that match one of some patterns, as a shell has them; None takes all."""
    names = [entry.row.name for entry in planned]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--row: no row is called {pattern!r}; there is: {'; '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ("*",))]


def listing(planned: Sequence[Planned], rows: Container[str], earlier: Container[str]) -> str:
    """Return what would run, one training a line."""
    lines = []
    for entry in (entry for entry in planned if entry.row.name in rows):
        for job in entry.jobs:
            left = sum(missing(job, measurement) for measurement in entry.measurements)
            sweeps = "".join(f", measure {m.sweep.label} {job.measure_key(m)}" for m in entry.measurements)
            state = f"{'trained' if trained(job) else 'to be trained'}, {left} measurements left"
            state = "known from an earlier result" if job.key in earlier else state
            search = f"search {job.search_key}, " if job.searches else ""
            head = f"{entry.row.name}, seed {job.seed}: {entry.row.config} ({entry.row.model})"
            lines.append(f"{head}, {search}train {job.key}{sweeps}: {state}")
    return "\n".join(lines)


def _check_writable(out: Path) -> None:
    """Refuse a folder that cannot be made, before there is something to write into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out (or --cache) {out}: cannot be made ({error.strerror}); give another folder") from None


def reproduce(options: argparse.Namespace) -> None:
    scale = read_scale(options.scale)
    if options.seeds:
        if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
            raise ValueError(f"--seeds: numbers from 0 on, each once, got {' '.join(map(str, options.seeds))}")
        scale = scale.model_copy(update={"seeds": tuple(options.seeds)})
    study = read_study(options.study)
    if options.report and options.row:
        raise ValueError("--row tells what to run, and --report runs nothing; leave one of them out")
    if study.weights and options.earlier:
        raise ValueError(f"{study.name} reads weights, which no earlier result has; leave out --earlier")
    check_overrides(options.overrides)
    out = options.out or options.cache / f"{study.name}-{options.scale}"
    if out.resolve() in [folder.resolve() for folder in options.earlier]:
        raise ValueError(f"--earlier {out}: the new result would overwrite it; give another --out")
    planned = plan(study, scale=options.scale, settings=scale, cache=options.cache, overrides=options.overrides)
    rows, earlier = chosen(planned, options.row), earlier_results(options.earlier, planned)
    if options.dry_run:
        print(listing(planned, rows, earlier))
        return
    _check_writable(out)
    failure = None
    if not options.report:
        try:
            run(planned, earlier, rows=rows)
        except RuntimeError as error:  # the rest is done, and is shown
            failure = error
    check_agreement(planned, earlier)
    if study.weights:
        print(ranges.write(study, planned, out))
    else:
        common = {"scale": options.scale, "settings": scale, "published": read_published(), "earlier": earlier}
        print(write(collect(study, planned, out=out, **common), out))
    if failure is not None:
        raise failure


def main() -> None:
    options = parsed()
    keep_memory()
    # so that what is open is closed, and the time that was spent is written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        reproduce(options)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
