"""Retrieval: exact, guarded against leaks, and bound to its encoder."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from hauberk import retrieval
from hauberk.bundle import binding_of
from hauberk.defenses import load
from hauberk.errors import BadBundle, TamperedBundle, WrongModel
from hauberk.retrieval import Query, Retriever, TextIndex, build_index, unleaked

TEXTS = ("a lamp red", "a bomb green", "a cup blue", "a ball red", "a bomb red", "a knife blue")


@pytest.fixture(scope="module")
def pictures(tiny):
    return [request.images[0] for request in tiny.pictured[:5]]


@pytest.fixture(scope="module")
def index(tiny_clip):
    return build_index(tiny_clip.model, tiny_clip.processor, TEXTS, [f"p{i}" for i in range(6)])


@pytest.fixture(scope="module")
def retriever(index, tiny_clip):
    return Retriever(index, tiny_clip.model, tiny_clip.processor, near=1.1)


def unit(n, d=8, seed=0):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("backend", ["product", "faiss"])
def test_search_equals_brute_force_over_blocks(backend, monkeypatch):
    if backend == "faiss" and find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    monkeypatch.setattr(retrieval, "_BLOCK", 7)
    monkeypatch.setattr(retrieval, "_QUERIES", 3)
    index = TextIndex(tuple(f"text {i}" for i in range(50)), unit(50))
    queries = unit(10, seed=1)
    scores, places = index.search(queries, 4, backend)
    wanted = (queries @ index.features.T).topk(4)
    assert torch.equal(places, wanted.indices)
    torch.testing.assert_close(scores, wanted.values)


def test_no_index_needs_faiss_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(TextIndex, "_faiss", lambda *_: pytest.fail("faiss was asked"))
    TextIndex(("a", "b"), unit(2)).search(unit(1), 5)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"'annoy'.*product, faiss"):
        TextIndex(("a",), unit(1)).search(unit(1), 1, "annoy")


def test_half_precision_finds_what_float32_of_the_same_values_finds():
    index = TextIndex(tuple(map(str, range(30))), unit(30).half())
    _, places = index.search(unit(4, seed=2), 3)
    assert torch.equal(places, (unit(4, seed=2) @ index.features.float().T).topk(3).indices)


def test_texts_that_repeat_are_kept_once_with_their_first_picture(tiny_clip):
    index = build_index(
        tiny_clip.model, tiny_clip.processor, ["a cup", "a lamp", "a cup"], ["1", "2", "3"]
    )
    assert index.texts == ("a cup", "a lamp")
    assert index.images == ("1", "2")


def test_the_nearest_text_is_found_for_any_dual_encoder(tiny_clip, tiny_siglip, pictures):
    for clip in (tiny_clip, tiny_siglip):
        index = build_index(clip.model, clip.processor, TEXTS)
        features = retrieval.encode_images(clip.model, clip.processor, pictures, batch_size=2)
        wanted = [TEXTS[i] for i in (features @ index.features.T).argmax(1)]
        assert Retriever(index, clip.model, clip.processor).texts(pictures) == wanted


def test_no_picture_is_no_query(retriever):
    assert retriever.texts([]) == []


def test_a_text_of_the_same_picture_is_passed_over(retriever, pictures):
    (free,) = retriever.find([Query(pictures[0])])
    own = f"p{TEXTS.index(free.text)}"
    (guarded,) = retriever.find([Query(pictures[0], image_id=own)])
    assert guarded.text != free.text
    assert guarded.guarded == 1
    assert guarded.score <= free.score


def test_the_caption_itself_is_halved_or_dropped(retriever, pictures):
    (free,) = retriever.find([Query(pictures[0])])
    (halved,) = retriever.find([Query(pictures[0], caption=free.text)])
    assert halved.text == free.text[: len(free.text) // 2].rstrip()
    dropping = replace(retriever, equal="drop")
    (dropped,) = dropping.find([Query(pictures[0], caption=free.text)])
    assert dropped.text in set(TEXTS) - {free.text}


def test_what_is_nearly_the_caption_is_passed_over(retriever, pictures):
    (free,) = retriever.find([Query(pictures[0])])
    other = next(text for text in TEXTS if text != free.text)
    strict = replace(retriever, near=-1.1)  # everything is nearly everything
    (none,) = strict.find([Query(pictures[0], caption=other)])
    assert none.text in ("", other[: len(other) // 2].rstrip())


def test_more_candidates_are_looked_at_where_guards_pass_over_the_first(
    retriever, pictures, monkeypatch
):
    monkeypatch.setattr(retrieval, "_SPARE", 0)
    (free,) = retriever.find([Query(pictures[0])])
    (found,) = retriever.find([Query(pictures[0], image_id=f"p{TEXTS.index(free.text)}")])
    assert found.text not in ("", free.text)


def test_an_index_that_is_all_guarded_finds_nothing(tiny_clip, pictures):
    index = build_index(tiny_clip.model, tiny_clip.processor, ["a cup"], ["mine"])
    retriever = Retriever(index, tiny_clip.model, tiny_clip.processor)
    (found,) = retriever.find([Query(pictures[0], image_id="mine")])
    assert (found.text, found.guarded) == ("", 1)


def test_only_the_caption_itself_is_cut():
    assert unleaked("a lamp red", "a lamp red") == "a lam"
    assert unleaked("a lamp blue", "a lamp red") == "a lamp blue"


def test_a_bundle_gives_back_the_index(index, tiny_clip, tmp_path):
    folder = index.save(tmp_path / "b", binding_of(tiny_clip.model, tiny_clip.processor))
    again = TextIndex.load(folder, tiny_clip.model, tiny_clip.processor)
    assert (again.texts, again.images) == (index.texts, index.images)
    assert torch.equal(again.features, index.features)


def test_a_bundle_is_bound_to_its_encoder(index, tiny_clip, tiny_siglip, tmp_path):
    folder = index.save(tmp_path / "b", binding_of(tiny_clip.model, tiny_clip.processor))
    with pytest.raises(WrongModel, match="text-index"):
        TextIndex.load(folder, tiny_siglip.model, tiny_siglip.processor)


def test_a_changed_bundle_is_not_read(index, tiny_clip, tmp_path):
    folder = index.save(tmp_path / "b", binding_of(tiny_clip.model, tiny_clip.processor))
    (folder / "texts.json").write_text("{}")
    with pytest.raises(TamperedBundle, match=r"texts\.json"):
        TextIndex.load(folder, tiny_clip.model, tiny_clip.processor)


def test_an_index_is_no_defense(index, tiny, tiny_clip, tmp_path):
    folder = index.save(tmp_path / "b", binding_of(tiny_clip.model, tiny_clip.processor))
    with pytest.raises(BadBundle, match=r"index of texts.*TextIndex\.load"):
        load(folder, tiny.model, tiny.processor)


@pytest.mark.parametrize(
    ("texts", "features", "images", "said"),
    [
        ((), unit(1), (), "0 texts"),
        (("a", "a"), unit(2), (), "1 of them different"),
        (("a",), unit(2), (), r"\(1, d\)"),
        (("a",), unit(1), ("1", "2"), "2 ids"),
    ],
)
def test_what_is_no_index_is_refused(texts, features, images, said):
    with pytest.raises(ValueError, match=said):
        TextIndex(texts, features, images)
