"""What a run found, as tables for a terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from flows.record import Record
from registry.provenance import Provenance
from registry.publish import Published

Rows = Sequence[Mapping[str, Any]]

HARMLESS = (
    (("lookalike", "over_refusal_upper"), ("benign", "over_refusal_upper")),
    (("benign", "accuracy"), ("lookalike", "accuracy")),
)
"""What a defense may cost; the first of each that was measured stands beside the unsafe answers.
An answer that no judge could tell counts as refused."""
TITLES = {"unsafe_rate": "unsafe", "over_refusal_upper": "over-refused", "accuracy": "accurate"}


def read_channels(root: Path) -> list[dict[str, Any]]:
    """Read reports/channels.json; empty when there is none."""
    path = root / "reports" / "channels.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def result_table(rows: Rows) -> Group:
    """Draw model x defense: what is unsafe by channel and what it costs, all suites together.

    Each share is in percent with its interval; n stands in the head of a column where it is the
    same in all of it.
    """
    cells = {(r["model"], r["defense"], r["channel"], r["metric"]): r for r in rows}
    unsafe = dict.fromkeys((r["channel"], r["metric"]) for r in rows if r["metric"] in TITLES)
    columns = [pair for pair in unsafe if pair[1] == "unsafe_rate"]
    columns += [pair for pairs in HARMLESS for pair in [p for p in pairs if p in unsafe][:1]]
    sizes = {
        pair: {r["n"] for key, r in cells.items() if key[2:] == pair and "n" in r}
        for pair in columns
    }
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("defense", overflow="fold", vertical="top")
    for channel, metric in columns:
        size = sizes[channel, metric]
        lines = [*_halves(channel), *_halves(TITLES[metric])]
        lines += [f"n {min(size)}"] if len(size) == 1 else []
        table.add_column("\n".join(lines), justify="right", overflow="fold")
    for model in dict.fromkeys(r["model"] for r in rows):
        table.add_row(Text(f"\n{model}", "bold"))
        for defense in dict.fromkeys(r["defense"] for r in rows if r["model"] == model):
            shown = (
                _percent(cells.get((model, defense, *pair)), with_n=len(sizes[pair]) > 1)
                for pair in columns
            )
            table.add_row(defense, *shown)
    above = Text("percent with 95 % interval, all suites of a channel together", "dim")
    below = Text("suite by suite, with paired tests: reports/index.html", "dim")
    return Group(above, table, below) if rows else Group()


def _halves(name: str) -> list[str]:
    """Break a long name where it may be broken: numbers are narrower."""
    parts = {
        "text+image": "text+ image", "typographic": "typo- graphic", "adversarial": "adver- sarial",
        "over-refused": "over- refused",
    }  # fmt: skip
    return parts.get(name, name).split()


def _percent(row: Mapping[str, Any] | None, *, with_n: bool) -> str:
    if row is None:
        return ""
    if not _finite(row["value"]):
        return "missing"
    lines = [f"{row['value'] * 100:.1f}"]
    ends: list[Any] = [row.get("low"), row.get("high")]
    if all(map(_finite, ends)):
        lines.append("–".join("100" if end == 1 else f"{end * 100:.1f}" for end in ends))
    if with_n:
        lines.append(f"n {row['n']}")
    return "\n".join(lines)


def _finite(value: Any) -> bool:
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
