"""From rows to reports/index.html and its plots."""

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk import UNDEFENDED
from tasks.report import davsp, guardalign, tables, tga, words
from tasks.report.agreement import agreed, labelled, says
from tasks.report.channels import ALL, mirrors
from tasks.report.comparison import Comparison
from tasks.report.davsp import prompt_parts, prompted, transfer
from tasks.report.figures import Figure, figures, measured_setting, rates, setting_cells
from tasks.report.gap import gaps
from tasks.report.guardalign import MASKED, READINGS, SWEPT, attended, parts, seen
from tasks.report.judged import judged
from tasks.report.safety_layers import safety_layers
from tasks.report.samples import AT_MOST, pick
from tasks.report.sweeps import bounds_of, by_suite
from tasks.report.tga import CEILING, SHOWN, aligned

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""First bytes of a picture -> its type."""


def render_report(comparison: Comparison, out: Path) -> Path:
    """Write the report.

    The page needs nothing beside itself: pictures, plots, style and script are inside, and its
    own policy forbids it to load anything.  The same comparison gives the same bytes.

    Parameters
    ----------
    comparison : Comparison
        What was measured.
    out : Path
        A folder, made where it is missing; receives ``index.html`` and ``plots/*.svg``.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        If two rows claim the same measurement, or a picture is neither PNG, JPEG nor WebP.
    """
    plots = {model: figures(comparison, model) for model in comparison.models}
    content = _content(comparison, plots)
    page = _environment().get_template("page.html.j2").render(content)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    drawn = [
        *plots.values(),
        *(gap.figures for gap in content["gaps"].values()),
        *(found.figures for found in content["seen"].values()),
        *(found.figures for found in content["prompted"].values()),
        *(found.figures for found in content["safety_layers"].values()),
        *(found.figures for found in content["aligned"].values()),
        [found.figure for found in content["attended"].values()],
        [found.figure for found in content["agreed"].values()],
    ]
    for figure in chain.from_iterable(drawn):
        (out / "plots" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    index = out / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _content(comparison: Comparison, plots: Mapping[str, list[Figure]]) -> dict[str, Any]:
    script = (HERE / "script.js").read_text(encoding="utf-8")
    samples = {
        model: pick(comparison, model, defense)
        for model, defense in comparison.chosen.items()
        if model in comparison.models
    }
    visible = {
        shown.sample["sample_id"]
        for kinds in samples.values()
        for kind in kinds
        for shown in kind.shown
    }
    return {
        "style": (HERE / "style.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
        "comparison": comparison,
        "undefended": UNDEFENDED,
        "overviews": [tables.overview(comparison, model) for model in comparison.models],
        "matrix_columns": tables.matrix_columns(comparison),
        "matrix": tables.matrix(comparison),
        "columns": tables.COLUMNS,
        "paired": {model: tables.paired(comparison, model) for model in comparison.models},
        "difference_names": tables.DIFFERENCE,
        "differences": {m: tables.differences(comparison, m) for m in comparison.models},
        "measured": {model: tables.measured(comparison, model) for model in comparison.models},
        "others": {model: tables.others(comparison, model) for model in comparison.models},
        "utility_columns": tables.UTILITY,
        "utility": {model: tables.utility(comparison, model) for model in comparison.models},
        "plots": plots,
        "gaps": gaps(comparison),
        "seen": seen(comparison),
        "attended": attended(comparison),
        "masked_columns": list(MASKED),
        "readings": list(READINGS.values()),
        "swept_columns": list(SWEPT.values()),
        "parts": parts(comparison),
        **_columns("parts", guardalign.columns(comparison)),
        "prompted": prompted(comparison),
        "prompt_parts": prompt_parts(comparison),
        **_columns("prompt", davsp.columns(comparison)),
        "transfer": transfer(comparison),
        "safety_layers": safety_layers(comparison),
        "aligned": aligned(comparison),
        **_columns("aligned", tga.columns(comparison)),
        "aligned_shown": SHOWN,
        "aligned_told": CEILING,
        "sweeps": comparison.sweeps,
        "judges": {model: judged(comparison, model) for model in comparison.models},
        "agreed": agreed(comparison),
        "labelled": {model: labelled(comparison, model) for model in comparison.models},
        "samples": samples,
        "at_most": AT_MOST,
        "costs": {model: tables.costs(comparison, model) for model in comparison.models},
        "suites": {
            channel: list(suites)
            for channel, suites in groupby(
                sorted({row["suite"] for row in comparison.metrics} - {ALL}, key=comparison.order),
                comparison.channel_of,
            )
        },
        "context": {title: tables.flat(values) for title, values in comparison.context.items()},
        "images": {
            name: _picture(name, data)
            for name, data in comparison.images.items()
            if name in visible
        },
    }


def _columns(table: str, told: tuple[list[str], list[tuple[str, str]]]) -> dict[str, Any]:
    attacks, costs = told
    return {f"{table}_attacks": attacks, f"{table}_costs": costs}


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        amount=words.amount,
        interval=words.interval,
        change_parts=words.change_parts,
        bounded=words.bounded,
        full=words.full,
        says=says,
        mirrors=mirrors,
        rates=rates,
        setting_cells=setting_cells,
        measured_setting=measured_setting,
        bounds_of=bounds_of,
        by_suite=by_suite,
        picture_uri=_picture,
        svg_uri=lambda text: _data_uri("image/svg+xml", text.encode()),
    )
    return environment


def _picture(name: str, data: bytes) -> str:
    for start, media_type in IMAGE_TYPES.items():
        if data.startswith(start):
            return _data_uri(media_type, data)
    raise ValueError(
        f"the picture of sample {name!r} starts with {data[:4]!r}; PNG, JPEG and "
        "WebP can be shown: encode it as one of them."
    )


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(data).decode()}"
