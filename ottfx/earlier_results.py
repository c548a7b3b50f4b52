"""Results of an earlier run: read from their files, and used again where nothing that they depend on has changed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ottfx.errors import ArtifactError, ConfigError
from ottfx.result_arrays import ArraysReader
from ottfx.results import Conditions, Result, Variant, options_in_json
from ottfx.retrieval import Sample, Score


def read_results(path: str | Path) -> list[Result]:
    """Read the results that `ottfx.results.write_results` wrote, as far as they are whole.

    Args:
        path: as for `write_results`: the JSON file, or the path without a suffix. The .npz file stands beside it.

    Returns:
        The results; none if there is no such file. One whose arrays belong to a later measurement, because the run was
        broken off between the two files, is left out.

    Raises:
        ArtifactError: the file is not JSON, its objects are not results of this version of ottfx, or their arrays are
            not beside it.
    """
    file = Path(path).with_suffix(".json")
    if not file.is_file():
        return []
    arrays = ArraysReader(file.with_suffix(".npz"))
    results = []
    try:
        for row in json.loads(file.read_text(encoding="utf-8")):
            metrics = arrays.metrics(row["label"])
            if math.isclose(metrics.mean_kl, row["mean_kl"], rel_tol=1e-9):
                results.append(_result(row, metrics=metrics, fidelity=arrays.fidelity(row["label"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"ottfx.read_results: expected results of this version of `ottfx eval`. Got {str(file)!r}, which cannot be "
            f"continued ({type(error).__name__}: {error}). Choose another path, or replace them (ottfx eval --fresh)."
        ) from error
    return results


def check_same_conditions(earlier: Iterable[Result], conditions: Conditions) -> None:
    """Refuse to put results side by side that were not measured under the same conditions, but for the date.

    Raises:
        ConfigError: some result has others. The text names every difference.
    """
    now = dataclasses.asdict(conditions)
    for result in earlier:
        then = dataclasses.asdict(result.conditions)
        changed = [f"{name}: {then[name]!r} then, {now[name]!r} now" for name in now if then[name] != now[name]]
        changed = [line for line in changed if not line.startswith("date:")]
        if changed:
            raise ConfigError(
                f"ottfx.evaluate: the earlier result {result.label!r} must have the conditions of this run. "
                f"Got {'; '.join(changed)}. Choose another path, or replace the earlier results (ottfx eval --fresh)."
            )


def find_finished(
    earlier: Iterable[Result], variant: Variant, tasks: Mapping[str, Sequence[Sample]], sqnr: bool = False
) -> Result | None:
    """Return the earlier result of a variant, if it lacks nothing that is asked for; None: it has to be measured.

    Args:
        earlier: results under the same conditions.
        variant: what is asked for.
        tasks: name -> samples; the result must have been asked as many of each.
        sqnr: whether the result must have its fidelity.

    Raises:
        ConfigError: the label stands for other options in the earlier results.
    """
    for result in earlier:
        if result.label != variant.label:
            continue
        if result.options != options_in_json(variant.options):
            raise ConfigError(
                f"ottfx.evaluate: a label must stand for the same options in all results. Got {variant.label!r} with "
                f"{options_in_json(variant.options)!r} now and {dict(result.options)!r} earlier. Choose another label."
            )
        asked = {name: len(samples) for name, samples in tasks.items()}
        answered = {name: score.asked for name, score in result.tasks.items()}
        whole = asked.items() <= answered.items() and (result.fidelity is not None or not sqnr)
        return result if whole else None
    return None


_APART = ("conditions", "sqnr")
"""What is read in another way than the numbers and the scores of a row."""


def _result(row: Mapping[str, Any], **arrays: Any) -> Result:
    known = {f.name: f.type for f in dataclasses.fields(Result)}
    numbers = {name: value for name, value in row.items() if name in known and name not in _APART}
    # The text of the annotation: `from __future__ import annotations` is on in results.py.
    numbers = {name: math.nan if value is None and known[name] == "float" else value for name, value in numbers.items()}
    scores = {name: _score(value) for name, value in row.items() if name not in known and name not in _APART}
    return Result(**numbers, tasks=scores, conditions=Conditions(**row["conditions"]), **arrays)


def _score(text: str) -> Score:
    right, asked = text.split("/")
    return Score(right=int(right), asked=int(asked))
