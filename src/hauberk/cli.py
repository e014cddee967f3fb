"""The command line of the library: ``hauberk``, or ``python -m hauberk``.

Every command is a function here, which imports what is heavy when it is called.  An error that a
user can cure is one message and status 1; a wrong call is status 2.
"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hauberk.errors import HauberkError

if TYPE_CHECKING:
    from hauberk.doctor import Report

app = typer.Typer(
    help="Safety defenses for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
stdout, stderr = Console(), Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Safety defenses for vision-language models."""


@app.command(
    epilog="Example: hauberk doctor llava-hf/llava-1.5-7b-hf ./my-model ./other/config.json"
)
def doctor(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Repositories on the hub, folders, or files config.json."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Of repositories on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list in JSON instead.")] = False,
) -> None:
    """Say where the parts of models are and which defenses they can have, without any weights."""
    from json import dumps

    from hauberk.doctor import examine

    reports: list[dict[str, object]] = []
    failed = False
    for source in models:
        try:
            report = examine(source, revision)
        except HauberkError as error:
            failed = True
            reports.append({"source": source, "error": str(error)})
            if not json:
                complain(error)
            continue
        failed = failed or not report.complete
        reports.append(report.as_dict())
        if not json:
            _print(report)
    if json:
        typer.echo(dumps(reports, indent=2))
    raise typer.Exit(int(failed))


def _print(report: "Report") -> None:
    """Print one report: the parts, and the verdicts by defense."""
    parts = Table("part", "where", "what", title=f"{report.source}: {report.architecture}")
    for finding in report.findings:
        place = Text(finding.place or "not found", style="" if finding.place else "bold red")
        parts.add_row(finding.part, place, Text(finding.what))
    verdicts = Table("defense", "can it", "", "why not")
    for verdict in report.verdicts:
        answer = "[green]yes[/]" if verdict.possible else "[red]no[/]"
        verdicts.add_row(verdict.defense, verdict.action, answer, Text(verdict.reason))
    stdout.print(parts, verdicts)


def complain(error: HauberkError) -> None:
    """Print an error that a user can cure."""
    stderr.print("error:", style="bold red", end=" ")
    stderr.print(str(error), markup=False, highlight=False)  # the text may hold [..]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except HauberkError as error:
        complain(error)
        raise SystemExit(1) from None
