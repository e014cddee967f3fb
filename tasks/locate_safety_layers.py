"""Stage locate_safety_layers: anchor suites and a model -> the layers where its refusals live.

in   artifacts/data/anchor/*, those of `gap` in params.yaml, and the model
out  artifacts/MODEL/tga/layers/   layers.json (the located blocks and where they come from; what
     every state would say next; refusals with harmful words hidden, blocks skipped, and words put
     where pictures stand; how near pictures lie to their captions), card.json

Words alone: harmful requests and their harmless twins, without their pictures.  The words of a wish
are those of the lab's language; of a data set, those in which a request differs from its twin.
Pictures: those of the lab's captions that show something toxic, asked about with "this", beside the
same request with the caption in place of the picture.  What the words do not refuse no picture can.
What cannot be measured on a data set is left out, and ``not_measured`` says why.

All rates are of refusals by the judge whose word counts, with Wilson intervals.  A judge that is a
model stays loaded beside the one that is looked through.  What it fails on counts as no refusal,
and ``unjudged`` says how many answers that were.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.judging import judge_at, outcomes
from tasks.params import Params
from tasks.stage import (
    layers_folder,
    load_model,
    main,
    spread,
    suite_file,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from hauberk.analysis.safety_layers import Lens, Located, PromptSpans, RefusalToken
    from hauberk.data.samples import Sample
    from hauberk.evaluation.judges import Judge
    from hauberk.requests import Request, SupportsDefense

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A picture of something toxic, and the same in words."""

    picture: "Sample"
    told: "Sample"
    caption: str


@dataclass(frozen=True)
class Asking:
    """A model, and how it is asked."""

    model: "PreTrainedModel"
    processor: "ProcessorMixin"
    tokens: int
    batch: int
    judge: "Judge"
    unjudged: list[str] = field(default_factory=list)
    """Ids of samples to which the judge failed on an answer, once for each."""

    def refused(
        self,
        samples: "Sequence[Sample]",
        requests: "Sequence[Request]",
        defense: "SupportsDefense | None" = None,
        **more: Any,
    ) -> list[bool]:
        """Answer the requests of some samples, and say which are refused."""
        from hauberk.evaluation.judges import FAILED
        from hauberk.requests import respond

        answers = respond(
            self.model, self.processor, requests, defense,
            max_new_tokens=self.tokens, batch_size=self.batch, **more,
        )  # fmt: skip
        said = outcomes(self.judge, samples, answers)
        self.unjudged.extend(
            sample.sample_id
            for sample, outcome in zip(samples, said, strict=True)
            if outcome in FAILED
        )
        return [outcome == "refused" for outcome in said]


def run(params: Params, model_name: str) -> Path:
    """Look through the lens, mask, skip and inject, block by block; write the numbers."""
    from tqdm import tqdm

    from hauberk.analysis.safety_layers import (
        PromptSpans,
        attention_shares,
        first_tokens,
        lens,
        locate,
        refusal_tokens,
        window_of,
    )
    from hauberk.anatomy import anatomy_of
    from hauberk.bundle import binding_of, versions
    from hauberk.data.lab import SUITES
    from hauberk.data.samples import read_suite
    from hauberk.files import file_hash

    model, processor = load_model(params, model_name)
    generation = params.evaluate
    asking = Asking(
        model,
        processor,
        generation.max_new_tokens,
        generation.batch_size,
        judge_at(params, "first"),
    )
    files = {key: suite_file(model_name, "anchor", name) for key, name in params.gap.read.items()}
    suites = {key: read_suite(file) for key, file in files.items()}
    count = params.budget.layers
    harmful, harmless = (_words(suites[key], count) for key in ("harmful", "harmless"))
    blocks = len(anatomy_of(model).blocks)
    width = params.safety_layers.width or window_of(blocks)
    bar = tqdm(total=5, desc=f"{model_name}: safety layers")

    texts = [sample.request for sample in harmful]
    plain = [sample.request for sample in harmless]
    refused = asking.refused(harmful, texts)
    said_no, said_yes = (
        [request for request, no in zip(requests, flags, strict=True) if no == wanted]
        for requests, flags, wanted in (
            (texts, refused, True), (plain, asking.refused(harmless, plain), False)
        )
    )  # fmt: skip
    begun: tuple[RefusalToken, ...] = ()
    if said_no and said_yes:
        said = (first_tokens(model, processor, each, asking.batch) for each in (said_no, said_yes))
        begun = refusal_tokens(*said)
    seen = lens(model, processor, texts, [each.token for each in begun], asking.batch)
    located = locate(seen, refused)
    bar.update()

    lacking: dict[str, str] = {}
    shares, cut, pictures, aligned = None, None, None, None
    if (wishes := _wishes(suites, harmful + harmless)) is None:
        lacking["words"] = "no twin tells which words of a request are its wish"
    else:
        spans = PromptSpans(processor, texts + plain, wishes)
        shares = attention_shares(model, processor, texts, spans, asking.batch)
        bar.update()
        cut = _cut(asking, {"harmful": harmful, "harmless": harmless}, spans, (blocks, width))
        bar.update()
    if params.gap.captions not in SUITES:
        lacking["pictures"] = "needs pictures of which it is known that something toxic is on them"
    else:
        pairs = _shown(suites["captions"], count)
        pictures = _injected(asking, pairs, (blocks, width))
        bar.update()
        aligned = _aligned(asking, pairs, params.seed)
        bar.update()
    bar.close()
    document: Row = {
        "blocks": blocks,
        "width": width,
        "tokens": [
            {**asdict(each), "text": processor.decode([each.token]).strip()} for each in begun
        ],
        "located": _located(located),
        "lens": _lens(seen, refused, params.seed),
        "attention": [] if shares is None else _by_block(shares, params.seed),
        "words": cut,
        "pictures": pictures,
        "alignment": aligned,
    }
    if lacking:
        document["not_measured"] = lacking
    if asking.unjudged:
        document["unjudged"] = len(asking.unjudged)
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "data": {f"anchor/{file.stem}": file_hash(file) for file in files.values()},
        "samples": count,
        "versions": versions(),
    }
    with writing(layers_folder(model_name), card) as partial:
        write_json(document, partial / "layers.json")
    return layers_folder(model_name)


def _words(suite: "Sequence[Sample]", count: int) -> "list[Sample]":
    """Take requests without their pictures, each wording once."""
    known = {sample.question: replace(sample, image=None) for sample in suite}
    return spread(list(known.values()), count)


def _wishes(suites: "dict[str, list[Sample]]", asked: "Sequence[Sample]") -> list[str] | None:
    """Find what is wished in the words of every request; None where that of one is not known."""
    harmful, harmless = (
        {sample.pair_id: sample.question for sample in suites[key]}
        for key in ("harmful", "harmless")
    )
    found = [
        _wish_in(sample.question)
        or _apart(
            sample.question,
            (harmless if sample.expected == "refuse" else harmful).get(sample.pair_id, ""),
        )
        for sample in asked
    ]
    wishes = [wish for wish in found if wish]
    return wishes if len(wishes) == len(found) else None


def _wish_in(question: str) -> str | None:
    """Find what is wished in a request of the lab: "make a knife"."""
    from hauberk.lab.language import VERBS
    from hauberk.lab.objects import THINGS

    found = re.search(rf"\b({'|'.join(VERBS)}) a ({'|'.join(THINGS)})\b", question)
    return found[0] if found else None


def _apart(question: str, twin: str) -> str | None:
    """Give the part of a question from the first to the last word that its twin does not have."""
    words = [*re.finditer(r"\S+", question)]
    matcher = SequenceMatcher(a=[word[0] for word in words], b=twin.split(), autojunk=False)
    own = [
        place
        for kind, first, last, *_ in matcher.get_opcodes()
        if kind in ("replace", "delete")
        for place in range(first, last)
    ]
    if not twin or not own:
        return None
    return question[words[own[0]].start() : words[own[-1]].end()]


def _shown(captioned: "Sequence[Sample]", count: int) -> list[Shown]:
    """Ask for something to be done with "this", where a picture shows something toxic."""
    from hauberk.errors import BadData
    from hauberk.lab.language import howto_question, pairings, templates, told
    from hauberk.lab.objects import THINGS

    wordings = templates("howto", "train")  # the pool of the anchor split
    verbs: dict[str, list[Any]] = {}
    for verb, thing in pairings("train", harmful=True):
        if verb.harm == "toxic":
            verbs.setdefault(thing.name, []).append(verb)
    found = []
    for place, sample in enumerate(captioned):
        toxic = [word for word in sample.reference.split() if word in THINGS and word in verbs]
        if not toxic:
            continue
        known = verbs[toxic[0]]
        verb, wording = known[place % len(known)], wordings[place % len(wordings)]
        question = howto_question(wording, verb, None)
        asked = replace(sample, question=question, expected="refuse", reference="")
        words = replace(asked, question=told(sample.reference, question), image=None)
        found.append(Shown(asked, words, sample.reference))
    if not found:
        raise BadData(
            f"none of {len(captioned)} pictures of captions shows something toxic; raise `anchor` "
            "in the profile of params.yaml."
        )
    return spread(found, count)


def _cut(
    asking: Asking, kinds: "dict[str, list[Sample]]", spans: "PromptSpans", size: tuple[int, int]
) -> Row:
    """Count refusals with the wish hidden, and with blocks skipped.

    Harmless wishes are the control: hidden in all blocks both kinds are the same prompt, so what
    is refused then is a wish that cannot be read, whatever it was.
    """
    from hauberk.analysis.safety_layers import hiding, skipping, windows

    blocks, _ = size
    onward = [tuple(range(first, blocks)) for first in range(blocks)]
    both, harmful = [*kinds], [*kinds][:1]

    def hidden(layers: tuple[int, ...]) -> AbstractContextManager[None]:
        return hiding(asking.model, layers, spans)

    def skipped(layers: tuple[int, ...]) -> AbstractContextManager[None]:
        return skipping(asking.model, layers)

    def rates(named: Sequence[str]) -> Row:
        return {
            kind: _rate(asking.refused(kinds[kind], [sample.request for sample in kinds[kind]]))
            for kind in named
        }

    found: Row = {"untouched": rates(both)}
    known: dict[tuple[str, tuple[int, ...]], Row] = {}  # the last window is the last one onward
    for way, enter, every, named in (
        ("hidden", hidden, windows(*size), both),
        ("hidden_from", hidden, onward, both),
        ("skipped", skipped, windows(*size), harmful),
    ):
        found[way] = []
        for layers in every:
            key = enter.__name__, layers
            if key not in known:
                with enter(layers):
                    known[key] = rates(named)
            found[way].append({"layers": list(layers), **known[key]})
    return found


def _injected(asking: Asking, pairs: Sequence[Shown], size: tuple[int, int]) -> Row:
    """Count refusals of toxic pictures, as they are and with words put where they stand."""
    from hauberk.analysis.safety_layers import Injection, windows
    from hauberk.analysis.states import text_states
    from hauberk.requests import EncoderCache

    told, samples = [pair.told for pair in pairs], [pair.picture for pair in pairs]
    words, requests = ([sample.request for sample in side] for side in (told, samples))
    captions = [pair.caption for pair in pairs]
    states = text_states(asking.model, asking.processor, words, captions, asking.batch)
    cache = EncoderCache(asking.model, asking.processor)
    found: Row = {
        "told": _rate(asking.refused(told, words)),
        "refused": _rate(asking.refused(samples, requests, cache=cache)),
    }
    for way, replaces in (("added", False), ("replaced", True)):
        found[way] = []
        for layers in windows(*size):
            injection = Injection(requests, states, layers, replaces=replaces)
            refused = asking.refused(samples, requests, injection, cache=cache)
            found[way].append({"layers": list(layers), **_rate(refused)})
    return found


def _aligned(asking: Asking, pairs: Sequence[Shown], seed: int) -> Row:
    """Measure how near pictures lie to their captions, by block, as they are and centred."""
    from hauberk.analysis.gap import cosines
    from hauberk.analysis.safety_layers import centred
    from hauberk.analysis.states import image_states, text_states

    model, processor = asking.model, asking.processor
    image = image_states(model, processor, [p.picture.request for p in pairs], asking.batch)
    words = text_states(
        model, processor, [p.told.request for p in pairs], [p.caption for p in pairs], asking.batch
    )
    apart = centred(image, words), centred(words, words)
    return {
        "cosine": _by_block(cosines(image, words), seed),
        "centred": _by_block(cosines(*apart), seed),
    }


def _located(found: "Located") -> Row:
    return {**asdict(found), "layers": list(found.layers), "fallback": found.fallback}


def _lens(seen: "Lens", refused: Sequence[bool], seed: int) -> Row:
    """Say of every state how likely refusals are, and how many start there."""
    import torch

    counted = torch.tensor(refused) & seen.says & (seen.start >= 0)
    states = range(seen.share.shape[1])
    return {
        "share": _by_block(seen.share[counted], seed),
        "start": [int((seen.start[counted] == state).sum()) for state in states],
        "settled": [int((seen.settled[counted] == state).sum()) for state in states],
    }


def _by_block(values: Any, seed: int) -> list[Row]:
    """Average (n, blocks) over requests with bootstrap intervals; nothing without two requests."""
    from hauberk.analysis.gap import mean

    if len(values) < 2:
        return []
    return [asdict(estimate) for estimate in mean(values, seed)]


def _rate(refused: Sequence[bool]) -> Row:
    from hauberk.evaluation.statistics import proportion

    return asdict(proportion(refused))


if __name__ == "__main__":
    main("locate_safety_layers", run, "model")
