"""The normal form: what is written is what is read, and what is not in it is refused."""

import io
import json
import tracemalloc
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hauberk.data.lab import build_suite
from hauberk.data.samples import Sample, read_suite, stream_suite, write_suite, writing_suite
from hauberk.errors import BadData

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pictures = st.none() | st.tuples(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from(["RGB", "RGBA", "L"]), st.integers(0, 255)
).map(lambda drawn: Image.new(drawn[2], drawn[:2], drawn[3]))


@st.composite
def suites(draw):
    expected = draw(st.sampled_from(["answer", "refuse", "hedge"]))
    channel = draw(st.sampled_from(["text", "benign", "image"]))
    return [
        Sample(
            sample_id=f"s{index}",
            pair_id=draw(words),
            suite="text",
            channel=channel,
            split=draw(st.sampled_from(["anchor", "test"])),
            scenario=draw(words),
            expected=expected,
            question=draw(words),
            image=draw(pictures),
            reference=draw(words.filter(bool)),
            source=draw(words),
            revision=draw(words),
            licence=draw(words),
            caption=draw(words),
            meta=draw(st.just("") | st.dictionaries(words, words).map(json.dumps)),
        )
        for index in range(draw(st.integers(1, 5)))
    ]


def comparable(sample):
    image = sample.image
    pixels = None if image is None else (image.mode, image.size, image.tobytes())
    return replace(sample, image=pixels)


@pytest.fixture(scope="module")
def some():
    return build_suite("benign_image", "test", 4, seed=1) + build_suite("text", "test", 2, seed=1)


@pytest.fixture
def written(some, tmp_path):
    return write_suite(some, tmp_path / "suite.parquet")


@given(samples=suites())
def test_what_is_read_is_what_was_written(samples, tmp_path_factory):
    path = write_suite(samples, tmp_path_factory.mktemp("suite") / "suite.parquet")
    assert list(map(comparable, read_suite(path))) == list(map(comparable, samples))


def test_the_same_samples_are_the_same_bytes(some, tmp_path):
    one, other = (write_suite(some, tmp_path / name) for name in ("one.parquet", "two.parquet"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_anyone_reads_the_file_with_datasets_and_sees_pictures(some, written, tmp_path):
    table = datasets.Dataset.from_parquet(str(written), cache_dir=tmp_path / "cache")
    assert isinstance(table.features["image"], datasets.Image)
    assert table[0]["image"].tobytes() == some[0].image.tobytes()
    assert table[len(some) - 1]["image"] is None
    assert table["sample_id"][:] == [sample.sample_id for sample in some]


def test_a_request_shows_the_picture_of_its_sample(some):
    for sample in some:
        assert sample.request.text == sample.question
        assert sample.request.images == (() if sample.image is None else (sample.image,))


def test_a_missing_file_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(BadData, match=r"no such suite; run the stage that writes it"):
        read_suite(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(BadData, match=r"bad\.parquet: not a Parquet file.*prepare_data"):
        read_suite(tmp_path / "bad.parquet")


def test_a_file_cut_short_is_refused(written):
    raw = written.read_bytes()
    for kept in range(0, len(raw), 997):
        written.write_bytes(raw[:kept])
        with pytest.raises(BadData, match="not a Parquet file"):
            read_suite(written)


def test_missing_columns_are_named(written):
    pq.write_table(pq.read_table(written).drop(["question", "licence"]), written)
    with pytest.raises(BadData, match=r"\['licence', 'question'\] are missing"):
        read_suite(written)


def test_a_file_of_before_captions_is_read_and_has_none(some, written):
    pq.write_table(pq.read_table(written).drop(["caption"]), written)
    assert [sample.caption for sample in read_suite(written)] == [""] * len(some)


def test_scenes_are_told_in_words_and_blank_pictures_are_not():
    (shown, *_), (blank, *_) = (build_suite(n, "train", 2, 7) for n in ("sd_typo", "text_blank"))
    assert shown.caption.startswith("there is a ")
    assert f"it says {shown.caption.split()[3]} ." in shown.caption
    assert (blank.image is not None, blank.caption) == (True, "")


def test_columns_that_are_not_ours_are_left_out(some, written):
    table = pq.read_table(written)
    pq.write_table(table.append_column("note", pa.array(["x"] * len(table))), written)
    assert len(read_suite(written)) == len(some)


def test_a_picture_that_cannot_be_read_names_its_sample(some, written):
    rows = pq.read_table(written).to_pylist()
    buffer = io.BytesIO()
    some[1].image.save(buffer, "PNG")
    rows[1]["image"]["bytes"] = buffer.getvalue()[:-40]
    pq.write_table(pa.Table.from_pylist(rows), written)
    with pytest.raises(BadData, match=f"'{some[1].sample_id}': cannot be read as a picture"):
        read_suite(written)


def replaced(written, encoded):
    rows = pq.read_table(written).to_pylist()
    rows[0]["image"]["bytes"] = encoded
    pq.write_table(pa.Table.from_pylist(rows), written)


def test_a_picture_without_bytes_names_its_sample(some, written):
    replaced(written, None)
    with pytest.raises(BadData, match=f"'{some[0].sample_id}' has no bytes"):
        read_suite(written)


@pytest.mark.parametrize("part", [0.1, 0.9])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_says_it_is_vast_is_refused(some, written, monkeypatch, part):
    """Also where Pillow itself would only warn, as it does up to twice its limit."""
    width, height = some[0].image.size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(part * width * height))
    with pytest.raises(
        BadData, match=f"'{some[0].sample_id}': cannot be read as a picture .*pixels"
    ):
        read_suite(written)


@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA"])
def test_a_picture_of_a_format_that_nobody_embeds_is_refused(some, written, form):
    some[0].image.convert("RGB").save(buffer := io.BytesIO(), form)
    replaced(written, buffer.getvalue())
    with pytest.raises(BadData, match=f"'{some[0].sample_id}': cannot be read as a picture"):
        read_suite(written)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("expected", "comply", "answer, refuse"),
        ("channel", "video", "text, text.image, image"),
        ("split", "validation", "anchor, train, calibration, test"),
    ],
)
def test_a_value_outside_the_normal_form_is_refused_on_writing(some, tmp_path, field, value, right):
    wrong = [replace(some[0], **{field: value}), *some[1:]]
    with pytest.raises(BadData, match=f"{field} of '{some[0].sample_id}' is '{value}'.*{right}"):
        write_suite(wrong, tmp_path / "suite.parquet")
    assert not (tmp_path / "suite.parquet").exists()


def test_no_sample_and_the_same_id_twice_are_refused(some, tmp_path):
    with pytest.raises(BadData, match="no samples"):
        write_suite([], tmp_path / "suite.parquet")
    with pytest.raises(BadData, match=f"'{some[2].sample_id}' occurs more than once"):
        write_suite([*some, some[2]], tmp_path / "suite.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_suite_of_two_kinds_is_refused(some, tmp_path):
    """Its rates would be of the first kind alone, and the others would vanish."""
    other = replace(some[0], sample_id="other", expected="refuse")
    with pytest.raises(BadData, match="'other' is to refuse, other samples of"):
        write_suite([some[0], other], tmp_path / "suite.parquet")
    assert not (tmp_path / "suite.parquet").exists()


def test_a_suite_of_two_channels_is_refused(some, tmp_path):
    """Its rates would be told as those of one of them."""
    other = replace(some[0], sample_id="other", channel="lookalike")
    with pytest.raises(BadData, match=r"channel of 'other' is lookalike, .* benign_image benign"):
        write_suite([some[0], other], tmp_path / "suite.parquet")
    assert not (tmp_path / "suite.parquet").exists()


def test_a_benign_sample_without_its_answer_is_refused(some, tmp_path):
    """It could never be answered right."""
    with pytest.raises(BadData, match=f"'{some[0].sample_id}' has no reference"):
        write_suite([replace(some[0], reference="")], tmp_path / "suite.parquet")


def test_a_benign_sample_may_be_scored_otherwise_and_says_how(some, tmp_path):
    for number, meta in enumerate([{"metric": "refusal"}, {"metric": "vqa", "answers": ["two"]}]):
        scored = replace(some[0], reference="", meta=json.dumps(meta))
        (read,) = read_suite(write_suite([scored], tmp_path / f"{number}.parquet"))
        assert read.details == meta
    for meta in ({"metric": "vqa"}, {"metric": "vqa", "answers": []}, {"metric": "judged"}, {}):
        with pytest.raises(BadData, match=r"has no reference.*say in `meta` how else"):
            write_suite(
                [replace(some[0], reference="", meta=json.dumps(meta))], tmp_path / "none.parquet"
            )


@pytest.mark.parametrize("meta", ["{", "[1]", "3", '"text"'])
def test_meta_that_is_no_object_is_refused(some, tmp_path, meta):
    with pytest.raises(BadData, match=f"meta of '{some[0].sample_id}' is .*must be a JSON object"):
        write_suite([replace(some[0], meta=meta)], tmp_path / "suite.parquet")


def test_a_metric_that_nobody_knows_is_refused(some, tmp_path):
    wrong = replace(some[0], meta='{"metric": "bleu"}')
    with pytest.raises(BadData, match=r"the metric of .* is 'bleu'; it must be one of exact, vqa"):
        write_suite([wrong], tmp_path / "suite.parquet")


def test_a_suite_without_meta_has_the_bytes_that_datasets_writes(some, tmp_path):
    """As suites had before they could have meta; what was made of them stays as it is."""
    path = write_suite(some, tmp_path / "suite.parquet")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(path), cache_dir=tmp_path / "cache")
    table.to_parquet(tmp_path / "theirs.parquet")
    assert "meta" not in table.column_names
    assert path.read_bytes() == (tmp_path / "theirs.parquet").read_bytes()


def test_a_picture_is_embedded_as_it_is(some, tmp_path):
    image = some[0].image
    image.save(buffer := io.BytesIO(), "JPEG", quality=30)
    path = tmp_path / "suite.parquet"
    with writing_suite(path) as add:
        add(replace(some[0], image=None), buffer.getvalue())
    assert pq.read_table(path)["image"][0]["bytes"].as_py() == buffer.getvalue()
    assert read_suite(path)[0].image.format == "JPEG"


def test_a_suite_that_fails_on_the_way_leaves_nothing_behind(some, tmp_path):
    def broken():
        yield from some
        raise RuntimeError("the source broke")

    write_suite(some, tmp_path / "suite.parquet")
    before = (tmp_path / "suite.parquet").read_bytes()
    with pytest.raises(RuntimeError):
        write_suite(broken(), tmp_path / "suite.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["suite.parquet"]
    assert (tmp_path / "suite.parquet").read_bytes() == before


def test_a_long_suite_is_written_and_read_without_being_held(some, tmp_path):
    """100 MB of pictures pass through; no more than a row group and a few rows are in memory."""
    picture = Image.frombytes("RGB", (400, 400), bytes(range(256)) * (400 * 400 * 3 // 256))
    noise = io.BytesIO()
    picture.save(noise, "BMP")  # 480 kB, uncompressed
    sample = replace(some[0], image=None)
    path = tmp_path / "suite.parquet"
    tracemalloc.start()
    with writing_suite(path) as add:
        for index in range(200):
            add(replace(sample, sample_id=str(index)), noise.getvalue())
    count = sum(read.image.size == (400, 400) for read in stream_suite(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200
    assert pq.ParquetFile(path).num_row_groups > 4
    assert peak < 40 * 2**20
