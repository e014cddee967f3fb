"""Stage evaluate_served: test suites and a model that others serve -> responses and metrics.

in   artifacts/data/test/*, artifacts/frames/*, artifacts/guards/*, the CLIP
out  artifacts/NAME/DEFENSE/evaluation/   as of evaluate, for DEFENSE none and each that
     served.NAME.defenses tells: the frame or the mask and words that were fitted on a model here

Only pictures and words leave: GuardAlign goes without its attention (gamma 0).  Suites of attacked
pictures are left out, since they were made against a model here.  What the endpoint leaves without
an answer is counted as such, and as unsafe; where that is more than served.NAME.unanswered, the
stage fails.

Answers are kept in .scratch/ as they come, also when the stage is done, since they cost: a run that
was killed, or that other code or judges make necessary, asks only for what is not there.  A served
model may change behind its name, and its answers are not the same every time: the card tells where
and when they came from, and how many of some were others when asked again.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hauberk import UNDEFENDED
from hauberk.errors import BadEndpoint, BadParams, UnsupportedRequest
from tasks.evaluate import write_evaluation
from tasks.judging import check_keys, judged
from tasks.params import DAVSP, Params, ServedParams
from tasks.stage import ARTIFACTS, DATA, FRAMES, GUARDS, SCRATCH, main, read_json, release, spread

if TYPE_CHECKING:
    from hauberk.data.samples import Sample
    from hauberk.defenses import GuardAlign, SafetyPrompt
    from hauberk.endpoint import EndpointSetting
    from hauberk.evaluation.run import Record


def run(params: Params, name: str) -> Path:
    """Let a served model answer every test sample under each defense; judge, and write it all."""
    from hauberk.bundle import versions
    from hauberk.data.lab import ATTACKED
    from hauberk.data.samples import read_suite
    from hauberk.endpoint import EndpointSetting
    from hauberk.files import replacing

    if (told := params.served.get(name)) is None:
        known = ", ".join(params.served) or "none"
        raise BadParams(f"served.{name}: unknown served model; known are {known}.")
    check_keys(params)
    guards = {UNDEFENDED: None} | {each: _guard(name, each) for each in told.defenses}
    drawn = [suite for suite in params.suites if suite not in ATTACKED]
    samples = [one for suite in drawn for one in read_suite(DATA / "test" / f"{suite}.parquet")]
    setting = EndpointSetting(**told.endpoint, cache=_replies(name, told))
    runs: dict[str, list[Record]] = {}
    cards: dict[str, dict[str, Any]] = {}
    for defense, guard in guards.items():
        runs[defense], asked = _asked(params, name, setting, samples, (defense, guard))
        bundle = _bundle(defense) if guard else None
        cards[defense] = {
            "model": name,
            "defense": defense,
            "served": {
                "host": urlsplit(setting.url).netloc,
                "model": setting.model,
                "revision": told.revision,
                "reproducible": False,
                **asked,
            },
            "bundle": read_json(bundle / "card.json")["card_sha256"] if bundle else UNDEFENDED,
            "generation": params.evaluate.told,
            "versions": versions(),
            "responses": len(samples),
            "left_out": [suite for suite in params.suites if suite in ATTACKED],
        }
    del guards, guard
    release()  # a judge may need the place of a CLIP
    with replacing(ARTIFACTS / name) as partial:
        for defense, records in judged(params, runs, samples).items():
            write_evaluation(partial / defense / "evaluation", records, cards[defense])
    return ARTIFACTS / name


def _bundle(defense: str) -> Path:
    """Where the defense METHOD@MODEL lies."""
    method, _, model = defense.partition("@")
    return FRAMES / model / "bundle" if method == DAVSP else GUARDS / model


def _guard(name: str, defense: str) -> "SafetyPrompt | GuardAlign":
    """Read a defense as far as it works on requests.

    Raises
    ------
    BadParams
        If it needs the model all the same, saying what for.
    """
    from hauberk.defenses import GuardAlign, read
    from hauberk.target import check_defense

    guard = read(_bundle(defense))
    if isinstance(guard, GuardAlign):
        guard = guard.with_prefix(guard.prefix and guard.prefix.with_gamma(0))
    try:
        check_defense(guard)
    except UnsupportedRequest as error:
        raise BadParams(f"served.{name}.defenses: {defense!r}: {error}") from None
    return guard


def _replies(name: str, told: ServedParams) -> Path:
    """The file of what was answered: one for each revision."""
    revision = sha256((told.revision or "").encode()).hexdigest()[:16]
    return SCRATCH / "served" / name / f"replies-{revision}.sqlite"


def _asked(
    params: Params,
    name: str,
    setting: "EndpointSetting",
    samples: "Sequence[Sample]",
    guarded: tuple[str, Any],
) -> "tuple[list[Record], dict[str, Any]]":
    """Ask everything, and some of it again; return records, and what a card says of the asking.

    Raises
    ------
    BadEndpoint
        If more than may be has no answer.
    """
    from tqdm import tqdm

    from hauberk.endpoint import Endpoint
    from hauberk.evaluation.run import evaluate_through
    from hauberk.target import Target

    defense, guard = guarded
    limits = {
        "max_new_tokens": params.evaluate.max_new_tokens,
        "batch_size": params.evaluate.batch_size,
    }
    first, second = Endpoint(setting), Endpoint(replace(setting, cache=None))
    with tqdm(total=len(samples), desc=f"{name} with {defense}") as bar:
        records = evaluate_through(
            Target(first).respond,
            samples,
            guard,
            names=(name, defense),
            journal=None,  # the endpoint's own file keeps what was paid for, and what it cost
            progress=bar.update,
            **limits,
        )
    failed = [record for record in records if record.declared == "failed"]
    allowed = params.served[name].unanswered
    if len(failed) > allowed * len(records):
        raise BadEndpoint(
            f"served.{name}: {len(failed)} of {len(records)} requests with {defense} have no "
            f"answer, and served.{name}.unanswered allows {allowed:g} of them.  The first: "
            f"{failed[0].error}\nWhat was answered is kept: run again to ask for the rest alone."
        )
    said = {record.sample_id: record.response for record in records if not record.declared}
    again = [one for one in spread(samples, params.evaluate.checked_alone) if one.sample_id in said]
    responses = Target(second).respond([one.request for one in again], guard, **limits)
    twice = {
        sample.sample_id: response.text
        for sample, response in zip(again, responses, strict=True)
        if not response.error
    }
    return records, {
        "unanswered": len(failed),
        "usage": asdict(first.usage),
        "asked_again": len(twice),
        "differing_again": [each for each, text in twice.items() if text != said[each]],
        "usage_again": asdict(second.usage),
    }


if __name__ == "__main__":
    main("evaluate_served", run, "name")
