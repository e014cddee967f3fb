"""The command line of the pipeline: ``python -m flows``.

Every command that a script may read has ``--json``.  Exit status: 0 done, 1 something that you can
cure (one message says what), 2 a wrong command line.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.errors import FlowError
from flows.settings import apply_defaults

if TYPE_CHECKING:
    from flows.driver import Driver
    from flows.record import Record

app = typer.Typer(
    help="Run the stages of dvc.yaml, keep a record of what they made, move what is in production.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
WIDE = 160
"""Columns of a table that goes into a file or a pipe, where no terminal says how wide it is."""
out = Console(soft_wrap=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Stages = Annotated[
    list[str] | None,
    typer.Argument(help="Stages, all items of one, or globs; with what is upstream of them."),
]
Name = Annotated[str, typer.Argument(help="Registered model: DEFENSE.MODEL.")]


@app.command()
def plan(stages: Stages = None, as_json: AsJson = False) -> None:
    """Show what a run would do to each stage, and why; nothing is run.

    Example: `python -m flows plan 'evaluate@lab-llava-*'`
    """
    from flows import locks
    from flows.errors import AlreadyRunning
    from flows.graph import Graph
    from flows.parameters import check
    from flows.tables import plan_table

    root = Path.cwd()
    check(root)
    if (owner := locks.holder(root)) is not None:
        raise AlreadyRunning(f"PID {owner} is running this pipeline; plan when it has ended.")
    graph = Graph(root)
    planned = graph.plan(graph.select(stages or []))
    graph.close()
    if as_json:
        _json({name: {"state": state, "reasons": why} for name, (state, why) in planned.items()})
        return
    out.print(plan_table(planned))
    stale = sum(state != "unchanged" for state, _ in planned.values())
    out.print(f"{stale} of {len(planned)} stages may run." if stale else "Nothing to do.")


@app.command()
def run(
    stages: Stages = None,
    profile: Annotated[
        str | None, typer.Option(help="Written to params.yaml as `profile` first: quick or full.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages side by side.")] = 2,
    params: Annotated[
        Path | None,
        typer.Option(help="A whole file, which takes the place of params.yaml first."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the stages up to date, publish, promote through the gate, and print the result.

    Example: `python -m flows run --profile quick`

    With --params, such as `--params examples/llava-1.5-7b.yaml`, that file is checked and becomes
    params.yaml; what that was is kept beside it.

    With stages named, only these and what they need are run, and nothing is published.
    A gate that refuses is a result and not a failure: the reason is printed and the status is 0;
    `promote` ends with 1.
    """
    from flows.driver import driving
    from flows.parameters import adopt, check, choose
    from flows.record import gate_rules

    root = Path.cwd()
    if params is None:
        check(root)
        gate_rules(root)

    def first() -> None:
        if params is not None and (kept := adopt(root, params)):
            err.print(f"params.yaml: now {params}; what it was is {kept.name}")
            gate_rules(root)
        if before := choose(root, profile):
            err.print(f"profile: {before} -> {profile} (written to params.yaml)")

    try:
        with driving(root, jobs=jobs, first=first) as driver:
            _say_swept(driver)
            record = _run(driver, driver.graph.select(stages or []), publish=not stages)
    except KeyboardInterrupt:
        err.print("interrupted; nothing is half-written, run again to go on", style="yellow")
        raise typer.Exit(130) from None
    _report(root, record, as_json=as_json)
    for _, why in record.refused:
        err.print(why, style="yellow", highlight=False)


def _say_swept(driver: "Driver") -> None:
    for line in driver.owner.swept:
        err.print(line, style="yellow", highlight=False)


def _run(driver: "Driver", names: list[str], *, publish: bool) -> "Record":
    """Run stale stages through Prefect; where none is, there is no flow to start."""
    from flows.display import showing
    from flows.driver import Event
    from flows.record import record_all

    idle = not driver.graph.reasons(names)
    if idle and "PREFECT_API_URL" not in os.environ:
        with showing(names, err) as listen:
            for name in names:
                listen(Event(name, "Skipped"))
        states: dict[str, str] = dict.fromkeys(names, "Skipped")
        return record_all(driver).with_states(states) if publish else _states(states)
    from flows.server import prefect_api

    with prefect_api(driver.graph.root) as url:
        if "PREFECT_API_URL" not in os.environ:
            err.print("starting Prefect for this run (logs/prefect.log)", style="dim")
        from flows.pipeline import run_with_prefect  # while the server starts

        ready = url()
        with showing(names, err) as driver.listen:
            record = record_all if publish else None
            return run_with_prefect(driver, names, ready, record=record)


def _states(states: dict[str, str]) -> "Record":
    from flows.record import Record

    return Record(states=states)


def _report(root: Path, record: "Record", *, as_json: bool) -> None:
    from flows.tables import read_channels, record_lines, result_table

    report = root / "reports" / "index.html"
    if as_json:
        _json({**asdict(record), "report": str(report) if report.is_file() else None})
        return
    if not record.published:
        return
    out.print(result_table(read_channels(root)))
    for line in record_lines(record):
        out.print(line)
    out.print(f"report: {report.relative_to(root)}")


@app.command()
def publish(as_json: AsJson = False) -> None:
    """Put every bundle that is up to date into the registry; twice changes nothing.

    Example: `python -m flows publish --json`
    """
    from flows.driver import driving
    from flows.parameters import check
    from flows.record import publish_all
    from flows.tables import record_lines

    root = Path.cwd()
    check(root)
    with driving(root) as driver:
        _say_swept(driver)
        record = publish_all(driver)
    if as_json:
        _json([asdict(item) for item in record.published])
        return
    for line in record_lines(record):
        out.print(line)


@app.command()
def promote(
    name: Name,
    version: Annotated[str, typer.Option(help="Number or alias.")] = "candidate",
    expect: Annotated[
        str | None, typer.Option(help='Version that must be in production; "none" for none.')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Move production to a version that passes the gate, verifies, and loads.

    Example: `python -m flows promote cmrm.lab-llava --version 3 --expect 2`
    """
    from flows.parameters import check
    from flows.record import gate_rules, smoke_load
    from registry import promote as registry_promote
    from registry.store import open_store

    root = Path.cwd()
    check(root)
    done = registry_promote.promote(
        open_store(root),
        name,
        gate_rules(root),
        smoke=smoke_load(root),
        which=version,
        expect=expect,
    )
    if as_json:
        _json(asdict(done))
    elif done.moved:
        out.print(f"{name}: production moved from {done.replaced} to version {done.version}")
        for check in done.verdict.checks if done.verdict else ():
            out.print(f"  {check.rule}: {check.says}", highlight=False)
    else:
        out.print(f"{name}: version {done.version} is in production already")


@app.command()
def rollback(name: Name, as_json: AsJson = False) -> None:
    """Return production to the version before; a run does not promote the one that left.

    Example: `python -m flows rollback cmrm.lab-llava`
    """
    from flows.record import smoke_load
    from registry import promote as registry_promote
    from registry.store import open_store

    root = Path.cwd()
    done = registry_promote.rollback(open_store(root), name, smoke=smoke_load(root))
    if as_json:
        _json(asdict(done))
    else:
        out.print(f"{name}: production moved from {done.replaced} back to version {done.version}")


@app.command()
def lineage(
    name: Annotated[
        str | None, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION; none lists all.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check bytes and hashes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a version was made from: stages, data, code; --verify checks that it still holds.

    Example: `python -m flows lineage cmrm.lab-llava@production --verify`
    """
    from flows.tables import provenance_tree
    from registry.provenance import trace
    from registry.provenance import verify as verified
    from registry.store import CANDIDATE, PRODUCTION, open_store

    store = open_store(Path.cwd())
    if name is None:
        known = {model: store.aliases(model) for model in store.names()}
        _json(known) if as_json else _list(known)
        return
    model, _, which = name.partition("@") if "@" in name else name.partition("/")
    which = which or (PRODUCTION if PRODUCTION in store.aliases(model) else CANDIDATE)
    seen = trace(store, model, which)
    findings = verified(store, model, which) if verify else []
    if as_json:
        _json({**seen.as_dict(), "verified": [asdict(finding) for finding in findings]})
    else:
        out.print(provenance_tree(seen))
        for finding in findings:
            style = "green" if finding.holds else "bold red"
            out.print("holds " if finding.holds else "BROKEN", style=style, end="  ")
            out.print(f"{finding.what}: {finding.says}", highlight=False, markup=False)
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


def _list(known: dict[str, dict[str, str]]) -> None:
    for model, aliases in known.items():
        places = ", ".join(f"{alias} {version}" for alias, version in sorted(aliases.items()))
        out.print(f"{model}: {places or 'no alias'}", highlight=False)
    if not known:
        out.print("nothing is published yet: `python -m flows run`")


@app.command()
def report(
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Print the path of the report, or open it.

    Example: `python -m flows report --open`
    """
    path = Path.cwd() / "reports" / "index.html"
    if not path.is_file():
        raise FlowError(f"{path} does not exist; run the pipeline first: `python -m flows run`.")
    typer.echo(path)
    if open_it:
        import webbrowser

        webbrowser.open(path.as_uri())


@app.command()
def deploy() -> None:
    """Register the schedules of prefect.yaml with the server at PREFECT_API_URL.

    Example: `PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows deploy`
    """
    from flows.deployments import deploy_all

    for line in deploy_all(Path.cwd()):
        out.print(line, highlight=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look whether this checkout is fit to run: versions, locks, parameters, registry, disk.

    Example: `python -m flows doctor`
    """
    from flows.doctor import examine

    findings = list(examine(Path.cwd()))
    if as_json:
        _json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark, style = ("ok  ", "green") if finding.fit else ("BAD ", "bold red")
            out.print(mark, style=style, end=" ")
            out.print(f"{finding.what}: {finding.says}", highlight=False, markup=False)
    if not all(finding.fit for finding in findings):
        raise typer.Exit(1)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


def _curable(error: Exception) -> bool:
    """Tell whether an error is one of ours, without importing what is not loaded."""
    families = [FlowError]
    for module, name in (("registry.errors", "RegistryError"), ("hauberk.errors", "HauberkError")):
        if module in sys.modules:
            families.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(families))


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # an exception, so that every stage is ended on the way out


def main() -> None:
    """Run the command; an error a user can cure is one message and status 1."""
    apply_defaults(Path.cwd())
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except Exception as error:
        if not _curable(error):
            raise
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
