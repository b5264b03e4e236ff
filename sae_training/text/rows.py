"""What the rows of a data set of token ids are, judged from a sample: documents, or one running text cut into rows.

Tools that pack a text (`group_texts` of transformers' examples, for instance) write rows of one length, with separators
wherever documents end. A BOS between two such rows would stand in the middle of a document.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_training.text.documents import Documents
from sae_training.text.masks import SEPARATORS, MaskMisfit, keeps
from sae_training.text.row_values import is_ids

# Rows of a book each are not all read for a sample.
_SAMPLE_IDS = 2_000_000

# Packed rows begin with BOS by chance, as often as a document is short: at most this share of them. No more of them are
# padded, because only the last row of a file is.
_BY_CHANCE = 0.1

# Padding is seen as a run of that many equal ids at the end (or the start) of this share of the rows.
_RUN, _SHARE_PADDED = 3, 0.05


class SampledRow(NamedTuple):
    """What was found in a row that holds ids."""

    n_ids: int
    n_kept: int
    """Without those that are masked."""
    n_inner: int
    """How many masked ids stand between ids that are kept."""
    is_cut: bool
    """Whether the first or the last id is masked."""
    is_padded: bool
    """Whether it is masked as padding is: by attention_mask, or in a run of equal ids."""
    first: list[int]
    last: list[int]
    """The first and the last ids, masked or not, _RUN + 1 of each or fewer."""
    is_rest: bool
    """Whether it is the last row of all, which may be short or padded where a text is packed."""


def rows_as_read(
    documents: Documents, bos_id: int | None, may_be_packed: bool, notify: Callable[[str], None]
) -> tuple[Documents, bool]:
    """(the documents with the masks that hold for them, whether their rows are one running text).

    One line says how many ids are dropped, and one that rows are packed. A warning says where that is unclear.

    bos_id: what would otherwise be put before each row; None puts nothing there.
    may_be_packed: False tells no packed rows from documents.
    """
    sample = sample_of(documents)
    kind, why = _verdict(documents, sample, bos_id) if may_be_packed else ("documents", "")
    has_separators = kind == "running text" and SEPARATORS in documents.masks
    if has_separators:  # it masks the separators, and nothing else that these rows hold
        documents = documents.with_masks(tuple(mask for mask in documents.masks if mask != SEPARATORS))
        sample = sample_of(documents)
    _tell_masks(documents, sample, notify)
    if bos_id is not None or has_separators:
        _tell_kind(documents, kind, why, notify)
    return documents, kind == "running text"


def sample_of(documents: Documents) -> list[SampledRow]:
    """Look at some rows of a data set of token ids."""
    found: list[SampledRow] = []
    n_ids = 0
    for row, is_last in documents.sample():
        raw: Any = row.get(documents.column)
        if not is_ids(raw) or len(raw) == 0:
            continue
        ids = np.asarray(raw)
        try:
            found.append(_sampled(ids, documents, row, is_last))
        except MaskMisfit:  # whoever comes to the row raises its error
            found.append(_sampled(ids, documents, {documents.column: raw}, is_last))
        n_ids += len(ids)
        if n_ids > _SAMPLE_IDS and len(found) > 2:
            break
    return found


def _sampled(ids: np.ndarray, documents: Documents, row: Any, is_last: bool) -> SampledRow:
    keep = keeps(row, documents.column, documents.masks)
    n_before, n_after, n_inner = _masked(keep)
    attention = tuple(mask for mask in documents.masks if mask == "attention_mask")
    padding_before, padding_after, n_within = _masked(keeps(row, documents.column, attention))
    runs = [run for run in (ids[:n_before], ids[len(ids) - n_after :]) if len(run) >= _RUN]
    return SampledRow(
        len(ids),
        int(keep.sum()),
        n_inner,
        n_before + n_after > 0,
        padding_before + padding_after > 0 and n_within == 0 or any((run == run[0]).all() for run in runs),
        ids[: _RUN + 1].tolist(),
        ids[-_RUN - 1 :].tolist(),
        is_last,
    )


def _masked(keep: np.ndarray) -> tuple[int, int, int]:
    """How many ids are masked (before the first that is kept, after the last, between the two)."""
    places = np.flatnonzero(keep)
    if len(places) == 0:
        return len(keep), 0, 0
    before, after = int(places[0]), len(keep) - 1 - int(places[-1])
    return before, after, len(keep) - len(places) - before - after


def _tell_masks(documents: Documents, sample: Sequence[SampledRow], notify: Callable[[str], None]) -> None:
    if documents.masks:
        n_ids = sum(row.n_ids for row in sample)
        n_dropped = n_ids - sum(row.n_kept for row in sample)
        notify(
            f"{documents.given.field}: {documents.given.name}: ids masked by {' or '.join(documents.masks)} are "
            f"dropped: {n_dropped:,} of {n_ids:,} ({n_dropped / max(1, n_ids):.0%}) in {len(sample)} rows sampled"
        )


def _tell_kind(documents: Documents, kind: str, why: str, notify: Callable[[str], None]) -> None:
    name = documents.given.name
    if kind == "running text":
        notify(
            f"{documents.given.field}: {name} holds packed rows ({why}), which are read as one running text with the "
            "separators they hold; sequence_separator_token=bos reads them as documents"
        )
    if kind == "unclear":
        warnings.warn(
            f"sequence_separator_token: it cannot be told whether the rows of {name} are documents or packed text "
            f"({why}); each is read as a document, with BOS before it; set none if they are packed, bos if they are "
            "documents",
            stacklevel=5,
        )


def _verdict(documents: Documents, sample: Sequence[SampledRow], bos_id: int | None) -> tuple[str, str]:
    """("documents", "running text" or "unclear"; why)."""
    if not documents.parts:
        return _judge(documents, sample, bos_id)
    packed = [part for part in documents.parts if _judge(part, sample_of(part), bos_id)[0] != "documents"]
    why = f"those of {' and '.join(part.given.name for part in packed)} look packed, but come in turn with others"
    return ("unclear", why) if packed else ("documents", "")


def _judge(documents: Documents, sample: Sequence[SampledRow], bos_id: int | None) -> tuple[str, str]:
    """The verdict on one data set, by the lengths of rows with all their ids, and by where masked ids stand."""
    if len(sample) > 2 and sample[-1].is_rest:
        *others, rest = sample
        if rest.is_padded or rest.n_ids < min(row.n_ids for row in others):
            sample = others
    n, full = len(sample), max((row.n_ids for row in sample), default=0)
    if documents.are_whole or n < 2 or full < 2:
        return "documents", ""
    share_full = sum(row.n_ids == full for row in sample) / n
    share_bos = sum(row.first[0] == bos_id for row in sample) / n
    if share_full <= 0.5 or share_bos >= 1 - _BY_CHANCE or _are_padded(sample):
        return "documents", ""
    if share_full < 1:
        return "unclear", f"{share_full:.0%} of {n} sampled have {full:,} ids, the others fewer"
    if share_bos > _BY_CHANCE:
        return "unclear", f"all {n} sampled have {full:,} ids, and {share_bos:.0%} begin with BOS"
    if share_cut := _share_cut(sample):
        return "unclear", f"all {n} sampled have {full:,} ids, and {share_cut:.0%} begin or end with masked ids"
    if (padding := _padding(sample)) is not None:
        return "unclear", f"all {n} sampled have {full:,} ids, and seem padded with {padding}, without attention_mask"
    return "running text", f"all {n} sampled have {full:,} ids, {'few begin' if share_bos else 'none begins'} with BOS"


def _are_padded(sample: Sequence[SampledRow]) -> bool:
    """Whether masked ids show that rows are padded documents, each of which has its own end."""
    is_inner = any(row.n_inner for row in sample)
    return sum(row.is_padded or row.is_cut and not is_inner for row in sample) > _BY_CHANCE * len(sample)


def _share_cut(sample: Sequence[SampledRow]) -> float:
    """The share of rows that begin or end with a masked id, 0 where no more do than by chance.

    Where separators are masked in packed rows, one stands at an end as often as anywhere else.
    """
    n = len(sample)
    share = sum(row.is_cut for row in sample) / n
    density = sum(row.n_inner for row in sample) / sum(row.n_ids for row in sample)
    expected = 1 - (1 - density) ** 2
    most = min(expected + 3 * (expected * (1 - expected) / n) ** 0.5, 1 - _BY_CHANCE)
    return share if share > most or any(row.is_padded for row in sample) else 0


def _padding(sample: Sequence[SampledRow]) -> int | None:
    """The id that rows seem to be padded with."""
    ends = [np.array(end) for row in sample if len(row.first) > _RUN for end in (row.first[:_RUN], row.last[-_RUN:])]
    runs = Counter(int(end[0]) for end in ends if (end == end[0]).all())
    for token_id, n in runs.most_common(1):
        return token_id if n > _SHARE_PADDED * len(sample) else None
    return None
