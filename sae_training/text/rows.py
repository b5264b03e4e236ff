"""What the rows of a data set of token ids are, judged from a sample: documents, or one running text cut into rows.

Tools that pack a text (`group_texts` of transformers' examples, for instance) write rows of one length, with separators
wherever documents end. A BOS between two such rows would stand in the middle of a document.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sae_training.text.documents import Documents
from sae_training.text.row_values import is_ids

# Rows of a book each are not all read for a sample.
_SAMPLE_IDS = 2_000_000

# Packed rows begin with BOS by chance, as often as a document is short: at most this share of them.
_BY_CHANCE = 0.1

# Padding is seen as a run of that many equal ids at the end (or the start) of this share of the rows.
_RUN, _SHARE_PADDED = 3, 0.05


class Sample(NamedTuple):
    """What was found in some rows: one entry for each, of those that hold ids."""

    n_ids: list[int]
    n_kept: list[int]
    """Without those that are masked."""
    ends: list[tuple[list[int], list[int]]]
    """The first and the last of the ids that are kept, _RUN + 1 of each or fewer."""

    @property
    def n_dropped(self) -> int:
        return sum(self.n_ids) - sum(self.n_kept)


def sample_of(documents: Documents) -> Sample:
    """Look at some rows of a data set of token ids; a shorter last row, left over at the end, is left out."""
    found, ends = Sample([], [], []), False
    for row, is_last in documents.sample():
        ends = is_last
        raw: Any = row.get(documents.column)
        if not is_ids(raw) or len(raw) == 0:
            continue
        ids = documents.content_of(row)
        found.n_ids.append(len(raw))
        found.n_kept.append(len(ids))
        found.ends.append(([int(i) for i in ids[: _RUN + 1]], [int(i) for i in ids[-_RUN - 1 :]]))
        if sum(found.n_ids) > _SAMPLE_IDS and len(found.n_ids) > 2:
            return found
    if ends and len(found.n_ids) > 2 and found.n_ids[-1] < min(found.n_ids[:-1]):
        for column in found:
            column.pop()
    return found


def tell_masks(documents: Documents, sample: Sample, notify: Callable[[str], None]) -> None:
    """Say, in one line, how many ids are dropped because a mask masks them."""
    if documents.masks:
        share = sample.n_dropped / max(1, sum(sample.n_ids))
        notify(
            f"{documents.given.field}: {documents.given.name}: ids masked by {' or '.join(documents.masks)} are "
            f"dropped: {sample.n_dropped:,} of {sum(sample.n_ids):,} ({share:.0%}) in {len(sample.n_ids)} rows sampled"
        )


def are_running_text(documents: Documents, sample: Sample, bos_id: int, notify: Callable[[str], None]) -> bool:
    """Whether rows are to be read as one running text, which one line then says. A warning says where it is unclear.

    bos_id: what would otherwise be put before each row.
    """
    name = documents.given.name
    kind, why = _judge(documents, sample, bos_id)
    if documents.parts:
        packed = [part for part in documents.parts if _judge(part, sample_of(part), bos_id)[0] != "documents"]
        why = f"those of {' and '.join(part.given.name for part in packed)} look packed, but come in turn with others"
        kind = "unclear" if packed else "documents"
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
            stacklevel=4,
        )
    return kind == "running text"


def _judge(documents: Documents, sample: Sample, bos_id: int) -> tuple[str, str]:
    """("documents", "running text" or "unclear"; why)."""
    n, full = len(sample.n_kept), max(sample.n_kept, default=0)
    if documents.are_whole or n < 2 or full < 2 or sample.n_dropped:
        return "documents", ""
    share_full = sample.n_kept.count(full) / n
    share_bos = sum(first[0] == bos_id for first, _ in sample.ends) / n
    if share_full <= 0.5 or share_bos >= 1 - _BY_CHANCE:
        return "documents", ""
    if share_full < 1:
        return "unclear", f"{share_full:.0%} of {n} sampled have {full:,} ids, the others fewer"
    if share_bos > _BY_CHANCE:
        return "unclear", f"all {n} sampled have {full:,} ids, and {share_bos:.0%} begin with BOS"
    if (padding := _padding(sample)) is not None:
        return "unclear", f"all {n} sampled have {full:,} ids, and seem padded with {padding}, without attention_mask"
    return "running text", f"all {n} sampled have {full:,} ids, {'few begin' if share_bos else 'none begins'} with BOS"


def _padding(sample: Sample) -> int | None:
    """The id that rows seem to be padded with."""
    ends = [np.array(end) for first, last in sample.ends if len(first) > _RUN for end in (first[:_RUN], last[-_RUN:])]
    runs = Counter(int(end[0]) for end in ends if (end == end[0]).all())
    for token_id, n in runs.most_common(1):
        return token_id if n > _SHARE_PADDED * len(sample.ends) else None
    return None
