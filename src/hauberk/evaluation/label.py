"""Labels by hand: a sheet of answers to fill in, and what it says of the judges.

No judge is right always, and two that agree may both be wrong.  So some answers are drawn, people
label them without seeing what any judge said, or which defense answered
(:mod:`hauberk.evaluation.label_sheet`), and each judge's sensitivity and specificity on them
corrects the rates that it counted (:mod:`hauberk.evaluation.label_correction`).
"""

from collections.abc import Sequence
from pathlib import Path

from hauberk.errors import BadData
from hauberk.evaluation.label_correction import corrected, unrepresented
from hauberk.evaluation.label_sheet import UNCLEAR, read_sheet, write_sheet
from hauberk.evaluation.run import Record, read_records


def label_write(
    responses: Sequence[Path], sheet: Path, *, n: int, seed: int = 0, suites: Sequence[Path] = ()
) -> int:
    """Write a sheet from files of responses; the pictures come from files of suites.

    Returns
    -------
    int
        How many answers there are to label.

    Raises
    ------
    BadData, BadParams
        If a file is missing or cannot be read, or as :func:`write_sheet` says.
    """
    from hauberk.data.samples import read_suite

    records = _records(responses)
    pictures = {
        sample.sample_id: sample.image
        for path in suites
        for sample in read_suite(path)
        if sample.image is not None
    }
    return write_sheet(records, sheet, n=n, seed=seed, pictures=pictures)


def label_read(sheet: Path, responses: Sequence[Path]) -> dict[str, object]:
    """Read a sheet back, and correct the rates of the responses that it was drawn from.

    Returns
    -------
    dict
        ``rows``, ``labelled`` and ``unclear`` count what is on the sheet, ``unrepresented`` the
        answers for which nothing on it stands; ``metrics`` holds the rows of :func:`corrected`.

    Raises
    ------
    BadData
        If a file is missing or cannot be read, or the two do not belong together.
    """
    found, records = read_sheet(sheet), _records(responses)
    return {
        "rows": found.rows,
        "labelled": len(found.labels),
        "unclear": sum(label == UNCLEAR for label in found.labels.values()),
        "unrepresented": unrepresented(records, found),
        "metrics": corrected(records, found),
    }


def _records(paths: Sequence[Path]) -> list[Record]:
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise BadData(f"{missing[0]}: no such file; give a responses.jsonl of an evaluation.")
    return [record for path in paths for record in read_records(path)]
