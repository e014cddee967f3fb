"""Stage evaluate: test suites, a model and a defense (or none) -> responses and metrics.

in   artifacts/data/test/*, artifacts/MODEL/adversarial, the model, artifacts/MODEL/DEFENSE/bundle
     (unless DEFENSE is none)
out  artifacts/MODEL/DEFENSE/evaluation/   responses.jsonl, metrics.json, metrics.parquet, card.json

With ``evaluate.processes`` the samples are divided among so many processes, each with the model.
All answers are judged once the model is done and gone, by the judges of params.yaml.  Finished
responses are kept in .scratch/ until the stage is complete; a run that was killed goes
on after the last of them, as long as data, model, defense, settings, code and packages are the
same.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk import UNDEFENDED
from tasks.judging import check_keys, judged
from tasks.params import Params
from tasks.stage import (
    DATA,
    SCRATCH,
    attacked_folder,
    bundle_folder,
    code_hash,
    evaluation_folder,
    load_model,
    main,
    read_json,
    release,
    spread,
    tested_files,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from hauberk.evaluation.run import Record


def run(params: Params, model_name: str, defense_name: str) -> Path:
    """Answer and judge every test sample; write responses and metrics."""
    from tqdm import tqdm

    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from hauberk.defenses import load
    from hauberk.errors import BadParams
    from hauberk.evaluation.run import differing_alone, evaluate
    from hauberk.evaluation.shards import FromDisk, evaluate_sharded

    known = UNDEFENDED, *params.evaluated_on(model_name)
    if defense_name not in known:
        names = ", ".join(known)
        raise BadParams(f"defenses.{defense_name}: unknown; of {model_name} known are {names}.")
    check_keys(params)
    bundle = None if defense_name == UNDEFENDED else bundle_folder(model_name, defense_name)

    def loaded() -> tuple[Any, Any, Any]:
        model, processor = load_model(params, model_name)
        return model, processor, load(bundle, model, processor) if bundle else None

    model, processor, defense = loaded()
    identity = _sha256((bundle / "card.json").read_bytes()) if bundle else UNDEFENDED
    binding = binding_of(model, processor)
    files = tested_files(model_name, params.suites)
    samples = [sample for file in files for sample in read_suite(file)]
    key = journal_key(params, model_name, asdict(binding), identity)
    scratch = SCRATCH / f"evaluate@{model_name}@{defense_name}"
    with tqdm(total=len(samples), desc=f"{model_name} with {defense_name}") as bar:
        told: dict[str, Any] = {
            "names": (model_name, defense_name),
            "max_new_tokens": params.evaluate.max_new_tokens,
            "batch_size": params.evaluate.batch_size,
            "progress": bar.update,
        }
        journals = scratch / key[:16]
        if params.evaluate.processes == 1:
            journal = journals / "responses.jsonl"
            records = evaluate(model, processor, samples, defense, journal=journal, **told)
        else:
            del model, processor, defense  # the processes need their place
            release()
            records = evaluate_sharded(
                FromDisk(params.folder_of(model_name), bundle, params.models[model_name].loading),
                samples,
                shards=params.evaluate.processes,
                folder=journals,
                threads=params.threads,
                **told,
            )
            model, processor, defense = loaded()
    again = spread(samples, params.evaluate.checked_alone)
    limit = params.evaluate.max_new_tokens
    differing = differing_alone(model, processor, again, records, defense, max_new_tokens=limit)
    del model, processor, defense  # a judge may need their place
    records = judged(params, {defense_name: records}, samples)[defense_name]
    folder = evaluation_folder(model_name, defense_name)
    card = {
        "model": model_name,
        "defense": defense_name,
        "binding": asdict(binding),
        "bundle": identity,
        "generation": params.evaluate.told,
        "versions": versions(),
        "responses": len(records),
        "checked_alone": len(again),
        "differing_alone": differing,
    }
    write_evaluation(folder, records, card)
    shutil.rmtree(scratch, ignore_errors=True)  # with what older code or data have left
    return folder


def write_evaluation(folder: Path, records: "Sequence[Record]", card: dict[str, Any]) -> None:
    """Write responses and their metrics."""
    import pandas as pd

    from hauberk.evaluation.metrics import metric_rows
    from hauberk.evaluation.run import write_records

    rows = metric_rows(records)
    with writing(folder, card) as partial:
        write_records(records, partial / "responses.jsonl")
        write_json(rows, partial / "metrics.json")
        pd.DataFrame(rows).to_parquet(partial / "metrics.parquet", index=False)


def journal_key(params: Params, model_name: str, binding: dict[str, Any], bundle: str) -> str:
    """Hash what an answer depends on, so that only a journal of the same answers is taken up."""
    from hauberk.bundle import versions

    parts = (
        binding, bundle, params.evaluate.told, params.models[model_name], params.threads,
        versions(), _data_hash(params, model_name), code_hash(),
    )  # fmt: skip
    return _sha256(repr(parts).encode())


def _data_hash(params: Params, model_name: str) -> str:
    from hauberk.data.lab import ATTACKED

    made = [attacked_folder(model_name, suite) for suite in params.suites if suite in ATTACKED]
    return _sha256(repr([read_json(folder / "card.json") for folder in (DATA, *made)]).encode())


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main("evaluate", run, "model", "defense")
