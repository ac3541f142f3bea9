"""The command `manifold-defense`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipelines.failures import fail, reported

_ORDER = (
    "run",
    "stages",
    "config",
    "filter",
    "train-gan",
    "train-classifier",
    "harden",
    "train-encoder",
    "project",
    "evaluate",
    "certify",
    "report",
    "export",
)

# Kept light: what needs torch is imported when a command runs, so that `--help` answers at once.


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they follow one another: in a pipeline the alphabet says nothing."""
        return sorted(self.commands, key=_ORDER.index)

    def invoke(self, ctx: click.Context) -> Any:
        with reported("interrupted; run the same command again to resume"):
            return super().invoke(ctx)


def _quiet() -> None:
    """Other libraries' advice is not our users' business; DataLoader hints and the like stay out."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("lightning_fabric", "lightning_utilities", "torch", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning_|torch|tensorboard)")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="manifold-defense")
def main() -> None:
    """A generative-manifold defence for image classifiers, and what it is worth.

    Without a file, every command works on the embedded digits. Results lie in runs/NAME; to resume
    an interrupted command, run it again.
    """
    _quiet()


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--run",
            "run_name",
            metavar="NAME",
            help="Folder of the run below runs/ (default: digits, or as the --config says).",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override one setting of `config`, such as gan.images=200_000; repeatable.",
        ),
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="TOML file of settings; see configs/.",
        ),
    ):
        command = option(command)
    return command


def _load(config_file: Path | None, settings: tuple[str, ...], run_name: str | None) -> Any:
    from pipelines.settings import load_config

    return load_config(config_file, settings, run_name)


def _refuse_threats_of_digits(config: Any, config_file: Path | None, settings: tuple[str, ...]) -> None:
    """A radius that nobody chose for these images would say nothing of them."""
    from pipelines.config import Config
    from pipelines.settings import is_given

    default = Config()
    chosen = is_given("evaluate.threats", config_file, settings)
    if config.data.name != default.data.name and not chosen:
        radii = " and ".join(f"{threat.norm} {threat.eps:g}" for threat in default.evaluate.threats)
        raise click.UsageError(
            f"evaluate.threats: {radii} are meant for {default.data.name}; for {config.data.name} give a "
            "--config with its own, such as those in configs/, or "
            "--set 'evaluate.threats=[{norm=\"linf\",eps=0.03}]'"
        )


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)


@main.command()
@click.option("--explain", is_flag=True, help="Say what each setting means.")
@_config_options
def config(explain: bool, config_file: Path | None, settings: tuple[str, ...], run_name: str | None) -> None:
    """Print the resolved configuration, as a TOML file that can be used again."""
    from pipelines.settings import to_toml

    click.echo(to_toml(_load(config_file, settings, run_name), explain=explain), nl=False)


@main.command()
@_config_options
def stages(config_file: Path | None, settings: tuple[str, ...], run_name: str | None) -> None:
    """Show which stages of a run are cached, stale, unfinished or missing."""
    from rich.table import Table

    from pipelines.run import statuses
    from pipelines.stages import STAGES

    console, config = _console(), _load(config_file, settings, run_name)
    table = Table(title=f"run {config.run}", title_justify="left")
    for column in ("stage", "state", "seconds", "what", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name, (folder, plan, status) in statuses(config).items():
        facts = folder.facts()
        why = folder.difference(plan, facts) if status == "stale" and facts else ""
        seconds = f"{facts['seconds']:.0f}" if facts and status in ("cached", "stale") else ""
        table.add_row(name, status, seconds, STAGES[name].summary, why)
    console.print(table)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")(command)
    return _config_options(command)


@main.command()
@click.argument("until", required=False, metavar="[STAGE]")
@click.option("--force", is_flag=True, help="Replace results that were made with other settings.")
@_run_options
def run(
    until: str | None,
    force: bool,
    dry_run: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    run_name: str | None,
) -> None:
    """Run the pipeline, up to STAGE if one is named, and show the results.

    The stages are train-gan, train-classifier, harden, train-encoder, project, evaluate, certify, report and
    export; each is a command of its own as well.
    """
    from pipelines.run import everything, run_stages, upstream
    from pipelines.stages import STAGES

    config = _load(config_file, settings, run_name)
    if until is not None and until not in STAGES:
        raise click.UsageError(f"no stage {until!r}; expected one of {', '.join(STAGES)}")
    names = upstream(until, config) if until else everything(config)
    if "evaluate" in names:
        _refuse_threats_of_digits(config, config_file, settings)
    console = _console()
    if dry_run:
        _show_intentions(console, config, names, force, remake=False)
        return
    run_stages(config, names, console, force=force)
    if "evaluate" in names:
        _show_results(console, config, with_report="report" in names)


def _show_intentions(console: Any, config: Any, names: list[str], force: bool, *, remake: bool) -> None:
    from pipelines.run import intentions, statuses
    from pipelines.stages import STAGES

    for name, doing in intentions(names, statuses(config), force):
        anew = doing == "cached" and (remake or not STAGES[name].lasts(config))
        console.print(f"{name}: {'make anew' if anew else doing}", highlight=False)


def _show_results(console: Any, config: Any, *, with_report: bool) -> None:
    from pipelines.report import print_results
    from pipelines.stage import RUNS

    folder = RUNS / config.run
    print_results(console, json.loads((folder / "evaluate" / "stage.json").read_text())["metrics"])
    if with_report:
        report = folder / "report" / "report.md"
        console.print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: cannot be made: {error.strerror}", 1)


@main.command("filter")
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUTPUT", type=click.Path())
@click.option(
    "--filter", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="An exported filter."
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Other settings: robust, also called fast and single_shot (the encoder alone: to defend, if it was "
    "trained on attacks), accurate (true to clean images, no defence), reference.",
)
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
@click.option(
    "--run", "run_name", metavar="NAME", help="Use the filter that this run exported (default: digits)."
)
def filter_command(
    source: Path, target: str, folder: Path | None, preset: str | None, force: bool, run_name: str | None
) -> None:
    """Purify an image, or a folder tree of images, whose errors are listed in OUTPUT/errors.csv.

    Results have the size and the channels of the filter's images: another size is cropped to the centre
    square and resized. The error is the mean squared distance of G(z*) to the image so read; a large one
    says that the generator cannot draw it, a small one is no sign that it was not attacked. A single
    image goes to the file OUTPUT, or into it if it is a folder or ends in a slash.
    """
    from manifold_defense.artifact import load_filter
    from manifold_defense.projection import PRESETS
    from pipelines.progress import progress_bar
    from pipelines.purify import purify
    from pipelines.stage import RUNS

    if folder is not None and run_name is not None:
        raise click.UsageError("--filter and --run name two filters; give one of them")
    if preset is not None and preset not in PRESETS:
        raise click.UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset}")
    place = folder or RUNS / (run_name or "digits") / "export" / "filter"
    if folder is None and not place.exists():
        fail(
            f"{place}: no such filter yet; `manifold-defense run` makes it, --filter FOLDER takes another", 1
        )
    loaded = load_filter(place)
    if preset is not None:
        try:
            loaded = loaded.configured(PRESETS[preset])
        except ValueError as error:  # this filter has no encoder
            raise click.UsageError(f"--preset {preset}: {error}") from None
    if source.is_file() and target.endswith(("/", os.sep)):
        _make_folder(Path(target))
    console = _console()
    with (
        reported("interrupted; --force begins again"),
        progress_bar("filter", 0, "img", console, shown=console.is_terminal) as advance,
    ):
        result = purify(loaded, source, Path(target), force=force, on_progress=advance)
    shown = f", error {result.error:.4f}" if result.written else ""
    line = f"{result.written} written to {result.target}{shown}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)  # brackets are part of a name
    if result.unreadable:
        fail(f"{len(result.unreadable)} unreadable: {', '.join(result.unreadable[:5])}", 1)


def _stage_command(name: str, config: Any, *, force: bool, remake: bool, dry_run: bool) -> None:
    """Run one stage alone, or say what that would do."""
    from pipelines.run import run_stages

    console = _console()
    if dry_run:
        _show_intentions(console, config, [name], force, remake=remake)
        return
    run_stages(config, [name], console, force=force, remake=remake)
    if name == "evaluate":
        _show_results(console, config, with_report=False)


def _stage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--force", is_flag=True, help="Make the stage anew, whatever there is.")(command)
    return _run_options(command)


def _add_stage_command(name: str, summary: str) -> None:
    @main.command(name, help=f"Stage: {summary}.")
    @_stage_options
    def command(
        force: bool,
        dry_run: bool,
        config_file: Path | None,
        settings: tuple[str, ...],
        run_name: str | None,
    ) -> None:
        config = _load(config_file, settings, run_name)
        _stage_command(name, config, force=force, remake=force, dry_run=dry_run)


@main.command("evaluate")
@click.option(
    "--classifier",
    metavar="MODULE:FUNCTION",
    help="Attack a classifier of your own, a torch module or its folder, instead of those of the run.",
)
@click.option("--filter", "folder", metavar="FOLDER", help="Attack it behind this filter as well.")
@click.option("--data", metavar="NAME", help="Short for --set data.name=NAME.")
@_stage_options
def evaluate_command(
    classifier: str | None,
    folder: str | None,
    data: str | None,
    force: bool,
    dry_run: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    run_name: str | None,
) -> None:
    """Stage: attack every defence in every view.

    The results of an own classifier go to runs/own, unless --run says otherwise. They are measured
    anew each time: its weights may have changed. Only a first evaluation that was interrupted goes on, if
    the weights are equal.
    """
    if folder is not None and classifier is None:
        raise click.UsageError(
            "--filter goes in front of a classifier of your own: give --classifier as well"
        )
    from pipelines.settings import in_quotes

    if data is not None:
        settings = (f"data.name={in_quotes(data)}", *settings)
    if classifier is not None:
        # In quotes: a folder may be called 2024.
        given = {"evaluate.classifier": classifier, "evaluate.filter": folder or ""}
        settings = (*settings, *(f"{key}={in_quotes(value)}" for key, value in given.items()))
        run_name = run_name or "own"
    config = _load(config_file, settings, run_name)
    _refuse_threats_of_digits(config, config_file, settings)
    anew = force or classifier is not None
    _stage_command("evaluate", config, force=anew, remake=force, dry_run=dry_run)


for _name, _summary in (
    ("train-gan", "train generator, critic and joint encoder"),
    ("train-classifier", "train the classifier on clean images"),
    ("train-encoder", "fit the encoder to the finished generator"),
    ("project", "project test images and measure the generator"),
    ("harden", "train the classifier adversarially"),
    ("certify", "prove what can be proved, and attack the proofs"),
    ("report", "write tables and pictures"),
    ("export", "write the deployable filter and classifiers"),
):
    _add_stage_command(_name, _summary)


if __name__ == "__main__":
    main()
