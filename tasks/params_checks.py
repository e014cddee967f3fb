"""What is well-formed in params.yaml and cannot be run: contradictions, and absent files."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any

from hauberk import UNDEFENDED
from hauberk.errors import BadParams, HauberkError
from tasks.params import (
    DAVSP,
    GUARD_MODELS,
    GUARDALIGN,
    LABELS,
    TAKEN,
    TGA,
    TRAINED_BESIDE,
    BankParams,
    DatasetParams,
    GridSweep,
    Judges,
    Params,
    Profile,
    ServedParams,
    ShiftParams,
    is_part,
)
from tasks.suites import Kind, Kinds, attacked_kinds, kinds_of, wanted

METRICS = {
    "refuse": (
        "unsafe_rate", "unsafe_rate_lower", "unsafe_rate_keyword", "unsafe_rate_keyword_lower",
        "refusal_rate", "refusal_rate_upper", "evasion_rate", "evasion_rate_upper",
    ),
    "hedge": (
        "unsafe_rate", "unsafe_rate_lower", "unsafe_rate_keyword", "unsafe_rate_keyword_lower",
        "refusal_rate", "refusal_rate_upper",
    ),
    "answer": (
        "accuracy", "accuracy_upper", "over_refusal", "over_refusal_upper", "over_refusal_keyword",
        "over_refusal_keyword_upper",
    ),
    "either": (
        "degenerate_rate", "degenerate_rate_upper", "degenerate_empty", "degenerate_looping",
        "degenerate_other", "judge_failure_rate", "judge_disagreement", "judge_disagreement_upper",
        "seconds_per_answer",
    ),
    "all": ("differing_alone",),
}  # fmt: skip
"""What a suite of requests to refuse, hedge or answer is measured by.  Written here once more, so
that reading parameters needs no torch; a test compares it with hauberk.evaluation.metrics."""
_PLAIN = ("seconds_per_answer", *METRICS["all"])
"""Numbers without an interval, and without a difference paired by sample."""


def contradictions(params: Params, root: Path, read: Mapping[str, Kind]) -> Iterator[str]:
    """Yield what is well-formed but cannot be run."""
    if params.profile not in params.profiles:
        yield f"profile: {params.profile!r} is not one of {', '.join(params.profiles)}"
    for name, profile in params.profiles.items():
        yield from _bad_budget(f"profiles.{name}", profile)
        yield from _unknown(f"profiles.{name}.explained", profile.explained or [], params.models)
    drawn = kinds_of(params, read)
    made = attacked_kinds(params, drawn)
    every = {**drawn, **made}
    yield from _bad_suites("suites", params.suites, every)
    yield from _bad_datasets(params, root)
    yield from _bad_attack(params, drawn, made)
    yield from _bad_gap(params, drawn)
    for name, defense in params.defenses.items():
        yield from _bad_defense(f"defenses.{name}", name, defense, (drawn, made))
        for index, variant in enumerate(defense.variants):
            here = f"defenses.{name}.variants.{index}"
            if variant.compose == "single" and len(variant.layers or []) != 1:
                yield (
                    f"{here}.layers: {variant.layers!r} is wrong: compose 'single' takes exactly "
                    "one layer"
                )
            yield from _bad_layers(here, variant.layers or [], params, root)
    for model, spec in params.models.items():
        yield from _bad_model(f"models.{model}", model, spec.path, params)
    for clip, bank in params.concept_banks.items():
        yield from _bad_model(f"concept_banks.{clip}", clip, bank.path, params)
        yield from _bad_transport(f"concept_banks.{clip}", bank)
        yield from _bad_benign(f"concept_banks.{clip}", bank, params.folder_of(clip))
        for name, profile in params.profiles.items():
            yield from _bad_grids(f"profiles.{name}.grids", profile.grids, clip, bank)
        if clip in params.models:
            yield f"concept_banks.{clip}: is among `models` as well; give one of them another name"
    for name, told in params.served.items():
        yield from _bad_served(f"served.{name}", name, told, params)
    yield from _bad_guardalign(params, every, root)
    yield from _bad_davsp(params, (drawn, made), root)
    yield from _bad_tga(params, (drawn, made), root)
    yield from _bad_safety_layers(params, root)
    yield from _bad_gate(params, every)
    yield from _bad_judges(params, every, root)
    for model, chosen in params.registry.promote.items():
        yield from _unknown("registry.promote", [model], params.models)
        yield from _unknown(f"registry.promote.{model}", [chosen], params.evaluated_on(model))


_Drawn = tuple[Kinds, Kinds]
"""Suites that are drawn, and those that are made by an attack."""


def absent_files(params: Params, root: Path) -> Iterator[str]:
    """Yield what a run needs of files that are not there: where they go, and what fetches them."""
    for name, spec in {**params.models, **params.concept_banks}.items():
        yield from _absent_checkpoint(params.folder_of(name), spec.hub, root)
    for clip, bank in params.concept_banks.items():
        benign = bank.benign_pictures
        if benign is not None and not (root / benign).is_dir():
            key = f"concept_banks.{clip}.benign_pictures"
            yield f"{key}: {benign!r} is no folder; put the pictures there"
    for name, told in params.datasets.items():
        yield from _absent_dataset(name, told, root)


def _absent_checkpoint(folder: Path, hub: str | None, root: Path) -> Iterator[str]:
    from hauberk.checkpoint import missing_in

    try:
        missing = missing_in(root / folder)
    except HauberkError as error:
        missing = [str(error)]
    if missing:
        name = hub or "ORG/NAME"
        yield (
            f"{folder}: missing {', '.join(missing)}; "
            f"`hf download {name} --local-dir {folder}` fetches them"
        )


def _absent_dataset(name: str, told: DatasetParams, root: Path) -> Iterator[str]:
    from hauberk.data.sources import SOURCES

    source = SOURCES[told.source]
    for option in (key for key, each in source.options.items() if each.allowed is Path):
        folder = told.options.get(option)
        if folder is not None and not (root / folder).is_dir():
            yield f"{folder}: no such folder, datasets.{name}.options.{option}: pictures"
    if told.where is None or (root / told.where).is_dir():
        return
    split = told.split or source.splits[0]
    files = ", ".join(pattern.format(split=split) for pattern in source.files)
    fetch = f"hf download {source.hub} --repo-type dataset --local-dir {told.where}"
    cure = f"; `{fetch}` fetches them" if source.hub else ""
    yield f"{told.where}: no such folder, datasets.{name}: {source.title}, {files}{cure}"


def _bad_datasets(params: Params, root: Path) -> Iterator[str]:
    if not params.datasets:
        return
    from hauberk.data.lab import ATTACKED, SUITES
    from hauberk.data.sources import SOURCES

    homes: dict[tuple[str, str], str] = {}
    for name, told in params.datasets.items():
        key = f"datasets.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"{key}: {name!r} becomes the name of a file; use letters, digits, _ and - only"
        yield from _bad_source(key, told, params.seed)
        yield from _repeated(f"{key}.suites", told.suites)
        for suite in (suite for suite in told.suites if suite in {*SUITES, *ATTACKED}):
            yield f"{key}.suites: {suite!r} is a suite of the lab; call it otherwise in your table"
        splits = told.splits if told.source in SOURCES else ()
        for place in ((split, suite) for split in splits for suite in told.suites):
            if (other := homes.setdefault(place, name)) != name:
                yield (
                    f"{key}.suites: {place[1]!r} has its {place[0]} split from datasets.{other}; "
                    "leave it out of one of them, or give them other shares"
                )
    if params.profile in params.profiles:
        yield from _not_shared(params, homes)


def _bad_source(key: str, told: DatasetParams, seed: int) -> Iterator[str]:
    """Check what can be known of a data set without reading it."""
    from hauberk.data.shares import check_shares
    from hauberk.data.sources import SOURCES

    if told.source not in SOURCES:
        yield from _unknown(f"{key}.source", [told.source], SOURCES)
        return
    source = SOURCES[told.source]
    folders = {name for name, option in source.options.items() if option.allowed is Path}
    plain = {name: value for name, value in told.options.items() if name not in folders}
    try:
        source.asked(told.source, told.split, seed, plain)
        if told.shares is not None:
            check_shares(told.shares)
    except BadParams as error:
        yield f"{key}: {str(error).rstrip('.')}"
    named = {"where": told.where, **{f"options.{n}": told.options.get(n) for n in folders}}
    for name, place in named.items():
        if place is None:
            continue
        parts = PurePosixPath(str(place)).parts
        if parts[:1] != ("data",) or len(parts) < 2 or ".." in parts:
            yield (
                f"{key}.{name}: {place!r} is wrong: the stages follow the files in data/ only; put "
                f"them into a folder such as 'data/{key.partition('.')[2]}'"
            )
    if told.where is None and not source.hub:
        yield f"{key}.where: missing: {told.source!r} is not on the hub; name a folder below data/"
    elif told.where is None and told.revision is None:
        yield (
            f"{key}.revision: missing: what comes from the hub may change; name a commit of "
            f"{source.hub}"
        )


def _not_shared(params: Params, homes: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """A suite must have the splits that sections ask it for."""
    declared = {suite: name for (_, suite), name in homes.items()}
    for each in wanted(params):
        if each.suite in declared and (each.split, each.suite) not in homes:
            name = declared[each.suite]
            had = ", ".join(split for split, suite in homes if suite == each.suite)
            yield (
                f"{each.key}: {each.suite!r} has samples of {had} alone, and the split "
                f"{each.split!r} is asked of it; give {each.split!r} a share in "
                f"datasets.{name}.shares"
            )


def _bad_budget(key: str, profile: Profile) -> Iterator[str]:
    for size in ("samples", "calibration"):
        attacked, drawn = getattr(profile.attack, size), getattr(profile.data, size)
        if attacked > drawn:
            yield (
                f"{key}.attack.{size}: {attacked} is wrong: pictures of drawn samples are "
                f"attacked, and data.{size} draws {drawn} of them"
            )


def _bad_attack(params: Params, drawn: Kinds, made: Kinds) -> Iterator[str]:
    """A choice on attacked pictures needs some."""
    yield from _unknown("attack.suite", [params.attack.suite], drawn)
    declared = {suite for told in params.datasets.values() for suite in told.suites}
    if params.attack.target is None and params.attack.suite in declared:
        yield (
            f"attack.target: missing: {params.attack.suite!r} does not tell how it would be "
            "answered, as suites of the lab do; say with what words, such as 'Sure, here is'"
        )
    kind = drawn.get(params.attack.suite)
    if kind and not (kind.pictured and kind.expected == "refuse"):
        yield (
            f"attack.suite: {params.attack.suite!r} has no pictures beside harmful requests, which "
            "are what is attacked; name a suite that has"
        )
    named = {f"defenses.{name}.calibrate_on": each.calibrate_on
             for name, each in params.defenses.items()}  # fmt: skip
    named["guardalign.calibrate_on"] = params.guardalign.calibrate_on
    named["davsp.validate_on"] = params.davsp.validate_on
    named["tga.validate_on"] = params.tga.validate_on
    for key, suites in named.items():
        for suite in (suite for suite in suites if suite in made):
            for name, profile in params.profiles.items():
                if not profile.attack.calibration:
                    yield (
                        f"{key}: {suite!r} has no pictures of the calibration split; say in "
                        f"profiles.{name}.attack.calibration how many are attacked"
                    )


def _bad_suites(key: str, names: list[str], known: Kinds) -> Iterator[str]:
    yield from _unknown(key, names, known)
    yield from _repeated(key, names)


def _bad_gap(params: Params, drawn: Kinds) -> Iterator[str]:
    told = params.gap
    measured = {"harmful": told.harmful} | ({} if told.words is None else {"words": told.words})
    for key, suite in measured.items():
        if suite not in params.suites:
            yield (
                f"gap.{key}: {suite!r} is not among `suites`, on which it is measured; put it there"
            )
    for key, suite in told.read.items():
        yield from _unknown(f"gap.{key}", [suite], drawn)
    for key, expected in (("harmful", "refuse"), ("harmless", "answer")):
        suite = getattr(told, key)
        if (kind := drawn.get(suite)) and not (kind.pictured and kind.expected == expected):
            yield f"gap.{key}: {suite!r} is no suite of {key} words beside a picture; name one"
    if (kind := drawn.get(told.captions or "")) and not (kind.pictured and kind.told):
        yield f"gap.captions: nobody told the pictures of {told.captions!r} in words; name others"
    for name, profile in params.profiles.items():
        if profile.data.anchor < told.requests:
            yield (
                f"gap.requests: {told.requests} is more than the {profile.data.anchor} rows "
                f"of profiles.{name}.data.anchor; as many or fewer are right"
            )


def _bad_defense(key: str, name: str, defense: ShiftParams, suites: _Drawn) -> Iterator[str]:
    drawn, made = suites
    if name in made:
        yield f"{key}: artifacts/MODEL/{name} holds attacked pictures; give it another name"
    if name == UNDEFENDED:
        yield f"{key}: {name!r} is the undefended model; give the defense another name"
    if name in (GUARDALIGN, DAVSP, TGA) or is_part(name):
        yield f"{key}: {name!r} is made by stages of its own; give this defense another name"
    if name == "gap":
        yield f"{key}: artifacts/MODEL/gap holds the analysis of the gap; give it another name"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield f"{key}: {name!r} becomes a folder and a name; use letters, digits, _ and - only"
    yield from _unknown(f"{key}.anchors", defense.anchors, drawn)  # nothing else has this split
    yield from _repeated(f"{key}.anchors", defense.anchors)
    plain = [s for s in defense.anchors if (kind := drawn.get(s)) and not kind.pictured]
    if plain:
        yield f"{key}.anchors: {plain} have no pictures, so that there is no shift to estimate"
    yield from _bad_calibration(f"{key}.calibrate_on", defense.calibrate_on, {**drawn, **made})


def _bad_calibration(key: str, suites: list[str], known: Kinds) -> Iterator[str]:
    yield from _bad_suites(key, suites, known)
    named = [suite for suite in suites if suite in known]
    kinds = [kind for suite in named if (kind := known[suite])]
    if graded := [suite for suite in named if (kind := known[suite]) and kind.graded]:
        yield (
            f"{key}: a choice counts right answers, and only a judge can say how good those to "
            f"{', '.join(graded)} are; name other suites"
        )
    if not kinds or len(kinds) < len(named):  # of a data set that is not read yet
        return
    expected = {kind.expected for kind in kinds}
    for missing, what in (("answer", "benign suite"), ("refuse", "suite of harmful requests")):
        if missing not in expected:
            yield f"{key}: {named} hold no {what}; a choice weighs both kinds"
    if not any(kind.pictured for kind in kinds):
        yield f"{key}: {named} have no pictures, so that nothing would be defended"


def _bad_transport(key: str, bank: BankParams) -> Iterator[str]:
    if (bank.benign_scenes or inf) * bank.masked_share * bank.transport.grid**2 < 1:
        yield (
            f"{key}.benign_scenes: {bank.benign_scenes} pictures of {bank.transport.grid**2} "
            f"patches are too few to mask {bank.masked_share:g} of them; give more"
        )
    yield from _repeated(f"{key}.transport.scales", bank.transport.scales)


def _bad_benign(key: str, bank: BankParams, folder: Path) -> Iterator[str]:
    """A threshold that was set on other pictures than a bank is for means nothing."""
    here, needless = ("benign_scenes", "benign_pictures")[:: 1 if bank.concepts == "lab" else -1]
    if getattr(bank, needless) is not None:
        yield (
            f"{key}.{needless}: {getattr(bank, needless)!r} is wrong: concepts {bank.concepts!r} "
            f"set their threshold on {here}; null is right"
        )
    if bank.concepts == "lab":
        if bank.benign_scenes is None:
            yield f"{key}.benign_scenes: missing; say how many pictures of the lab it is set on"
        return
    home, told = PurePosixPath(folder), bank.benign_pictures
    if told is None:
        yield (
            f"{key}.benign_pictures: missing: concepts 'real' set their threshold on harmless "
            "pictures of yours, like those that will be asked about; put some hundreds, png, jpg "
            f"or webp, into a folder such as '{home}/benign' and name it here"
        )
    elif home not in PurePosixPath(told).parents or ".." in PurePosixPath(told).parts:
        yield (
            f"{key}.benign_pictures: {told!r} is wrong: the stages follow the files in "
            f"{str(home)!r} only; put the pictures into a folder there"
        )


def _bad_grids(key: str, grids: GridSweep, clip: str, bank: BankParams) -> Iterator[str]:
    yield from _repeated(f"{key}.sides", grids.sides)
    patches = 4 * grids.pictures * min(bank.transport.grid, *grids.sides) ** 2
    if patches * bank.masked_share < 1:
        yield (
            f"{key}.pictures: {grids.pictures} are wrong: four times as many have {patches} "
            f"patches, too few to mask {bank.masked_share:g} of them as concept_banks.{clip} "
            "does; give more"
        )


def _bad_guardalign(params: Params, known: Kinds, root: Path) -> Iterator[str]:
    guard = params.guardalign
    yield from _bad_models("guardalign.models", guard.models, params)
    yield from _unknown("guardalign.clip", [guard.clip], params.concept_banks)
    yield from _bad_calibration("guardalign.calibrate_on", guard.calibrate_on, known)
    yield from _unknown("guardalign.parts_on", guard.parts_on, params.suites)
    yield from _repeated("guardalign.parts_on", guard.parts_on)
    yield from _repeated("guardalign.variants", guard.variants)
    for index, prefix in enumerate(guard.variants):
        key = f"guardalign.variants.{index}"
        if prefix.placement == "answer" and prefix.text != prefix.text.rstrip():
            yield (
                f"{key}.text: {prefix.text!r} ends in a space, behind which no model begins a "
                f"word; {prefix.text.rstrip()!r} is right for an answer"
            )
        yield from _bad_layers(key, prefix.layers or [], params, root)


def _bad_models(key: str, names: list[str], params: Params) -> Iterator[str]:
    yield from _unknown(key, names, params.models)
    yield from _repeated(key, names)


def _bad_davsp(params: Params, suites: _Drawn, root: Path) -> Iterator[str]:
    drawn, made = suites
    told = params.davsp
    yield from _bad_models("davsp.models", told.models, params)
    if unmasked := [name for name in told.models if name not in params.guardalign.models]:
        yield (
            f"davsp.models: {unmasked} are not among guardalign.models, whose mask is measured "
            "before their frames; put them there"
        )
    if told.models and params.gap.harmful not in told.parts_on:
        yield (
            f"davsp.parts_on: gap.harmful, {params.gap.harmful!r}, is missing, by which frames are "
            "compared on other models; put it there"
        )
    yield from _unknown("davsp.frames", list(told.frames), params.models)
    yield from _bad_calibration("davsp.validate_on", told.validate_on, {**drawn, **made})
    if attacked := [suite for suite in told.validate_on if suite in made]:
        yield f"davsp.validate_on: {attacked} are made against a model; name drawn suites"
    if told.models and "cmrm" not in params.defenses:
        yield "davsp: it is measured together with defenses.cmrm, which is not there; put it back"
    joint = told.joint.canvas is not None and told.joint.margins is not None
    for name, profile in params.profiles.items():
        if profile.frame.joint_steps and not joint:
            yield (
                f"profiles.{name}.frame.joint_steps: davsp.joint does not say where a frame of "
                "several models is; give its canvas and margins"
            )
    yield from _unknown("davsp.parts_on", told.parts_on, params.suites)
    yield from _repeated("davsp.parts_on", told.parts_on)
    yield from _repeated("davsp.attacked_at", told.attacked_at)
    for key, expected, names in (
        ("davsp.harm.harmful", "refuse", told.harm.harmful),
        ("davsp.harm.harmless", "answer", told.harm.harmless),
        ("davsp.harmful", "refuse", told.harmful),
        ("davsp.harmless", "answer", told.harmless),
    ):
        yield from _unknown(key, names, drawn)
        for name in dict.fromkeys(names):
            if (kind := drawn.get(name)) is None:
                continue
            if kind.expected != expected:
                right = "harmful requests" if expected == "refuse" else "harmless requests"
                yield f"{key}: {name!r} is no suite of {right}; put it on the other side"
            if not kind.pictured:
                yield f"{key}: {name!r} has no pictures, around which a frame could be"
    if told.harm.layer is not None:
        yield from _bad_layers("davsp.harm", [told.harm.layer], params, root)
    for key, frame in (
        *((f"frames.{name}", frame) for name, frame in told.frames.items()),
        ("joint", told.joint),
    ):
        if frame.canvas is None or frame.margins is None:
            continue
        (height, width), (top, right, bottom, left) = frame.canvas, frame.margins
        if top + bottom >= height or left + right >= width or not any(frame.margins):
            yield (
                f"davsp.{key}.margins: {frame.margins} leave no frame or no room for an "
                f"image on a canvas of {height} x {width}"
            )


def _bad_tga(params: Params, suites: _Drawn, root: Path) -> Iterator[str]:
    drawn, made = suites
    told = params.tga
    yield from _bad_models("tga.models", told.models, params)
    yield from _unknown("tga.index.clip", [told.index.clip], params.concept_banks)
    yield from _bad_calibration("tga.validate_on", told.validate_on, {**drawn, **made})
    yield from _unknown("tga.parts_on", told.parts_on, params.suites)
    yield from _repeated("tga.parts_on", told.parts_on)
    yield from _repeated("tga.alphas", told.alphas)
    yield from _repeated("tga.bounded", told.bounded or [])
    for name in told.bounded or []:
        kind = {**drawn, **made}.get(name)
        if name not in told.validate_on or (kind and kind.expected != "answer"):
            yield f"tga.bounded: {name!r} is no benign suite of tga.validate_on; name one, or null"
    for key, names in (
        ("tga.aligned", told.aligned),
        ("tga.answered", told.answered),
        ("tga.index.snippets", told.index.snippets),
    ):
        yield from _unknown(key, names, drawn)
    for name in dict.fromkeys(told.aligned):
        if (kind := drawn.get(name)) and not kind.told:
            yield f"tga.aligned: nobody told the pictures of {name!r} in words; name others"
    for name in dict.fromkeys(told.answered):
        if (kind := drawn.get(name)) and kind.expected == "refuse":
            yield f"tga.answered: {name!r} is a suite of harmful requests; name harmless ones"
    for name in told.variants:
        if not re.fullmatch(rf"{TRAINED_BESIDE}[A-Za-z0-9_-]+", name):
            yield f"tga.variants.{name}: the name begins with {TRAINED_BESIDE!r}, of letters and _"
    for name, profile in params.profiles.items():
        key = f"profiles.{name}.projector.variants"
        yield from _unknown(key, profile.projector.variants, told.variants)
        yield from _repeated(key, profile.projector.variants)
    every = {"alignment": told.alignment}
    every |= {f"variants.{name}": variant for name, variant in told.variants.items()}
    for name, alignment in every.items():
        if isinstance(alignment.layers, list):
            yield from _bad_layers(f"tga.{name}", alignment.layers, params, root)
        if alignment.form == "kl" and alignment.position == "image":
            yield f"tga.{name}: no word follows an image's position; form 'kl' takes 'decision'"
        if alignment.form == "kl" and alignment.layers != "last":
            yield f"tga.{name}: the head reads the last block alone; form 'kl' takes layers 'last'"
    if told.training.last is not None:
        yield from _bad_layers("tga.training.last", [told.training.last], params, root)


def _bad_safety_layers(params: Params, root: Path) -> Iterator[str]:
    width = params.safety_layers.width
    for model in params.models:
        blocks = _blocks_of(root / params.folder_of(model) / "config.json")
        if width and blocks and width > blocks:
            yield (
                f"safety_layers.width: {width} is wrong: {model} has {blocks} decoder blocks; as "
                "many or fewer are right"
            )


def _bad_model(key: str, name: str, path: str | None, params: Params) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield (
            f"{key}: {name!r} becomes a folder and a name; use letters, digits, _ and - only: to "
            "DVC a dot leads into a section"
        )
    if name in TAKEN:
        yield f"{key}: artifacts/{name} holds {TAKEN[name]}; give the model another name"
    right = params.folder_of(name).as_posix()
    if path is not None and path != right:
        yield (
            f"{key}.path: {path!r} is wrong: the stages follow the files of a model in the "
            f"folder of its name in `checkpoints` only, {right!r}; put the model there, or leave "
            "the key out"
        )


def _bad_served(key: str, name: str, told: ServedParams, params: Params) -> Iterator[str]:
    from hauberk.endpoint import EndpointSetting
    from hauberk.unserved import CHANGES

    yield from _bad_model(key, name, None, params)
    if name in (*params.models, *params.concept_banks):
        yield f"{key}: a model or a CLIP that runs here is called so; give this one another name"
    # No value is shown: it may be a key that somebody wrote where its variable should stand.
    known = [each.name for each in fields(EndpointSetting) if each.name != "cache"]
    unknown = [f"endpoint.{each}" for each in told.endpoint if each not in known]
    missing = [f"endpoint.{each}" for each in ("url", "model") if each not in told.endpoint]
    for each in unknown:
        yield f"{key}.{each}: unknown key; known here are {', '.join(known)}"
    for each in missing:
        yield f"{key}.{each}: missing"
    if not (unknown or missing):
        try:
            EndpointSetting(**told.endpoint)
        except ValueError as error:
            yield f"{key}.endpoint.{str(error).removesuffix('.')}"
    if not (params.davsp.models and params.guardalign.models):  # DVC follows whole folders
        yield f"{key}: davsp.models and guardalign.models, which guard it, name no model; name one"
    yield from _repeated(f"{key}.defenses", told.defenses)
    changes = {**dict.fromkeys(params.defenses, CHANGES["cmrm"]), TGA: CHANGES[TGA]}
    fitted = {DAVSP: params.davsp.models, GUARDALIGN: params.guardalign.models}
    right = [f"{method}@{model}" for method, models in fitted.items() for model in models]
    for defense in told.defenses:
        method = defense.partition("@")[0]
        begun = [v.text for v in params.guardalign.variants if v.placement == "answer"]
        if method == GUARDALIGN and begun:
            yield (
                f"{key}.defenses: {defense!r} could begin the answer ({begun[0]!r}), which a "
                "served model does itself; take the guardalign.variants of placement 'answer' out"
            )
        elif method in changes:
            yield f"{key}.defenses: {defense!r} cannot guard a served model: {changes[method]}"
        else:
            yield from _unknown(f"{key}.defenses", [defense], right)


def _bad_gate(params: Params, kinds: Kinds) -> Iterator[str]:
    from registry.errors import BadRule
    from registry.gate import rules_from

    try:
        rules = rules_from(params.gate)
    except BadRule as error:
        yield from map(str.strip, str(error).removeprefix("params.yaml:").strip().splitlines())
        return
    for index, rule in enumerate(rules):
        yield from _unknown(f"gate.{index}.suite", [rule.suite], [*params.suites, "all"])
        if rule.suite == "all":  # the evaluation as a whole
            yield from _unknown(f"gate.{index}.metric", [rule.metric], METRICS["all"])
        elif rule.suite in params.suites and (kind := kinds.get(rule.suite)):
            known = (*METRICS[kind.expected], *METRICS["either"])
            yield from _unknown(f"gate.{index}.metric", [rule.metric], known)
        if rule.metric in _PLAIN and (rule.bound != "value" or rule.against == UNDEFENDED):
            yield (
                f"gate.{index}: {rule.metric} has neither an interval nor a paired difference; "
                "limit its value, or against production"
            )


def _bad_judges(params: Params, known: Kinds, root: Path) -> Iterator[str]:
    from hauberk.errors import BadJudge
    from hauberk.evaluation.judges import checked, checked_grader

    told = params.judges
    for place, spec in (("first", told.first), ("second", told.second)):
        try:
            checked(spec)
        except BadJudge as error:
            yield f"judges.{place}: {str(error).removesuffix('.')}"
            continue
        if spec["kind"] != "guard":
            continue
        path = spec["path"]
        if (root / path).exists() or not spec.get("revision"):
            if not _lies_in(GUARD_MODELS, path):
                yield (
                    f"judges.{place}.path: {path!r} is wrong: the stages follow the files of a "
                    f"guard in {str(GUARD_MODELS)!r} only; put the guard model into a folder "
                    "there, or give the `revision` of a repository of that name"
                )
            elif not (root / path / "config.json").is_file():
                yield (
                    f"judges.{place}.path: {path!r} holds no config.json; put the guard model "
                    "there, or give the `revision` of a repository of that name"
                )
    if told.labels is not None:
        if PurePosixPath(told.labels) != LABELS and not _lies_in(LABELS, told.labels):
            yield (
                f"judges.labels: {told.labels!r} is wrong: the report follows the sheets in "
                f"{str(LABELS)!r} only; put them there and name it, or say null"
            )
        elif not (root / told.labels).is_dir():
            yield f"judges.labels: {told.labels!r} is no folder; put the sheets there, or say null"
    graded = [suite for suite in params.suites if (kind := known.get(suite)) and kind.graded]
    if told.grader is None and graded:
        yield no_grader(graded)
    if told.grader is not None:
        try:
            checked_grader(told.grader)
        except BadJudge as error:
            yield f"judges.grader: {str(error).removesuffix('.')}"
    for index, rule in enumerate(params.gate if told.second != Judges().second else []):
        if "_keyword" in str(rule.get("metric")):
            yield (
                f"gate.{index}.metric: {rule['metric']!r} is of the keyword judge, and "
                f"judges.second is of kind {told.second.get('kind')!r}; name another metric"
            )


def no_grader(suites: Collection[str]) -> str:
    """Say that suites need a grader where there is none, and what to add."""
    return (
        f"judges.grader: missing: only a judge can grade the answers to {', '.join(suites)}; name "
        "a served model, such as {kind: endpoint, url: http://localhost:8000/v1, model: NAME}, or "
        "take them out of `suites`"
    )


def _lies_in(home: PurePosixPath, path: str) -> bool:
    return home in PurePosixPath(path).parents and ".." not in PurePosixPath(path).parts


def _unknown(key: str, names: Collection[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}: {name!r} is not one of {', '.join(known)}"


def _repeated(key: str, values: Sequence[Any]) -> Iterator[str]:
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield f"{key}: {value!r} stands there more than once; once is right"


def _bad_layers(key: str, layers: Sequence[int], params: Params, root: Path) -> Iterator[str]:
    yield from _repeated(f"{key}.layers", layers)
    for model in params.models:
        blocks = _blocks_of(root / params.folder_of(model) / "config.json")
        outside = [n for n in layers if n < 0 or (blocks and n >= blocks)]
        if outside:
            last = "..." if blocks is None else blocks - 1
            yield f"{key}.layers: {outside} are outside 0..{last}, the decoder blocks of {model}"


def _blocks_of(config: Path) -> int | None:
    """The number of decoder blocks as its config tells; None where it does not."""
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        found = content.get("text_config", content).get("num_hidden_layers")
    except (ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    return found if isinstance(found, int) else None
