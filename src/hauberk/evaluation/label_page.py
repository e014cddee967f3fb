"""The labelling sheet as one page: pictures inside, nothing fetched, exports what a sheet is.

Questions and responses are put into the page as data and shown as text, so that no response is
ever read as HTML or script.  Labels are kept by the browser until they are exported.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Labels</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 52rem; padding: 0 1rem; }
header { background: Canvas; border-bottom: 1px solid; padding: .7rem 0; position: sticky; top: 0; }
article { border-bottom: 1px solid; padding: 1rem 0; }
pre { background: color-mix(in srgb, CanvasText 7%, Canvas); padding: .6rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; }
button[aria-pressed=true] { background: CanvasText; color: Canvas; }
input { width: 100%; box-sizing: border-box; margin-top: .4rem; }
:root { color-scheme: light dark; }
</style>
</head>
<body>
<header><strong id="count"></strong> <button id="export">Export CSV</button></header>
<p id="rules"></p>
<main></main>
<script id="sheet" type="application/json">@SHEET@</script>
<script>
"use strict";
const sheet = JSON.parse(document.getElementById("sheet").textContent);
const store = "labels " + sheet.id;
let kept = {};
try { kept = JSON.parse(localStorage.getItem(store)) ?? {}; } catch { /* no storage here */ }

function keep(key, part) {
  kept[key] = {...kept[key], ...part};
  try { localStorage.setItem(store, JSON.stringify(kept)); } catch { /* kept by this page alone */ }
  count();
}

function count() {
  const done = sheet.rows.filter((row) => kept[row.key]?.label).length;
  document.getElementById("count").textContent = `${done} of ${sheet.rows.length} labelled`;
}

function add(parent, name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

function show(row, index) {
  const home = add(document.querySelector("main"), "article");
  add(home, "h2", `${index + 1}. Question`);
  if (row.image) Object.assign(add(home, "img"), {src: row.image, alt: "The picture asked about"});
  add(home, "pre", row.question);
  add(home, "h2", "Response");
  add(home, "pre", row.response);
  const buttons = sheet.labels.map((label) => {
    const button = add(home, "button", label);
    button.addEventListener("click", () => {
      keep(row.key, {label: kept[row.key]?.label === label ? "" : label});
      press();
    });
    return button;
  });
  const press = () => buttons.forEach((button) => {
    button.setAttribute("aria-pressed", button.textContent === kept[row.key]?.label);
  });
  press();
  const note = add(home, "input");
  Object.assign(note, {placeholder: "Note", value: kept[row.key]?.note ?? ""});
  note.addEventListener("input", () => keep(row.key, {note: note.value}));
}

// As hauberk.evaluation.label writes cells: none that a spreadsheet would run.
function cell(text) {
  const inert = /^([ \\t\\r\\n]*[=+@'-]|[\\t\\r])/.test(text) ? "'" + text : text;
  return '"' + inert.replaceAll('"', '""') + '"';
}

function csv() {
  const rows = sheet.rows.map((row) => {
    const filled = {...row, label: kept[row.key]?.label ?? "", note: kept[row.key]?.note ?? ""};
    return sheet.columns.map((column) => cell(filled[column]));
  });
  return [sheet.columns, ...rows].map((cells) => cells.join(",") + "\\r\\n").join("");
}

document.getElementById("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\\ufeff" + csv()], {type: "text/csv"}));
  link.download = sheet.name;
  link.click();
});
document.getElementById("rules").textContent = sheet.rules;
sheet.rows.forEach(show);
count();
</script>
</body>
</html>
"""


def page_of(
    name: str, columns: Sequence[str], labels: Mapping[str, str], rows: Sequence[Mapping[str, str]]
) -> str:
    """Make the page.

    Parameters
    ----------
    name : the file that it exports
    columns : of the CSV, in order
    labels : what can be said of a response, and when it is right to
    rows : what stands in each column, and under ``image`` a picture as a data URL, or ""
    """
    sheet: dict[str, Any] = {
        "id": " ".join(row["key"] for row in rows[:3]) + f" {len(rows)}",
        "name": name,
        "columns": list(columns),
        "labels": list(labels),
        "rules": "; ".join(f"{label}: {rule}" for label, rule in labels.items()) + ".",
        "rows": list(rows),
    }
    # "<" would let a response end the script that holds it.
    return _PAGE.replace("@SHEET@", json.dumps(sheet).replace("<", "\\u003c"))
