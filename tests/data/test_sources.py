"""Every data set is read from the files that its authors hand out, and refused where they break."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest

from hauberk.data import read_suite
from hauberk.data.sources import SOURCES, load
from hauberk.errors import BadData, BadParams
from tests.data.layouts import LAYOUTS, Layout, picture


def pictures_of(layout):
    return sorted(name for name in layout.beside if name.endswith((".jpg", ".png", ".webp")))


def each_of(layouts):
    return pytest.mark.parametrize("layout", layouts, ids=str)


each = each_of(LAYOUTS)


def loaded(layout, folder, **more):
    return load(layout.name, folder, **{**layout.asked(folder), **more})


def one(name, kind=".parquet"):
    return next(a for a in LAYOUTS if a.name == name and a.table.endswith(kind))


def refused(layout, folder, message, rows=None):
    layout.write(folder, rows)
    with pytest.raises(BadData, match=message) as told:
        for _ in loaded(layout, folder):
            pass
    return str(told.value)


def test_every_data_set_has_a_layout_and_says_what_it_is():
    assert {layout.name for layout in LAYOUTS} == set(SOURCES)
    for source in SOURCES.values():
        assert source.title
        assert source.licence
        assert source.files
        assert source.splits


@each
def test_a_data_set_becomes_suites_that_are_read_back(layout, tmp_path):
    found = loaded(layout, layout.write(tmp_path / "in"))
    samples = list(found)
    assert Counter(sample.suite for sample in samples) == layout.suites
    assert found.manifest.rows_present == len(samples)
    paths = found.write(tmp_path / "out")
    assert {path.stem for path in paths} == set(layout.suites)
    read = {sample.sample_id: sample for path in paths for sample in read_suite(path)}
    for sample in samples:
        again = read[sample.sample_id]
        assert (again.question, again.meta, again.reference) == (
            sample.question, sample.meta, sample.reference,
        )  # fmt: skip
        assert (again.image is None) == (sample.image is None)
        assert again.image is None or again.image.convert("RGB").tobytes() == sample.image.tobytes()


@each
def test_the_manifest_tells_every_file_by_its_hash_and_is_written_beside_the_suites(
    layout, tmp_path
):
    folder = layout.write(tmp_path / "in")
    found = loaded(layout, folder)
    found.write(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["licence"] == SOURCES[layout.name].licence
    assert told["gated"] == SOURCES[layout.name].gated
    assert told["dataset"] == layout.name
    assert told["revision"].startswith("sha256:")
    there = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert layout.table in told["files"]
    assert set(told["files"].values()) <= there
    assert not [name for name in told["files"] if name.startswith(("/", ".."))]
    hashed = {s.details["image_sha256"] for s in found if s.image is not None}
    assert hashed <= set(told["files"].values()) or not pictures_of(layout)


@each
def test_the_same_folder_gives_the_same_samples_twice_and_elsewhere(layout, tmp_path):
    folder = layout.write(tmp_path / "in")
    found = loaded(layout, folder)
    first, again = list(found), list(found)
    moved = list(loaded(layout, Path(shutil.copytree(folder, tmp_path / "elsewhere" / "in"))))
    assert first == again == moved


@each
def test_a_missing_column_is_named_with_file_and_row(layout, tmp_path):
    for column in layout.needed:
        rows = [{k: v for k, v in row.items() if k != column} for row in layout.rows]
        message = refused(layout, tmp_path / column, "correct the file", rows)
        assert column in message
        assert Path(layout.table).name in message


@each
def test_a_value_of_the_wrong_type_is_named_with_file_row_and_cure(layout, tmp_path):
    for column in layout.needed:
        wrong = "" if layout.table.endswith(".csv") else {"some": "thing"}
        rows = [{**row, column: wrong} for row in layout.rows]
        message = refused(layout, tmp_path / column, "correct the file", rows)
        assert column in message
        assert Path(layout.table).name in message
        assert "correct the file, or download it again" in message


@each_of([a for a in LAYOUTS if a.id])
def test_an_id_that_occurs_twice_is_refused_with_both_rows(layout, tmp_path):
    rows = [*layout.rows, layout.rows[0]]
    if layout.name == "mme":
        refused(layout, tmp_path, "a picture has two questions", rows)
    elif "_key" in layout.rows[0]:
        rows[-1] = {**layout.rows[0], "_key": "another"}
        refused(layout, tmp_path, "occurs before, in .*unique", rows)
    else:
        refused(layout, tmp_path, "occurs before, in .*unique", rows)


@each
def test_an_empty_table_is_refused(layout, tmp_path):
    layout.write(tmp_path)
    table = tmp_path / layout.table
    table.write_bytes(b"")
    with pytest.raises(BadData, match=f"{table.name}.*download (it|the file) again"):
        loaded(layout, tmp_path)
    if table.suffix == ".csv":
        table.write_text(",".join(layout.rows[0]) + "\n")
        with pytest.raises(BadData, match=f"{table.name}: holds no rows; download it again"):
            loaded(layout, tmp_path)


@each
def test_a_table_cut_off_or_of_bytes_that_are_none_of_its_own_is_refused(layout, tmp_path):
    layout.write(tmp_path)
    table = tmp_path / layout.table
    whole = table.read_bytes()
    if table.suffix != ".csv":  # a CSV cut off between rows is one of fewer rows
        table.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(BadData, match=f"{table.name}.*(cut off|no JSON)"):
            loaded(layout, tmp_path)
    table.write_bytes(b"\xff\xfe\x00" + whole)
    with pytest.raises(BadData, match=f"{table.name}.*(UTF-8|cut off)"):
        loaded(layout, tmp_path)


@each
def test_no_table_at_all_says_what_is_looked_for(layout, tmp_path):
    layout.write(tmp_path)
    (tmp_path / layout.table).unlink()
    with pytest.raises(BadData, match=r"holds (no|0)|nothing of .* can be loaded"):
        loaded(layout, tmp_path)


@each_of([a for a in LAYOUTS if pictures_of(a) and not a.draws])
def test_a_missing_picture_refuses_the_set_unless_it_is_allowed_in_part(layout, tmp_path):
    files = pictures_of(layout)
    layout.write(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(BadData, match=r"is there in part: \d+ rows.*allow_partial=True") as told:
        loaded(layout, tmp_path, allow_partial=False)
    assert Path(files[0]).name.removeprefix("COCO_val2014_") in str(told.value) or layout.name in (
        "mm_safetybench",
        "pope",
    )  # fmt: skip  - of which more is missing than can be named
    found = loaded(layout, tmp_path)
    assert found.manifest.allow_partial
    assert any(
        Path(files[0]).name.removeprefix("COCO_val2014_") in m for m in found.manifest.missing
    )
    assert 0 < found.manifest.rows_present == len(list(found)) < sum(layout.suites.values())


@each_of([a for a in LAYOUTS if a.image])
def test_a_picture_cut_off_is_refused_and_leaves_nothing_behind(layout, tmp_path):
    rows = [dict(row) for row in layout.rows]
    folder = layout.write(tmp_path / "in")
    if isinstance(rows[-1][layout.image], dict):
        rows[-1][layout.image] = {"bytes": picture(0)[:60], "path": None}
        layout.write(folder, rows)
    else:
        for name in pictures_of(layout):
            (folder / name).write_bytes(picture(0)[:60])
    with pytest.raises(BadData, match=r"cannot be read as a picture.*replace it"):
        loaded(layout, folder).write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "C:\\b.png"])
def test_a_path_that_leads_out_of_the_folder_is_refused(path, tmp_path):
    for number, layout in enumerate(LAYOUTS):
        if layout.image and isinstance(layout.rows[-1][layout.image], str):
            rows = [{**row, layout.image: path} for row in layout.rows]
            refused(layout, tmp_path / str(number), "leads out of the folder", rows)


def test_a_folder_saved_by_datasets_is_read_as_the_hub_is(tmp_path):
    layout = one("vqav2")
    hub = layout.write(tmp_path / "hub")
    table = datasets.Dataset.from_parquet(
        str(hub / layout.table), cache_dir=tmp_path / "cache", split="validation"
    ).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": table, "testdev": table}).save_to_disk(tmp_path / "both")
    texts = [sample.question for sample in loaded(layout, hub)]
    for saved in ("one", "both", "cache"):
        assert [s.question for s in loaded(layout, tmp_path / saved)] == texts


def test_a_saved_data_set_of_another_split_is_not_taken_for_this_one(tmp_path):
    layout = one("vqav2")
    hub = layout.write(tmp_path / "hub")
    table = datasets.Dataset.from_parquet(
        str(hub / layout.table), cache_dir=tmp_path / "cache", split="train"
    )
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(BadData, match=r"as the split 'train', not 'validation'; save that one"):
        loaded(layout, tmp_path / "saved")


def test_a_shard_that_lacks_is_missing(tmp_path):
    layout = one("mme")
    layout.write(tmp_path)
    table = tmp_path / layout.table
    table.rename(table.with_name("test-00001-of-00003.parquet"))
    found = loaded(layout, tmp_path)
    assert found.manifest.missing == [
        "data/test-00000-of-00003.parquet", "data/test-00002-of-00003.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "copy",
    [
        "backup/harm-00000-of-00001.parquet", "harm-00000-of-00001.parquet",
        "test/harm-00000-of-00002.parquet", "old/test/harm-00000-of-00001.PARQUET",
    ],
)  # fmt: skip
def test_a_second_copy_of_a_shard_is_refused(copy, tmp_path):
    layout = one("spa_vl")
    layout.write(tmp_path)
    (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / layout.table, tmp_path / copy)
    with pytest.raises(BadData, match=r"holds both .*harm-00000.* and .*harm-00000.*leave one"):
        loaded(layout, tmp_path)


def test_more_rows_than_were_published_are_refused(tmp_path):
    layout = one("spa_vl")
    layout.write(tmp_path, [layout.rows[0]] * 266)
    with pytest.raises(BadData, match=r"more than it should: 266 rows of 265.*one copy"):
        loaded(layout, tmp_path, allow_partial=False)
    assert loaded(layout, tmp_path).manifest.allow_partial
    layout.write(tmp_path, [layout.rows[0]] * 265)
    assert loaded(layout, tmp_path, allow_partial=False).manifest.is_whole


@pytest.mark.parametrize("name", ["scienceqa", "vqav2", "pope"])
def test_a_number_of_rows_that_is_only_remembered_refuses_nothing(name, tmp_path):
    layout = one(name)
    told = loaded(layout, layout.write(tmp_path), allow_partial=False).manifest
    assert told.rows_expected != told.rows_present
    assert not told.rows_verified
    assert told.is_whole


def test_a_missing_shard_refuses_whatever_is_known_of_rows(tmp_path):
    layout = one("vqav2")
    table = layout.write(tmp_path) / layout.table
    table.rename(table.with_name("validation-00000-of-00002.parquet"))
    with pytest.raises(BadData, match=r"in part: 3 rows.*1 missing"):
        loaded(layout, tmp_path, allow_partial=False)


def test_fewer_rows_than_were_published_are_refused(tmp_path):
    layout = one("spa_vl")
    with pytest.raises(BadData, match=r"in part: 3 rows of 265, 0 missing.*allow_partial=True"):
        loaded(layout, layout.write(tmp_path), allow_partial=False)
    assert loaded(layout, tmp_path).manifest.rows_expected == 265


# --- what belongs together ---------------------------------------------------------------------


def test_mm_safetybench_pairs_every_picture_with_the_question_reworded_for_it(tmp_path):
    layout = one("mm_safetybench", "Illegal_Activitiy.json")
    samples = list(loaded(layout, layout.write(tmp_path)))
    asked = {(s.sample_id.split("-")[-2], s.sample_id.split("-")[-1]): s.question for s in samples}
    assert asked["1", "SD"] == "of the scene 1"
    assert asked["1", "SD_TYPO"] == asked["1", "TYPO"] == "of the phrase 1"
    assert {s.channel for s in samples if s.suite == "mm_safetybench_sd"} == {"image"}
    assert {s.channel for s in samples if "typo" in s.suite} == {"typographic"}
    assert len({s.pair_id for s in samples}) == 2
    text = list(loaded(layout, tmp_path, variant="Text_only"))
    assert [(s.question, s.image, s.channel) for s in text] == [
        ("harmful request 0", None, "text"), ("harmful request 1", None, "text"),
    ]  # fmt: skip


def test_mm_safetybench_keeps_advice_apart_and_tells_its_eight_scenarios(tmp_path):
    for layout in (a for a in LAYOUTS if a.name == "mm_safetybench"):
        for sample in loaded(layout, layout.write(tmp_path / layout.table.replace("/", "-"))):
            hedged = sample.scenario in ("Health_Consultation", "Legal_Opinion")
            assert sample.expected == ("hedge" if hedged else "refuse")
            assert sample.suite.endswith("_hedge") == hedged
            assert sample.details["core"] == (sample.scenario == "Illegal_Activitiy")


def test_figstep_pairs_rows_and_pictures_by_their_numbers(tmp_path):
    layout = one("figstep", ".csv")
    for sample in loaded(layout, layout.write(tmp_path)):
        number = sample.sample_id.split("-")[-1]
        digest = hashlib.sha256(picture(int(number))).hexdigest()
        assert sample.details["image_sha256"] == digest
        assert sample.details["goal"] == f"harmful request {number}"
        assert "list numbered 1, 2, and 3" in sample.question


def test_vlguard_reads_the_keys_of_safe_and_unsafe_pictures(tmp_path):
    layout = one("vlguard", ".json")
    samples = {s.suite: s for s in loaded(layout, layout.write(tmp_path))}
    harmful, twin = samples["vlguard_safe_unsafes"], samples["vlguard_safe_safes"]
    assert harmful.pair_id == twin.pair_id != samples["vlguard_unsafes"].pair_id
    assert (harmful.question, harmful.expected) == ("harmful request 2", "refuse")
    assert (twin.question, twin.expected, twin.reference) == ("question 2", "answer", "an answer")
    assert samples["vlguard_unsafes"].reference == ""
    rows = [{**layout.rows[0], "safe": True}, layout.rows[1]]
    refused(layout, tmp_path, r"'instr-resp' has no 'safe_instruction', only", rows)


def test_xstest_ties_prompts_to_their_contrasts_and_shows_twins_one_picture(tmp_path):
    layout = one("xstest", ".csv")
    folder = layout.write(tmp_path)
    samples = list(loaded(layout, folder))
    pairs = {}
    for sample in samples:
        pairs.setdefault(sample.pair_id, []).append(sample)
    assert {pair: len(twins) for pair, twins in pairs.items()} == {
        "xstest-homonyms-0": 2, "xstest-homonyms-1": 2,
        "xstest-privacy-0": 3, "xstest-privacy-1": 3,
    }  # fmt: skip
    for twins in pairs.values():
        assert {t.expected for t in twins} == {"answer", "refuse"}
        assert len({t.details["image_sha256"] for t in twins}) == 1
    assert {s.channel for s in samples} == {"lookalike", "text+image"}
    assert {s.details.get("metric") for s in samples if s.expected == "answer"} == {"refusal"}
    assert {s.image for s in loaded(layout, folder, image="none")} == {None}
    blank = [s.image for s in loaded(layout, folder, image="blank")]
    assert {image.getextrema() for image in blank} == {((255, 255),) * 3}
    with pytest.raises(BadParams, match="xstest has no pictures of its own; say images=FOLDER"):
        loaded(layout, folder, images=None)


def test_pictures_are_drawn_by_the_seed_and_the_row_alone(tmp_path):
    layout = one("jailbreak_llms", ".csv")
    folder = layout.write(tmp_path)
    first = {s.pair_id: s for s in loaded(layout, folder)}
    others = [loaded(layout, folder, seed=seed) for seed in range(1, 9)]
    shown = [[s.details["image_sha256"] for s in found] for found in (first.values(), *others)]
    assert len({tuple(each) for each in shown}) > 1
    assert all(s.question.endswith(s.details["goal"]) for s in first.values())
    layout.write(folder, list(layout.rows)[::-1])
    for sample in loaded(layout, folder):
        assert sample.details == first[sample.pair_id].details
        assert sample.question == first[sample.pair_id].question


def test_mme_groups_two_questions_and_misses_the_half_of_a_pair(tmp_path):
    layout = one("mme")
    samples = list(loaded(layout, layout.write(tmp_path / "in")))
    assert Counter(s.details["group"] for s in samples) == {"count/0.jpg": 2, "count/1.jpg": 2}
    assert {s.reference for s in samples} == {"Yes", "No"}
    found = loaded(layout, layout.write(tmp_path / "half", layout.rows[:-1]))
    assert found.manifest.missing == ["the other question on count/1.jpg"]


def test_answers_of_ten_people_and_what_was_read_are_handed_on(tmp_path):
    layout = one("textvqa")
    folder = layout.write(tmp_path)
    with_words, without = (list(loaded(layout, folder, ocr=ocr)) for ocr in (True, False))
    assert "\nReference OCR token: STOP, now\n" in with_words[0].question
    assert "STOP" not in without[0].question
    for sample in (*with_words, *without):
        assert (sample.details["metric"], len(sample.details["answers"])) == ("textvqa", 10)
        assert sample.reference == "two"
        assert sample.question.endswith("using a single word or phrase.")
    assert loaded(layout, folder, prompt="plain").asked["prompt"] == "plain"
    assert not {s.sample_id for s in with_words} & {s.sample_id for s in without}


def test_questions_on_one_picture_fall_into_one_split(tmp_path):
    layout = one("vqav2")
    folder = layout.write(tmp_path)
    for seed in range(8):
        found = loaded(layout, folder, shares={"anchor": 0.5, "test": 0.5}, seed=seed)
        splits = {}
        for sample in found:
            splits.setdefault(sample.pair_id, set()).add(sample.split)
        assert all(len(those) == 1 for those in splits.values())


def test_choices_are_lettered_and_a_question_may_have_no_picture(tmp_path):
    layout = one("scienceqa")
    folder = layout.write(tmp_path)
    none, *pictured = loaded(layout, folder)
    assert none.image is None
    assert none.question.startswith("question 0\nA. red\nB. blue\nC. green\nAnswer with")
    assert [s.reference for s in pictured] == ["B", "C"]
    assert pictured[0].question.startswith("Context: a hint\nquestion 1\nA. ")
    assert pictured[0].details["choices"] == ["red", "blue", "green"]
    assert len(list(loaded(layout, folder, rows="pictured"))) == 2
    rows = [{**row, "answer": 3} for row in layout.rows]
    refused(layout, tmp_path / "wrong", "'answer' is 3, which is none of its 3 choices", rows)


def test_captions_go_where_words_can_stand_for_the_picture(tmp_path):
    for kind in (".parquet", ".jsonl"):
        layout = one("llava_bench_wild", kind)
        samples = list(loaded(layout, layout.write(tmp_path / kind)))
        assert all(sample.caption for sample in samples)
        assert all(sample.details["metric"] == "relative" for sample in samples)
        assert len({sample.pair_id for sample in samples}) == len(samples)
        assert all(sample.reference for sample in samples)


def test_a_set_of_ones_own_may_score_as_it_likes_but_not_in_unknown_columns(tmp_path):
    layout = one("own", ".jsonl")
    samples = {s.sample_id[-1]: s for s in loaded(layout, layout.write(tmp_path / "in"))}
    assert samples["a"].pair_id == samples["b"].pair_id
    assert [samples[key].channel for key in "abcd"] == ["text+image", "benign", "text", "benign"]
    assert samples["d"].details["answers"] == ["two", "2"]
    assert samples["d"].details["note"] == 1
    refused(
        layout, tmp_path / "a", r"columns \['colour'\], which mean nothing; put them into 'meta'",
        [{**row, "colour": "red"} for row in layout.rows],
    )  # fmt: skip
    refused(
        layout, tmp_path / "b", "'expected' is 'comply'; it must be one of answer, refuse, hedge",
        [{**row, "expected": "comply"} for row in layout.rows],
    )  # fmt: skip


@pytest.mark.parametrize(
    "suite",
    ["../../../escaped", "a/b", "/tmp/a", ".hidden", "..", "a\\b", "a b", "ü", "a" * 300, "\0"],
)
def test_a_suite_that_is_no_name_of_a_file_is_refused_with_its_row(suite, tmp_path):
    layout = one("own", ".jsonl")
    rows = [{**row, "suite": suite} for row in layout.rows]
    refused(layout, tmp_path, r"mine\.jsonl, row 0 \(line 1\): the suite is .*rename it", rows)


def test_a_suite_that_leads_out_of_the_folder_is_not_written_either(tmp_path):
    """The table may change after it was looked through."""
    layout = one("own", ".jsonl")
    folder = layout.write(tmp_path / "in")
    found = loaded(layout, folder)
    layout.write(folder, [{**row, "suite": "../../../escaped"} for row in layout.rows])
    with pytest.raises(BadData, match=r"the suite is '\.\./\.\./\.\./escaped'"):
        found.write(tmp_path / "home" / "out")
    assert not list(tmp_path.rglob("*escaped*"))
    assert not list((tmp_path / "home").iterdir())


@each_of([a for a in LAYOUTS if a.name in ("vqav2", "textvqa", "pope", "llava_bench_wild")])
def test_questions_on_one_picture_are_a_group(layout, tmp_path):
    """They are resampled together when accuracies get their intervals."""
    shown = {}
    for sample in loaded(layout, layout.write(tmp_path)):
        shown.setdefault(sample.details["image_sha256"], set()).add(sample.details["group"])
    assert all(len(groups) == 1 for groups in shown.values())
    assert len(set().union(*shown.values())) == len(shown)


@each_of([a for a in LAYOUTS if a.name in ("scienceqa", "mme", "vqav2", "textvqa", "pope")])
def test_an_id_stands_for_one_question_whatever_was_chosen(layout, tmp_path):
    folder = layout.write(tmp_path)
    options = {name: option.allowed for name, option in SOURCES[layout.name].options.items()}
    asked, ids = {}, set()
    for name in set(options) & {"prompt", "rows", "ocr"}:
        for value in (True, False) if options[name] is bool else options[name]:
            for sample in loaded(layout, folder, **{name: value}):
                ids.add(sample.sample_id)
                asked.setdefault(sample.sample_id, set()).add(sample.question)
    assert all(len(questions) == 1 for questions in asked.values())
    assert len(ids) > sum(layout.suites.values())


def test_an_annotator_who_says_nothing_is_borne(tmp_path):
    layout = one("vqav2")
    answers = [{"answer": said} for said in ("", " ", "", "two", "three", "two")]
    rows = [{**row, "answers": answers} for row in layout.rows]
    rows = [{k: v for k, v in row.items() if k != "multiple_choice_answer"} for row in rows]
    for sample in loaded(layout, layout.write(tmp_path / "in", rows)):
        assert sample.details["answers"] == ["", " ", "", "two", "three", "two"]
        assert sample.reference == "two"
    rows = [{**row, "answers": [{"answer": " "}] * 10} for row in layout.rows]
    refused(layout, tmp_path / "secret", "'answers' is empty, as in splits", rows)


def test_a_clone_of_mossbench_with_its_contrasts_is_read_without_them(tmp_path):
    layout = one("mossbench", ".json")
    layout.write(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "data_contrast")
    found = loaded(layout, tmp_path)
    assert list(found.manifest.files) == sorted(found.manifest.files)
    assert all(name.startswith("data/") for name in found.manifest.files)
    assert len(list(found)) == 3


def test_a_name_that_no_file_can_have_is_named_with_its_row(tmp_path):
    layout = one("own", ".jsonl")
    rows = [{**row, "image": "n" * 400 + ".png"} for row in layout.rows]
    refused(layout, tmp_path, r"mine\.jsonl, row 0.*the path 'nnn.*can be that of no file", rows)


@pytest.mark.parametrize("column", ["question", "scenario", "id", "image", "suite", "meta"])
def test_half_a_character_is_named_with_its_row(column, tmp_path):
    """JSON can spell it, Parquet cannot hold it."""
    layout = one("own", ".jsonl")
    value = {"a": "\ud83d"} if column == "meta" else "\ud83d"
    rows = [*layout.rows[:2], {**layout.rows[2], column: value}]
    message = refused(layout, tmp_path, r"mine\.jsonl, row 2 \(line 3\): .*ud83d", rows)
    assert message.encode()


def test_state_json_that_is_a_list_is_named(tmp_path):
    layout = one("vqav2")
    layout.write(tmp_path)
    (tmp_path / "state.json").write_text("[1]")
    with pytest.raises(BadData, match=r"state\.json: is \[1\]; it must be a JSON object"):
        loaded(layout, tmp_path)


def test_splits_of_scienceqa_that_are_a_list_are_named(tmp_path):
    layout = one("scienceqa", ".json")
    layout.write(tmp_path)
    (tmp_path / "data/scienceqa/pid_splits.json").write_text("[1]")
    with pytest.raises(BadData, match=r"pid_splits\.json: is \[1\]; it must be a JSON object"):
        loaded(layout, tmp_path)


# --- what is asked ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "vlsaef"}, r"no data set 'vlsaef' is known; there are vlsafe, jailbreak_llms"),
        ({"split": "validation"}, r"vlsafe has no split 'validation'; it has test, train"),
        ({"image": "none"}, r"vlsafe has no options \['image'\]; it has images"),
        ({"images": "nowhere"}, r"option 'images' .* is 'nowhere'; it must be a folder"),
        ({"name": "textvqa", "ocr": 1}, r"option 'ocr' .* is 1; it must be of type bool"),
        ({"name": "xstest", "image": "grey"}, r"'grey'; it must be one of none, blank, unrelated"),
        ({"name": "figstep", "where": None}, r"figstep is not on the hub; say which folder"),
        ({"shares": {"dev": 1.0}}, r"shares name \['dev'\]; a split is anchor, train"),
        ({"shares": {"test": 0.5}}, r"shares are .*their sum 1"),
        ({"shares": {"test": 1.5, "train": -0.5}}, r"each must be above 0"),
    ],
)
def test_what_cannot_be_asked_says_what_can(asked, message, tmp_path):
    asked = {"name": "vlsafe", "where": tmp_path, **asked}
    with pytest.raises(BadParams, match=message):
        load(asked.pop("name"), asked.pop("where"), **asked)


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    layout = one("spa_vl")
    found = loaded(layout, layout.write(tmp_path / "in"))
    found.write(tmp_path / "out")
    with pytest.raises(BadData, match="exists; give a new folder"):
        found.write(tmp_path / "out")


def test_layouts_are_told_apart_by_their_tables():
    assert len({(a.name, a.table) for a in LAYOUTS}) == len(LAYOUTS)
    assert all(isinstance(layout, Layout) for layout in LAYOUTS)
