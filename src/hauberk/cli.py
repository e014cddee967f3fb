"""The command line of the library: ``hauberk``, or ``python -m hauberk``.

Every command is a function here, which imports what is heavy when it is called.  An error that a
user can cure is one message and status 1; a wrong call is status 2.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hauberk.errors import HauberkError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hauberk.doctor import Report
    from hauberk.requests import Request, Response

app = typer.Typer(
    help="Safety defenses for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
labels = typer.Typer(
    help="Label answers by hand, and see what that says of the judges.", no_args_is_help=True
)
app.add_typer(labels, name="label")
stdout, stderr = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Bundle = Annotated[Path, typer.Argument(help="The folder of a bundle.")]
Revision = Annotated[str | None, typer.Option(help="Of a repository on the hub.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Where the model goes: auto, cuda:0, cpu ...; nothing for cpu.")
]


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


@app.command(epilog="Example: hauberk inspect artifacts/lab-llava/cmrm/bundle --json")
def inspect(bundle: Bundle, json: Json = False) -> None:
    """Verify a bundle, and say what it is, what it was made for and what it was fitted on."""
    from dataclasses import asdict
    from json import dumps

    from hauberk.bundle import read_card

    home, card = read_card(bundle)  # every hash is held against the card
    if json:
        typer.echo(dumps({"folder": str(home), **asdict(card)}, indent=2))
        return
    whole = Table("", "", title=f"{card.method}: {home}", show_header=False)
    packages = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    whole.add_row("made with", Text(packages or f"hauberk {card.hauberk}"))
    for name, value in asdict(card.binding).items():
        whole.add_row(name, Text("none" if value is None else str(value)))
    for title, rows in (
        ("setting", {name: dumps(value) for name, value in card.parameters.items()}),
        ("fitted on", {each["id"]: each["sha256"] for each in card.data}),
        ("measured", card.measurements),
        ("verified", card.files),
    ):
        whole.add_section()
        for name, said in rows.items():
            whole.add_row(f"{title}: {name}", Text(str(said)))
    stdout.print(whole)


@app.command(
    epilog="Example: hauberk respond ./my-model --bundle ./cmrm --image a.png --text 'What is it?'"
)
def respond(
    model: Annotated[
        str | None, typer.Argument(help="A folder, or a repository on the hub.", show_default=False)
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="The defense; nothing for none.")] = None,
    text: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture of it; may be said often.")
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="JSON lines with text, image, system, in place of these.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The address of a served model, such as http://host:8000/v1.")
    ] = None,
    served: Annotated[str, typer.Option("--model", help="Its name there.")] = "",
    api_key_env: Annotated[str, typer.Option(help="The environment variable with its key.")] = "",
    words_only: Annotated[
        bool, typer.Option(help="Leave GuardAlign's attention out, as a served model has to.")
    ] = False,
    clip: Annotated[
        str | None, typer.Option(help="Where the CLIP lies that GuardAlign uses.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer ends here at last.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines also of one.")] = False,
) -> None:
    """Answer requests with a model, under a defense or none.

    The model runs here, or is served: --endpoint and --model, guarded by a frame or a mask.  One
    request is --text, with any --image; the answers to a file of --requests are JSON lines.
    """
    from json import dumps

    from hauberk.asking import read_requests, request_of

    if (model is None) == (endpoint is None):
        raise typer.BadParameter("give a MODEL that runs here, or an --endpoint, and not both.")
    if bool(endpoint) != bool(served):
        raise typer.BadParameter("--endpoint and --model belong together; give both or neither.")
    if (text is None) == (requests is None) or (requests and image):
        raise typer.BadParameter("give --text, with any --image, or a file of --requests.")
    asked = read_requests(requests) if requests else [request_of(text or "", image or [])]
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if endpoint:
        found = _asked_of(endpoint, served, api_key_env, asked, bundle, clip, words_only, limits)
    else:
        loading = {"revision": revision, "dtype": dtype, "device_map": device_map}
        found = _answered(str(model), loading, asked, bundle, clip, words_only, limits)
    for response in found:
        if json or requests:
            typer.echo(dumps(vars(response)))
        elif response.error:
            complain(HauberkError(response.error))
        else:
            typer.echo(response.text)
    raise typer.Exit(int(any(response.error for response in found)))


def _asked_of(
    url: str,
    name: str,
    api_key_env: str,
    asked: "Sequence[Request]",
    bundle: Path | None,
    clip: str | None,
    words_only: bool,
    limits: dict[str, Any],
) -> "list[Response]":
    """Let a served model answer."""
    from hauberk.defenses import read
    from hauberk.endpoint import Endpoint, EndpointSetting
    from hauberk.errors import BadEndpoint
    from hauberk.target import Target

    try:
        setting = EndpointSetting(url, name, api_key_env=api_key_env)
    except ValueError as error:
        raise BadEndpoint(str(error)) from None
    defense = read(bundle, clip=clip) if bundle else None
    guard = _without_attention(defense) if words_only else defense
    return Target(Endpoint(setting)).respond(asked, guard, **limits)


def _answered(
    source: str,
    loading: dict[str, Any],
    asked: "Sequence[Request]",
    bundle: Path | None,
    clip: str | None,
    words_only: bool,
    limits: dict[str, Any],
) -> "list[Response]":
    """Let a model answer that runs here."""
    from hauberk.defenses import load
    from hauberk.loading import load_model
    from hauberk.requests import respond

    model, processor = load_model(source, **loading)
    defense = load(bundle, model, processor, clip=clip) if bundle else None
    guard = _without_attention(defense) if words_only else defense
    return respond(model, processor, asked, guard, **limits)


def _without_attention(defense: Any) -> Any:
    """Keep the mask and the words of a GuardAlign, and leave the attention as it is."""
    from hauberk.defenses import GuardAlign
    from hauberk.errors import BadParams

    if not isinstance(defense, GuardAlign):
        raise BadParams("--words-only is for a bundle of guardalign; leave it out.")
    return defense.with_prefix(defense.prefix and defense.prefix.with_gamma(0))


@app.command(epilog="Example: hauberk export ./tga ./my-model ./my-defended-model")
def export(
    bundle: Bundle,
    model: Annotated[str, typer.Argument(help="The model that it was made for.")],
    out: Annotated[Path, typer.Argument(help="A new folder; of a frame, a new .png.")],
    revision: Revision = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Write a defense as what other programs use: a checkpoint, or for a frame a picture.

    Trained weights (tga), and shifts that are the same for every request (cmrm), become a
    checkpoint of stock transformers; a frame (davsp) becomes a PNG.  What cannot be either is
    refused with the reason, and nothing is written.
    """
    from hauberk.exporting import export as write

    loading = {"revision": revision, "dtype": dtype, "device_map": device_map}
    typer.echo(write(bundle, model, out, **loading))


@labels.command(
    "write", epilog="Example: hauberk label write responses.jsonl labels/first.csv --n 200"
)
def label_write(
    responses: Annotated[list[Path], typer.Argument(help="responses.jsonl of evaluations.")],
    sheet: Annotated[Path, typer.Argument(help="A new file that ends in .csv.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to draw.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    suite: Annotated[
        list[Path] | None,
        typer.Option(help="A suite's .parquet, for its pictures; may be said often."),
    ] = None,
) -> None:
    """Draw answers to label, as a sheet and as a page to fill it in, beside it.

    Neither shows what a judge said, or which defense answered.
    """
    from hauberk.evaluation.label import label_write as write

    drawn = write(responses, sheet, n=n, seed=seed, suites=suite or [])
    typer.echo(f"{drawn} answers to label: {sheet}, or the page {sheet.with_suffix('.html')}")


@labels.command(
    "read", epilog="Example: hauberk label read labels/first.csv responses.jsonl --json"
)
def label_read(
    sheet: Annotated[Path, typer.Argument(help="A sheet, filled in as far as somebody came.")],
    responses: Annotated[list[Path], typer.Argument(help="Those that it was drawn from.")],
    json: Json = False,
) -> None:
    """Say how right the judges were, and correct their rates by what people said."""
    from json import dumps

    from hauberk.evaluation.label import label_read as read

    found = read(sheet, responses)
    if json:
        typer.echo(dumps(found, indent=2))
        return
    rows: Any = found["metrics"]
    title = (
        f"{found['labelled']} of {found['rows']} rows labelled, {found['unclear']} of them "
        f"unclear; for {found['unrepresented']} answers none stands"
    )
    table = Table("model", "defense", "suite", "metric", "value", "95 %", "n", title=title)
    for row in rows:
        numbers = [row[name] for name in ("value", "low", "high")]
        value, low, high = ("–" if x is None else f"{100 * x:.1f} %" for x in numbers)
        names = (row[name] for name in ("model", "defense", "suite", "metric"))
        table.add_row(*map(Text, names), value, f"{low} to {high}", str(row["n"]))
    stdout.print(table)


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
