"""The command line: commands, exit codes, one line for a user's mistake.

Everything beyond click is imported inside the commands, so that ``ftnas --help`` answers at once.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ftnas

if TYPE_CHECKING:
    from ftnas.config import RunConfig
    from ftnas.nodes.study import NodesConfig
    from ftnas.pipeline import Pipeline
    from ftnas.rundir import RunDir

EXAMPLES = {
    "run": ("quickstart", "quickstart seed=3 search.controller.lr=0.01 --out runs/third"),
    "search": ("quickstart", "quickstart seed=3 search.controller.lr=0.01 --out runs/third"),
    "train": ("train-resnet18-adsaf data.download=true", "quickstart 'train.models={net: {baseline: resnet20}}'"),
    "campaign": ("--resume runs/quickstart", "my-models.yaml campaign.devices=30"),
    "bounds": ("--resume runs/tolerance", "my-models.yaml bounds.images=200"),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ftnas.__version__, prog_name="ftnas")
def cli() -> None:
    """Find, train and compare convolutional networks that keep working on faulty hardware.

    \b
    The three jobs:
      ftnas search CONFIG    search an architecture
      ftnas train CONFIG     train it (or a baseline) for faulty hardware
      ftnas campaign CONFIG  measure models under the same faults
    `ftnas bounds CONFIG` certifies what models tolerate.
    `ftnas run CONFIG` does all that the config asks for; `ftnas configs` lists what ships.
    Exit codes: 0 done, 2 a mistake in what was given (one line says which), 130 or 143 interrupted, 1 anything else.
    """  # noqa: D301 - click reads the backspace as "do not wrap"


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what all commands on a config share."""
    for add in reversed(
        (
            click.argument("config", required=False),
            click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]..."),
            click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]"),
            click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with this run."),
            click.option("--overwrite", is_flag=True, help="Replace a run folder that exists."),
            click.option("--device", help="cpu, cuda or auto; short for device=..."),
            click.option("--seed", type=int, help="Short for seed=..."),
        )
    ):
        command = add(command)
    return command


def _config_command(name: str, *, needs: str | None = None) -> Callable[[Callable[[Pipeline], None]], click.Command]:
    """Make a command that opens a run and works on it; ``needs`` is the config section without which it has none."""

    def decorate(body: Callable[[Pipeline], None]) -> click.Command:
        def command(**options: Any) -> None:
            from ftnas.heap import keep_memory
            from ftnas.pipeline import Pipeline
            from ftnas.rundir import quoted

            keep_memory()
            config, run = _open_run(needs=needs, **options)
            with run, _told_how_to_go_on(f"go on with: ftnas {name} --resume {quoted(run.path)}"):
                body(Pipeline(config, run))

        lines = (*EXAMPLES[name], "my-config.yaml data.root=~/images --device cuda", "--resume runs/third")
        examples = "".join(f"\n  ftnas {name} {line}" for line in lines)
        command.__doc__ = f"{body.__doc__}\n\n\b\nExamples:{examples}\n"
        command = _run_options(command)
        if name in ("run", "search", "train", "campaign"):
            workers = "Processes of Ray that do the work, 0 for none; short for pool.workers=N, with --resume too."
            command = click.option("--workers", type=click.IntRange(min=0), metavar="N", help=workers)(command)
        return cli.command(name)(command)

    return decorate


@contextlib.contextmanager
def _told_how_to_go_on(how: str) -> Iterator[None]:
    """Say how to go on with what an interrupt has ended, or a file that cannot be written."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; {how}", err=True)
        raise SystemExit(130) from None
    except OSError as error:
        if error.filename is None:
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise RuntimeError(f"{error.filename}: {reason}; mend that, then {how}") from error


def _open_run(
    *,
    needs: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    device: str | None,
    seed: int | None,
    workers: int | None = None,
) -> tuple[RunConfig, RunDir]:
    from ftnas.config import config_from, read_config, with_workers
    from ftnas.rundir import RunDir

    if resume is not None:
        if config is not None or overrides or out or overwrite or device is not None or seed is not None:
            raise ValueError("--resume goes on with the run as it was configured; give it alone, or start a new run")
        run = RunDir.open(resume)
        started = (event for event in run.journal("events.jsonl").records() if event.get("kind") == "started")
        threads = next((event.get("threads") for event in started), None)
        return with_workers(config_from(run.config), workers, threads=threads), run
    if config is None:
        raise ValueError("give a config (ftnas configs lists those that ship), or --resume RUN")
    given = {"device": device, "seed": seed, "pool.workers": workers}
    short = [f"{key}={value}" for key, value in given.items() if value is not None]
    resolved = read_config(config, [*overrides, *short])
    if needs is not None and not getattr(resolved, needs):
        section = "campaign, single_faults or protections" if needs == "evaluates" else needs
        raise ValueError(f"the config {resolved.name!r} has no {section} section; ftnas configs shows what each has")
    path = out if out is not None else Path("runs") / resolved.name
    return resolved, RunDir.create(path, resolved.model_dump(mode="json"), overwrite=overwrite)


@_config_command("run")
def run_command(pipeline: Pipeline) -> None:
    """Do every stage of CONFIG: search, control, train, campaign with its report, bounds."""
    for _, stage in pipeline.stages():
        stage()
    if pipeline.config.evaluates:
        _report(pipeline.run.path)


@_config_command("search", needs="search")
def search_command(pipeline: Pipeline) -> None:
    """Search an architecture, as the search section of CONFIG says, and that of the control section if it has one."""
    for which, genotype in pipeline.searches().items():
        click.echo(genotype.describe())
        click.echo(f"written to {pipeline.run.path / which / 'genotype.json'}")


@_config_command("train", needs="train")
def train_command(pipeline: Pipeline) -> None:
    """Train the models in the train section of CONFIG for faulty hardware."""
    pipeline.train()
    click.echo(f"written to {pipeline.run.path / 'train'}")


@_config_command("campaign", needs="evaluates")
def campaign_command(pipeline: Pipeline) -> None:
    """Measure models on the test set: fault rates, single faults and protection, as CONFIG says."""
    pipeline.campaign()
    _report(pipeline.run.path)


@_config_command("bounds", needs="bounds")
def bounds_command(pipeline: Pipeline) -> None:
    """Bound what failures can do to trained models at worst, as the bounds section of CONFIG says."""
    click.echo(pipeline.bounds())
    click.echo(f"written to {pipeline.run.path / 'bounds'}")


@cli.command("verify")
@click.argument("certificate", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--config", help="For images.json: the config that it was made by, such as RUN/config.yaml.")
@click.option("--allow-factory", is_flag=True, help="The model file is your own and may import what it names.")
def verify_command(
    certificate: Path, model: Path, overrides: tuple[str, ...], config: str | None, allow_factory: bool
) -> None:
    """Check a CERTIFICATE of `ftnas bounds` against a MODEL file.

    What its failures can do is computed again. certificate.json is about every image there can be, images.json about
    the test images of a config, some of whose settings may be others here.

    \b
    Examples:
      ftnas verify certificate.json model.pt
      ftnas verify images.json model.pt --config runs/third/config.yaml data.root=~/images
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from ftnas.bounds import about_images, read_certificate, verify
    from ftnas.models import load_model

    if overrides and config is None:
        raise ValueError(f"{overrides[0]} changes a config, and none is given; add --config or remove it")
    claim = read_certificate(certificate)
    of_images = claim.domain.kind == "samples"
    if of_images and config is None:
        raise ValueError(f"{certificate} is about images; name the config it was made by: --config RUN/config.yaml")
    if config is not None and not of_images:
        raise ValueError(f"{certificate} is about every image there can be; remove --config: it has no effect")
    inputs = None
    if config is not None:
        from ftnas.config import read_bounded
        from ftnas.pipeline import bounded_images

        images = bounded_images(*read_bounded(config, overrides))
        inputs, _ = next(images.batches(images.num_images))
    network, metadata = load_model(model, allow_factory=allow_factory)
    verify(claim, network, inputs)
    click.echo(f"holds: {claim.summary()}{about_images(claim, metadata)}")


@cli.command("report")
@click.argument("run", type=click.Path(path_type=Path))
def report_command(run: Path) -> None:
    """Make the tables, plots and report.html of a finished RUN folder."""
    _report(run)


def _report(run: Path) -> None:
    from ftnas.report import make_report

    make_report(run)


@cli.command("baselines")
def baselines_command() -> None:
    """List the baseline networks, with their size at 32x32 and 10 classes."""
    from ftnas.sizes import list_baselines

    list_baselines()


@cli.command("spaces")
def spaces_command() -> None:
    """List the search spaces that ship."""
    from ftnas.listing import list_spaces

    list_spaces()


@cli.command("configs")
def configs_command() -> None:
    """List the configs that ship."""
    from ftnas.listing import list_configs

    list_configs()


@cli.group("nodes")
def nodes_group() -> None:
    """Split a network over physical nodes that may be down (configs/nodes/*.yaml)."""


def _nodes_command(name: str) -> Callable[[Callable[[NodesConfig, RunDir], None]], click.Command]:
    """Make a function of a study of nodes and its run folder a command; a folder of the same config goes on."""

    def make(body: Callable[[NodesConfig, RunDir], None]) -> click.Command:
        def command(
            config: str,
            overrides: tuple[str, ...],
            out: Path | None,
            kill: tuple[str, ...] = (),
            hang: tuple[str, ...] = (),
        ) -> None:
            from ftnas.nodes.study import open_study

            short = [_at(text, key) for key, texts in (("kill", kill), ("hang", hang)) for text in texts]
            study, run = open_study(config, out, overrides=[*overrides, *short])
            with run, _told_how_to_go_on(f"the same command goes on in {run.path}"):
                body(study, run)

        command.__doc__ = body.__doc__
        command = click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")(
            command
        )
        if name == "run":
            for key, what in (("hang", "Stop"), ("kill", "Kill")):
                text = f"{what} the process of a node before an image; short for live.{key}.NODE=IMAGE."
                command = click.option(f"--{key}", multiple=True, metavar="NODE@IMAGE", help=text)(command)
        command = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")(command)
        return nodes_group.command(name)(click.argument("config")(command))

    return make


def _at(text: str, key: str) -> str:
    """Turn ``n2@100`` into the override that it is short for."""
    node, at, image = text.rpartition("@")
    if not at or not node or not image.isdigit():
        raise ValueError(f"--{key} is written NODE@IMAGE, e.g. n2@100, got {text!r}")
    return f"live.{key}.{node}={image}"


@_nodes_command("train")
def nodes_train_command(study: NodesConfig, run: RunDir) -> None:
    """Train each variant of CONFIG from each seed; what is trained already stays."""
    from ftnas.nodes.fitting import train_all

    train_all(study, run)
    click.echo(f"written to {run.path}")


@_nodes_command("evaluate")
def nodes_evaluate_command(study: NodesConfig, run: RunDir) -> None:
    """Evaluate the trained variants of CONFIG over every pattern of failures; print the table."""
    from ftnas.nodes.measuring import report

    click.echo(report(study, run))
    click.echo(f"table.md, plot.png and plot.svg are in {run.path}")


@_nodes_command("search")
def nodes_search_command(study: NodesConfig, run: RunDir) -> None:
    """Search which skips of CONFIG to keep within a budget of bytes per image."""
    from ftnas.nodes.searching import run_search

    click.echo(run_search(study, run))


@_nodes_command("run")
def nodes_run_command(study: NodesConfig, run: RunDir) -> None:
    """Run a trained variant of CONFIG for real: each node a process, images streamed through them.

    \b
    Examples:
      ftnas nodes run digits-mlp
      ftnas nodes run digits-mlp --kill n2@100 live.time_limit_s=2
      ftnas nodes run digits-mlp --hang n1@50 live.variant=dfg live.images=null
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from ftnas.nodes.stream import run_live

    click.echo(run_live(study, run))


def main() -> None:
    """Run the command line; a ValueError is a user's mistake: one line and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is open is closed
    sys.unraisablehook = _interrupt_again
    warnings.showwarning = _warn
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        raise SystemExit(130) from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (ValueError, click.ClickException) as error:
        _explain(error)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    except Exception as error:
        if not isinstance(error, RuntimeError) and getattr(error, "errno", None) != errno.ENOSPC:
            traceback.print_exc()
        _explain(error)
        raise SystemExit(1) from None


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception Python threw away, as in the callback of a weak reference it must."""
    if not isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(lost)
        return
    again = signal.SIGINT if isinstance(lost.exc_value, KeyboardInterrupt) else signal.SIGTERM

    def send() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), again)

    _thread.start_new_thread(send, ())  # a Thread waits for its start, and the signal could come meanwhile


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print("warning:", " ".join(str(message).split()), file=sys.stderr)


def _explain(error: Exception) -> None:
    """Print an error in one line; with FTNAS_DEBUG set, where it comes from too."""
    if os.environ.get("FTNAS_DEBUG"):
        traceback.print_exc()
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    print("error:", " ".join(text.split()), file=sys.stderr)


if __name__ == "__main__":
    main()
