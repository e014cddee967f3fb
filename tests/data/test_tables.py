"""Tables of other people: every format gives the same rows, and says where it breaks."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hauberk.data.tables import Row, read_json, read_object, read_rows
from hauberk.errors import BadData

ROWS = [{"id": "a", "text": "one, two"}, {"id": "b", "text": 'a "quote"\nand a line'}]


def csv_of(rows):
    quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
    return "id,text\r\n" + "".join(f'"{a}","{b}"\r\n' for a, b in quoted)


def arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


WRITE = {
    "a.csv": lambda path: path.write_text(csv_of(ROWS), newline=""),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS))),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": lambda path: arrow(path, ROWS),
}


def read(path):
    return list(read_rows(path, path.name))


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITE[name](tmp_path / name)
    rows = read(tmp_path / name)
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.key for row in rows] == ["0", "1"]
    assert all(row.where.startswith(f"{name}, row {index}") for index, row in enumerate(rows))


def test_a_json_object_of_objects_names_its_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"x1": {"a": 1}, "x2": {"a": 2}}')
    assert [(row.key, row.integer("a")) for row in read(tmp_path / "a.json")] == [
        ("x1", 1), ("x2", 2),
    ]  # fmt: skip


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,text\n1,x\n")
    assert read(tmp_path / "a.csv")[0].id("id") == "1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,\xe9t\xe9\n", r"a\.csv, after line \d+: is not UTF-8.*iconv"),
        ("a.json", b'["\xe9"]', r"a\.json, after line 0: is not UTF-8"),
        ("a.csv", b"id,text\n1,a,b\n", r"row 0 \(line 2\): has more cells than the header"),
        ("a.csv", b"id,text\n1,a\n2\n", r"row 1 \(line 3\): has fewer cells than the header"),
        ("a.csv", b'id,text\n1,"open\n', r"a\.csv, line \d: is no CSV.*quote the cell"),
        ("a.csv", b"id,text\n", r"a\.csv: holds no rows; download it again"),
        ("a.csv", b"", r"a\.csv: holds no rows"),
        ("a.csv", b"id,text,id\n1,a,2\n", r"a\.csv, header: .*\['id'\] occur more than once"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, row 1 \(line 2\): is no JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"row 1 \(line 2\): is \[1\]; it must be a JSON object"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: holds no rows"),
        ("a.json", b'{"a": {"b": 1}, "a": {}}', r"the name 'a' occurs more than once"),
        ("a.json", b"3", r"a\.json: is 3; it must be a JSON object or a list"),
        ("a.json", b"[1]", r"a\.json, row 0: is 1; it must be a JSON object"),
        ("a.json", b"[" * 100_000, r"a\.json: is no JSON"),
        ("a.json", b"[]", r"a\.json: holds no rows"),
        ("a.parquet", b"PAR1", r"a\.parquet: is not a Parquet file, or is cut off"),
        ("a.arrow", b"", r"a\.arrow: is not a file of `datasets`, or is cut off"),
        ("a.arrow", b"\xff\xff\xff\xff\x10", r"a\.arrow: is not a file of `datasets`"),
    ],
)
def test_a_broken_table_is_named_with_its_row(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_cut_off_anywhere_is_named(name, tmp_path):
    WRITE[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for kept in range(1, len(whole) - 12, 37):
        (tmp_path / name).write_bytes(whole[:kept])
        with pytest.raises(BadData, match=f"{name}: (is not|holds no rows)"):
            read(tmp_path / name)


def test_a_file_that_is_a_folder_or_is_gone_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    for name in ("a.json", "b.csv"):
        with pytest.raises(BadData, match=f"{name}: cannot be read"):
            read(tmp_path / name)


ROW = Row(
    {
        "text": "x", "empty": "", "blank": " ", "none": None, "number": 3, "digits": "-4",
        "dashes": "--4", "between": "4-4", "vast": "4" * 5000,
        "yes": True, "True": "True", "texts": ["a", ""], "mixed": ["a", 1], "object": {"a": 1},
        "objects": [{"a": 1}], "json": '{"a": 2}', "long": "y" * 999,
    },
    "some.csv, row 7",
    "7",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "column", "value"),
    [
        ("text", "text", "x"),
        ("optional", "none", ""),
        ("optional", "nowhere", ""),
        ("id", "number", "3"),
        ("id", "text", "x"),
        ("integer", "digits", -4),
        ("any_text", "blank", " "),
        ("any_text", "empty", ""),
        ("integer", "number", 3),
        ("flag", "yes", True),
        ("flag", "True", True),
        ("texts", "texts", ["a", ""]),
    ],
)
def test_a_row_hands_out_what_is_asked_of_it(kind, column, value):
    assert getattr(ROW, kind)(column) == value


def test_a_row_hands_out_rows_of_its_own():
    assert ROW.row("object").integer("a") == 1
    assert ROW.row("json").integer("a") == 2
    (inner,) = ROW.rows("objects")
    with pytest.raises(BadData, match=r"some\.csv, row 7, objects\[0\]: has no column 'b'"):
        inner.text("b")


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("text", ["empty", "blank", "none", "number", "nowhere"]),
        ("id", ["empty", "none", "yes", "object", "nowhere"]),
        ("integer", ["text", "none", "yes", "nowhere", "dashes", "between", "vast"]),
        ("any_text", ["none", "number", "texts", "nowhere"]),
        ("flag", ["text", "number", "none", "nowhere"]),
        ("texts", ["text", "mixed", "none", "nowhere"]),
        ("rows", ["texts", "object", "none", "nowhere"]),
        ("row", ["text", "texts", "none", "nowhere"]),
        ("picture", ["text", "none", "number", "object", "nowhere"]),
    ],
)
def test_a_row_says_where_it_stands_when_it_cannot(kind, columns):
    for column in columns:
        message = rf"some\.csv, row 7: .*'{column}'.*correct the file, or download it again"
        with pytest.raises(BadData, match=message):
            getattr(ROW, kind)(column)


def test_a_message_does_not_drown_in_the_value():
    with pytest.raises(BadData) as told:
        ROW.integer("long")
    assert len(str(told.value)) < 200


def test_a_table_of_pictures_is_not_held_whole(tmp_path):
    """50 MB of them, of which a few rows are in Python's hands at a time."""
    rows = [{"image": {"bytes": bytes([i]) * 500_000}} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    del rows
    tracemalloc.start()
    sizes = [len(row.picture("image").encoded()) for row in read_rows(tmp_path / "a.parquet", "a")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [500_000] * 100
    assert peak < 25 * 2**20


def test_json_that_is_no_table_can_be_read_whole(tmp_path):
    (tmp_path / "a.json").write_text('{"train": ["1"], "n": 3}')
    assert read_json(tmp_path / "a.json", "a") == {"train": ["1"], "n": 3}
    assert read_object(tmp_path / "a.json", "a") == {"train": ["1"], "n": 3}


def test_json_that_must_be_an_object_is_no_list(tmp_path):
    (tmp_path / "a.json").write_text("[[1, 2]]")
    with pytest.raises(BadData, match=r"a\.json: is \[\[1, 2\]\]; it must be a JSON object"):
        read_object(tmp_path / "a.json", "a.json")
