"""Mix several data sets into one, whose documents come from its parts in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from sae_training.text.bars import bars_of_datasets
from sae_training.text.columns import has_transform, is_plain
from sae_training.text.documents import Documents
from sae_training.text.masks import MASKS
from sae_training.text.open import open_documents
from sae_training.text.row_values import BadRows, Given

# Fixed, because a resumed run needs the documents of a mixture in the same order.
_MIXTURE_SEED = 42

_INTEGERS = datasets.List(datasets.Value("int64"))

_FEATURES = {
    "text": datasets.Features({"text": datasets.Value("string")}),
    "tokens": datasets.Features({"tokens": _INTEGERS}),
}


@bars_of_datasets()
def open_mixture(paths: Sequence[object], weights: Sequence[float] = (), **how: Any) -> Documents:
    """Open several data sets as one: documents are drawn from the parts in turn, in a fixed random order.

    The mixture ends where the first of its parts ends. So no document comes twice, and the shares hold throughout.

    weights: how many documents come from each part, as shares of any sum; () takes equally many.
    how: options of `open_documents`, for each part. Where one of the parts is a stream, all become streams.
    """
    parts = [open_documents(path, **how) for path in paths]
    if len(parts) == 1:
        return parts[0]
    tokenized = [part.is_tokenized for part in parts]
    if any(tokenized) and not all(tokenized):
        ids, text = parts[tokenized.index(True)], parts[tokenized.index(False)]
        raise ValueError(
            f"{ids.given.field}: {ids.given.name} holds token ids (column {ids.column!r}), but {text.given.name} text "
            f"(column {text.column!r}); give only one of the kinds, or set dataset_text_column to a column that both "
            "have"
        )
    column = "tokens" if tokenized[0] else "text"
    found = [_with_column(part, column) for part in parts]
    if any(part.n_rows is None for part in parts):
        found = [one.to_iterable_dataset() if isinstance(one, datasets.Dataset) else one for one in found]
    if any(one.features != found[0].features for one in found):
        # Only where needed, because a cast writes all rows of a map-style data set anew.
        wanted = [{name: _FEATURES[column].get(name, _INTEGERS) for name in one.features or {}} for one in found]
        found = [
            one if one.features == features else one.cast(datasets.Features(features))
            for one, features in zip(found, wanted, strict=True)
        ]
    masks = tuple(mask for mask in MASKS if any(mask in part.masks for part in parts))
    shares = np.asarray(weights if weights else [1.0] * len(parts), dtype=np.float64)
    mixed = datasets.interleave_datasets(
        found, probabilities=(shares / shares.sum()).tolist(), seed=_MIXTURE_SEED, stopping_strategy="first_exhausted"
    )
    names = [part.given.name for part in parts]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    first = parts[0].bad_rows
    given = Given(first.given.field, f"the mixture of {listed}")
    bad_rows = BadRows(given, column, "ids" if tokenized[0] else "text", first.on_bad_rows, first.notify)
    bad_rows.parts = [part.bad_rows for part in parts]
    return Documents(mixed, bad_rows, ends_with=f"the first of {listed}", masks=masks, parts=tuple(parts))


def _with_column(part: Documents, column: str) -> Any:
    """The data set of a part of a mixture, with the column `column`: text, or ids and their masks."""
    dataset = part.dataset
    if not has_transform(dataset) and dataset.features and is_plain(dataset.features[part.column]):
        return dataset if part.column == column else dataset.rename_columns({part.column: column})

    def flat(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        # A row without a document stays a row, so that the shares of a mixture do not depend on empty rows.
        found = [part.documents_in(row, number) or [None] for row, number in zip(rows, numbers, strict=True)]
        return {column: [document for of_row in found for document in of_row]}

    is_map = isinstance(dataset, datasets.Dataset)
    options = {"load_from_cache_file": False, "desc": "reading rows"} if is_map else {"batch_size": 1}
    names = dataset.column_names or [part.column]
    flattened = dataset.map(
        flat,
        batched=True,
        with_indices=True,
        remove_columns=names,
        features=_FEATURES[column],
        **options,
    )
    return flattened.with_format(None)
