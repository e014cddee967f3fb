"""Stage build_text_index: captions, snippets and a CLIP -> the texts that are found for pictures.

in   artifacts/data/train/*, the CLIP
out  artifacts/CLIP/text_index/   features.safetensors, texts.json, card.json

Texts are the captions of all pictures that TGA trains on, each with the id of its picture so that
none is found for its own, and the requests of some suites in words.
"""

from pathlib import Path

from tasks.params import Params
from tasks.stage import DATA, index_folder, load_clip, main


def run(params: Params, clip_name: str) -> Path:
    """Encode the texts, write the bundle."""
    from hauberk.bundle import binding_of
    from hauberk.data.samples import read_suite
    from hauberk.errors import BadParams
    from hauberk.files import file_hash
    from hauberk.retrieval import build_index

    told = params.tga
    if clip_name != told.index.clip:
        raise BadParams(f"tga.index.clip is {told.index.clip!r}; no texts are for {clip_name!r}.")
    clip, processor = load_clip(params, clip_name)
    texts: dict[str, str] = {}
    data = []
    for suite in dict.fromkeys((*told.aligned, *told.answered, *told.index.snippets)):
        file = DATA / "train" / f"{suite}.parquet"
        data.append({"id": f"train/{suite}", "sha256": file_hash(file)})
        for sample in read_suite(file):
            if sample.caption:
                texts.setdefault(sample.caption, sample.sample_id)
            if suite in told.index.snippets:
                texts.setdefault(sample.question, "")
    index = build_index(clip, processor, [*texts], [*texts.values()])
    return index.save(
        index_folder(clip_name),
        binding_of(clip, processor),
        data=data,
        measurements={"texts": float(len(index.texts))},
    )


if __name__ == "__main__":
    main("build_text_index", run, "clip")
