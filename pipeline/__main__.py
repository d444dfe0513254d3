"""The command line: ``python -m pipeline COMMAND -c conf/X.yaml -o key=value``, also the script ``sparknorm``.

Each command is one Spark job. It leaves a JSON result whose path it prints last; whatever goes wrong is one message
on standard error and an exit code that is not 0.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.cluster.errors import spark_error
from pipeline.config import Settings, load_settings
from pipeline.config.secrets import mask, mask_logs
from pipeline.console import console
from pipeline.report.comparison import ArmSummary, Comparison
from pipeline.report.names import setting_words
from pipeline.storage.writable import prepare_output

log = logging.getLogger("pipeline")
# Exit codes of commands that were ended by Ctrl-C, as typer has it, and by SIGTERM: 128 and the signal's number.
ENDED_BY: dict[str | int | None, str] = {130: "Ctrl-C", 143: "SIGTERM"}
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Config = Annotated[
    str, typer.Option("-c", "--config", help="the YAML file of the experiment, one of conf/*.yaml, or its fsspec URL")
]
Overrides = Annotated[list[str] | None, typer.Option("-o", "--override", help="section.key=value, repeatable")]


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="show where an error came from, in full")] = False,
) -> None:
    """Train batch-normalized CNNs inside Spark, and compare normalizations with evidence."""
    if debug:
        log.setLevel(logging.DEBUG)


@app.command()
def ingest(config: Config, override: Overrides = None) -> None:
    """Check, shuffle and shard the images of a source into a dataset."""
    from pipeline import ingest as ingesting
    from pipeline.ingest.existing import IDS

    settings = load_settings(config, override or [])
    result = ingesting.ingest(_session(settings, "ingest.json", trains=False), settings)
    images = ", ".join(f"{rows:,} {split}" for split, rows in result.rows.items())
    state = "written" if result.written else "unchanged: the same input and settings were ingested before"
    _say(f"{result.dataset} {state}: {images} images, {sum(result.set_aside.values()):,} set aside")
    if result.already_there:
        _say(f"{result.already_there:,} images of the source were there already, by their ids ({IDS})")
    if result.other_files.files:
        _say(f"passed over, as dataset.source.extensions does not have them: {result.other_files}")
    _print_path(settings.output, "ingest.json")


@app.command()
def train(config: Config, override: Overrides = None) -> None:
    """Train one network on the workers of one barrier stage."""
    from pipeline import driver
    from pipeline.training.result import describe

    settings = load_settings(config, override or [], single_run=True)
    result = driver.train(_session(settings, "train.json"), settings)
    best = f"accuracy {result.final_accuracy:.2%} (the best of all evaluations was {result.best_accuracy:.2%})"
    state = "diverged" if result.diverged else best
    _say(f"{driver.training_name(settings)}: {state} after {result.steps} steps; MLflow run {result.run_id}")
    for line in describe(result):
        _say(line)
    _print_path(settings.output, "train.json")


@app.command()
def export(config: Config, override: Overrides = None) -> None:
    """Write the newest network that `train` left as files that serve it without this package."""
    from models.fold import by_reason
    from pipeline import serving

    settings = load_settings(config, override or [], single_run=True)
    result = serving.export(settings)
    folded, left = result.fold.folded, result.fold.left
    if settings.export.fold is not False:
        _say(f"{result.name}: {len(folded)} of {len(folded) + len(left)} norm layers folded into the layer before")
    if left:
        _say(f"not folded: {by_reason(left)}")
    images = f"{result.compared_on.images} images of {result.compared_on.split}"
    for file, facts in result.files.items():
        same = f"logits differ by at most {facts.largest_difference:.1g} from the trained network's"
        _say(f"{file}: on {images}, {same}, accuracy {facts.accuracy:.2%}")
    _print_path(serving.export_folder(settings), "export.json")


@app.command()
def register(
    config: Config,
    override: Overrides = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="give the champion's place back to the one before")
    ] = False,
) -> None:
    """Make the best network a version of a registered model, and the champion if it passes the gate."""
    from pipeline import serving
    from pipeline.report.registration_page import headline

    settings = load_settings(config, override or [])
    made = (serving.rollback if rollback else serving.register)(settings)
    if made.origin is not None:
        _say(made.origin.why)
    _say(headline(made))
    for line in made.why:
        _say(line)
    for line in made.notes:
        _say(f"note: {line}")
    if made.uri is not None:
        _say(f"champion: version {made.champion}, {made.uri}")
    _say(f"report: {storage.absolute(settings.output)}/register.html")
    _print_path(settings.output, "register.json")


@app.command()
def score(config: Config, override: Overrides = None) -> None:
    """Give the images of a source the probabilities of a registered model's classes."""
    from pipeline import serving

    settings = load_settings(config, override or [])
    result = serving.score(_session(settings, "score.json"), settings)
    aside = sum(result.set_aside.values())
    if result.written:
        _say(f"{result.scores}: {result.images:,} images scored with {result.model.uri}, {aside:,} set aside")
    else:
        _say(f"{result.scores} unchanged: the model had scored these images before, or none is new")
    if result.parts_found:
        _say(f"{result.parts_found} of {result.parts} parts were there from a job that did not end")
    for figure in result.drift.figures if result.drift else ():
        chance = f"by chance up to {figure.psi_by_chance:.3f}"
        _say(f"{figure.name} {figure.state} ({figure.reference} split): index {figure.psi:.3f}, {chance}")
    for channel in result.drift.channels if result.drift else ():
        if channel.state != "as before":
            means = f"from a mean of {channel.reference_mean:.3f} to {channel.mean:.3f}"
            _say(f"pixels of channel {channel.channel} {channel.state}: {means}")
    for line in result.notes:
        _say(f"note: {line}")
    _print_path(settings.output, "score.json")


@app.command()
def compare(config: Config, override: Overrides = None) -> None:
    """Train every arm with every seed, and report which settings did best and what they cost."""
    from pipeline.study import compare as job
    from pipeline.tracking.client import runs_are_shown

    settings = load_settings(config, override or [])
    comparison = job(_session(settings), settings)
    console.print(_table(comparison))
    for sentence in comparison.verdict:
        _say(sentence.text)
    for line in comparison.warnings:
        _say(f"note: {line}")
    _say(f"report: {storage.absolute(settings.output)}/report.html")
    _say(f"runs: {runs_are_shown(settings.tracking.uri)}")
    _print_path(settings.output, "comparison.json")


@app.command()
def tune(config: Config, override: Overrides = None) -> None:
    """Search for the values of settings that are best on the validation split, and train the best few again."""
    from pipeline.study import tune as job

    settings = load_settings(config, override or [])
    tuning = job(_session(settings, "tune.json"), settings)
    for line in tuning.verdict:
        _say(line)
    _say(", ".join(f"{name}={value}" for name, value in tuning.values.items()))
    _say(f"report: {storage.absolute(settings.output)}/tune.html")
    _say(f"settings for train and compare: {storage.absolute(settings.output)}/best.yaml")
    _print_path(settings.output, "tune.json")


@app.command()
def doctor(config: Config, override: Overrides = None) -> None:
    """Look whether a training can run here: Spark, slots, versions, storage, disk, GPUs, dataset, tracking."""
    from pipeline import driver

    settings = load_settings(config, override or [])
    result = driver.doctor(_session(settings, "doctor.json"), settings)
    table = Table(title=f"{settings.name}: can it train here?", show_lines=False)
    for heading in ("check", "state", "seen, and what to do"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
    for finding in result.findings:
        table.add_row(finding.check, Text(finding.state, colours[finding.state]), Text(finding.detail))
    console.print(table)
    _print_path(settings.output, "doctor.json")
    if not result.healthy:
        sys.exit(1)


@app.command("settings")
def print_settings(config: Config, override: Overrides = None) -> None:
    """Print every setting of a file with its description, and what differs from the defaults, as one whole file."""
    from pipeline.config.effective import effective_yaml

    sys.stdout.write(effective_yaml(load_settings(config, override or [])))


def _session(settings: Settings, result: str | None = None, *, trains: bool = True) -> Any:
    """The session; before Spark starts, the output is checked, and the result of an earlier call removed from it."""
    from pipeline.cluster import get_session

    prepare_output(settings.output, *filter(None, [result]))
    return get_session(settings.spark, f"sparknorm {settings.name}", trains=trains)


def _table(comparison: Comparison) -> Table:
    tuned = comparison.tuned
    table = Table(title=f"{comparison.name}: {comparison.metric.replace('_', ' ')} on {comparison.evaluated_on}")
    headings = ("runs", "final, sound runs", "against baseline", "grade", "steps to target", "images/s", "diverged")
    for heading in ("arm", *(setting_words(name) for name in tuned), *headings):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in comparison.arms:
        reached, speed = arm.steps_to_target_mean, arm.images_per_second_mean
        spread = f" ± {100 * arm.score_std:.2f}" if arm.score_std is not None else ""
        points = f"{100 * arm.difference.mean:+.2f}" if arm.difference else "-"
        table.add_row(
            arm.arm, *(f"{arm.tuned[name]}" for name in tuned), _runs(arm),
            f"{arm.score_mean:.2%}{spread}", points, arm.grade or "-",
            f"{reached:,.0f}" if reached else "never" if arm.had_target else "-",
            f"{speed:,.0f}" if speed else "-", str(arm.diverged or "no"),
        )  # fmt: skip
    return table


def _runs(arm: ArmSummary) -> str:
    """How many there are, and how many of them the figures are over, if not over all."""
    return str(arm.n) if arm.healthy == arm.n else f"{arm.n}, {arm.healthy} sound"


def _print_path(folder: str, file: str) -> None:
    """Print the path of the command's result, the last thing on standard output."""
    sys.stdout.write(f"{mask(storage.join(folder, file))}\n")


def _say(text: str) -> None:
    console.print(mask(text), soft_wrap=True)


def _is_told_once(record: logging.LogRecord) -> bool:
    """Whether a record is of anything but Ctrl-C, and a connection to Java that broke: the error is raised too.

    py4j logs both with a traceback, and another one where pyspark's handler of Ctrl-C calls py4j within the call that
    it interrupts.
    """
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "reentrant call" in str(error):
            return False
        if type(error).__name__ == "Py4JNetworkError" or (
            record.name.startswith("py4j") and isinstance(error, OSError)
        ):
            return False
        error = error.__cause__ or error.__context__
    return True


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, as cluster managers send it, end the block as Ctrl-C does: what it has begun is ended in order. The
    signal is then ignored until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(run: Callable[[], None] = app) -> None:
    """Run a command. Errors that we foresee, and Spark's own, are shown by their message; others keep their traceback.

    Secrets in any of them are masked. Ctrl-C and SIGTERM end it with exit code 130 and 143.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    mask_logs()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_told_once)
    try:
        with _ended_by_sigterm():
            run()
    except SystemExit as ended:
        if ended.code in ENDED_BY:
            _say(f"stopped by {ENDED_BY[ended.code]}: give the same command again, and it goes on from what is saved")
        raise
    except Exception as error:
        message = spark_error(error)
        if message is None and not isinstance(error, (ValueError, RuntimeError, OSError)):
            sys.stderr.write(mask(traceback.format_exc()))
        else:
            _say(f"error: {message or error}")
            log.debug("where it came from", exc_info=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
