"""Stage attack_safety_prompt: pictures attacked through the frame, and without one.

in   artifacts/MODEL/davsp/bundle, artifacts/data/test/*, the model
out  artifacts/MODEL/davsp/attacked/   metrics.json (unsafe rates by radius and defense), card.json

The attacker knows the model and the frame, and changes the picture inside within a radius so that
the model complies; beside it stands the same attack on the undefended model.  Pictures are brought
to the size that they have in the frame first, so that no resampling undoes what was changed.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hauberk import UNDEFENDED
from tasks.attack import wanted_answers
from tasks.judging import check_keys, judged
from tasks.params import DAVSP, Params
from tasks.stage import ARTIFACTS, bundle_folder, load_model, main, suite_file, write_json, writing


def run(params: Params, model_name: str) -> Path:
    """Attack the first test pictures at every radius; judge what is answered to them."""
    from tqdm import tqdm

    from hauberk.attacks.pgd import Pgd, attack
    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from hauberk.defenses import load
    from hauberk.evaluation.metrics import metric_rows
    from hauberk.evaluation.run import judge_response
    from hauberk.requests import respond

    check_keys(params)
    model, processor = load_model(params, model_name)
    prompt = load(bundle_folder(model_name, DAVSP), model, processor)
    samples = read_suite(suite_file(model_name, "test", params.attack.suite))
    samples = samples[: params.budget.frame.attacked]
    wanted = wanted_answers(params, model_name, samples)
    arms = {
        UNDEFENDED: (None, [_fed(processor, sample) for sample in samples]),
        DAVSP: (prompt, [_inside(prompt, sample) for sample in samples]),
    }
    runs: dict[tuple[int, str], list[Any]] = {}
    radii = params.davsp.attacked_at if params.explains(model_name) else []
    bar = tqdm(total=len(arms) * len(radii) * len(samples), desc=f"{model_name}: attacked frames")
    for epsilon in radii:
        setting = Pgd(
            epsilon=epsilon,
            step_size=max(1, epsilon // 4),  # of the paper, see Pgd
            steps=params.budget.attack.steps if epsilon else 0,
            tokens=params.attack.tokens,
            confidence=params.attack.confidence,
            seed=params.seed,
        )
        for name, (defense, requests) in arms.items():
            found = attack(
                model,
                processor,
                requests,
                wanted,
                setting,
                defense=defense,
                batch_size=params.evaluate.batch_size,
                progress=bar.update,
            )
            changed = [
                replace(request, images=(one.image,))
                for request, one in zip(requests, found, strict=True)
            ]
            answers = respond(
                model,
                processor,
                changed,
                defense,
                max_new_tokens=params.evaluate.max_new_tokens,
                batch_size=params.evaluate.batch_size,
            )
            runs[epsilon, name] = [
                judge_response(sample, answer, model=model_name, defense=name)
                for sample, answer in zip(samples, answers, strict=True)
            ]
    bar.close()
    rows = [
        {"epsilon": epsilon, **row}
        for (epsilon, _), records in judged(params, runs, samples).items()
        for row in metric_rows(records)
        if row["metric"] == "unsafe_rate"
    ]
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "steps": params.budget.attack.steps,
        "versions": versions(),
    }
    folder = ARTIFACTS / model_name / DAVSP / "attacked"
    with writing(folder, card) as partial:
        write_json(rows, partial / "metrics.json")
    return folder


def _fed(processor: Any, sample: Any) -> Any:
    from hauberk.pixels import as_fed

    request = sample.request
    return replace(request, images=tuple(as_fed(processor, each) for each in request.images))


def _inside(prompt: Any, sample: Any) -> Any:
    """Bring a picture to the size that it has in the frame."""
    from PIL import Image

    rows, columns = prompt.geometry.held
    canvas = prompt.geometry.place(sample.image)[:, rows, columns]
    picture = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())
    return replace(sample.request, images=(picture,))


if __name__ == "__main__":
    main("attack_safety_prompt", run, "model")
