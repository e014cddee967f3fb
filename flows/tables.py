"""What a run found, as tables for a terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from flows.record import Record
from registry.provenance import Provenance
from registry.publish import Published

Rows = Sequence[Mapping[str, Any]]

RATES = {
    "unsafe_rate": "unsafe",
    "refusal_rate": "refused",
    "accuracy": "accurate",
    "over_refusal": "over-refused",
}


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """Read reports/metrics.json; empty when there is none."""
    path = root / "reports" / "metrics.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def result_table(rows: Rows) -> Table:
    """Draw model x suite x defense: each rate in percent with its interval, and n."""
    shown = [(m, title) for m, title in RATES.items() if any(r["metric"] == m for r in rows)]
    table = Table(title="percent with 95 % interval", title_justify="left", title_style="dim")
    for column in ("model", "suite", "defense"):
        table.add_column(column, no_wrap=True)
    table.add_column("n", justify="right")
    for _, title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    cells = {(r["model"], r["suite"], r["defense"], r["metric"]): r for r in rows}
    order = list(dict.fromkeys((r["model"], r["suite"]) for r in rows))
    before: tuple[str, str] | None = None
    for model, suite in order:
        for defense in dict.fromkeys(r["defense"] for r in rows if r["model"] == model):
            found = [cells.get((model, suite, defense, metric)) for metric, _ in shown]
            if not any(found):
                continue
            new = before != (model, suite)
            if new and before is not None:
                table.add_section()
            before = (model, suite)
            n = max((r["n"] for r in found if r and r.get("n") is not None), default="")
            names = (model, suite) if new else ("", "")
            table.add_row(*names, defense, str(n), *map(_percent, found))
    return table


def _percent(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if not _finite(row["value"]):
        return "missing"
    ends = [row.get("low"), row.get("high")]
    interval = f" [{ends[0] * 100:.1f}, {ends[1] * 100:.1f}]" if all(map(_finite, ends)) else ""
    return f"{row['value'] * 100:.1f}{interval}"


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plan_table(planned: Mapping[str, tuple[str, list[str]]]) -> Table:
    """Draw each stage with its state and why."""
    styles = {"unchanged": "dim", "stale": "yellow", "follows": "cyan"}
    table = Table.grid(padding=(0, 2))
    for name, (state, reasons) in planned.items():
        more = f" (+{len(reasons) - 3} more)" if len(reasons) > 3 else ""
        why = "; ".join(reasons[:3]) + more
        table.add_row(Text(name), Text(state, styles[state]), Text(why, "dim"))
    return table


def record_lines(record: Record) -> list[Text]:
    """Say what was published, what is in production, and when it was loaded to get there."""
    lines = [_published(item) for item in record.published]
    for item in record.promoted:
        was = f", before it {item.replaced}" if item.moved else ""
        line = Text(f"{item.name}: version {item.version} is in production{was}", "green")
        if item.loaded.get("ok"):
            took = item.loaded.get("seconds")
            line.append(f"; loaded in a clean process in {took} s", "green")
            line.append(f" ({item.loaded.get('at')})", "dim")
            line.append(f", it answered {item.loaded.get('with')!r}", "dim")
        lines.append(line)
    return lines


def _published(item: Published) -> Text:
    how = "published" if item.created else "was published before"
    return Text(f"{item.name}: version {item.version} {how} (lineage {item.key[:12]})", "dim")


def provenance_tree(seen: Provenance) -> Tree:
    """Draw version -> evaluation -> bundle -> data."""
    aliases = f" @{', @'.join(seen.aliases)}" if seen.aliases else ""
    tree = Tree(Text(f"{seen.name}/{seen.version}{aliases}", "bold"))
    tags = seen.tags
    tree.add(Text(f"lineage   {tags.get('lineage.key', '')}"))
    dirty = {"true": " (with changes)", "false": ""}.get(tags.get("git.dirty", ""), " (unknown)")
    tree.add(Text(f"git       {tags.get('git.commit', '')}{dirty}"))
    tree.add(Text(f"snapshot  {tags.get('git.snapshot', '')}"))
    tree.add(Text(f"bundle    {tags.get('bundle.sha256', '')}"))
    for key in ("gate", "promotion", "rolled_back"):
        if key in tags:
            tree.add(Text(f"{key:<9} {tags[key]}"))
    stages = tree.add(Text("made by", "bold"))
    shown: set[str] = set()
    for root in seen.roots:
        _branch(stages, seen, root, shown)
    return tree


def _branch(above: Tree, seen: Provenance, stage: str, shown: set[str]) -> None:
    again = stage in shown
    node = above.add(Text(f"{stage}{'  (see above)' if again else ''}", "cyan"))
    if again:
        return
    shown.add(stage)
    entry = seen.stages[stage]
    for path, value in entry["outs"].items():
        node.add(Text(f"-> {path}  {value[:12]}", "green"))
    upstream = seen.upstream(stage)
    made = [out for name in upstream for out in seen.stages[name]["outs"]]
    for path, value in entry["deps"].items():
        if path not in made:
            node.add(Text(f"{path}  {value[:12]}", "dim"))
    for name in upstream:
        _branch(node, seen, name, shown)
