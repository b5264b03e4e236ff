"""What is gathered of a corpus, against plain loops over dense codes in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sae_analysis.events import Firings, firings, priorities
from sae_analysis.examples import BestOf, Silences
from sae_analysis.latent_statistics import QUANTILES, LatentStatistics, Moments, bin_edges, shown_histogram
from sae_analysis.neighbours import RowSample, coactive, correlated, most_similar
from sae_analysis.token_mass import TokenMass
from sae_training.kernels.sparse_code import Code, Entries, offsets_of

N, CONTEXT, D_SAE, VOCAB = 24, 20, 13, 7


@pytest.fixture(scope="module")
def corpus() -> dict[str, Any]:
    """Random codes (N, CONTEXT, D_SAE), with a latent that never fires and one that always does, tokens and a mask."""
    rng = np.random.default_rng(0)
    acts = np.where(rng.random((N, CONTEXT, D_SAE)) < 0.15, rng.gamma(2, size=(N, CONTEXT, D_SAE)), 0)
    acts[..., 3], acts[..., 5] = 0, 1.5
    keep = rng.random((N, CONTEXT)) < 0.8
    keep[4] = False
    acts = np.where(keep[..., None], acts, 0).astype(np.float32)
    return {"acts": acts, "keep": keep, "tokens": rng.integers(0, VOCAB, (N, CONTEXT))}


def batches(corpus: dict[str, Any], size: int) -> list[tuple[Firings, Code, np.ndarray]]:
    found = []
    for first in range(0, N, size):
        acts, keep = (
            torch.tensor(corpus["acts"][first : first + size]),
            torch.tensor(corpus["keep"][first : first + size]),
        )
        rows = acts[keep]
        where, latents = (rows > 0).nonzero(as_tuple=True)
        code = Code(rows[where, latents], Entries(latents, offsets_of(where, len(rows)), D_SAE))
        tokens = torch.tensor(corpus["tokens"][first : first + size])
        found.append((firings(code, tokens, keep, first), code, keep.numpy()))
    return found


@pytest.mark.parametrize("size", [1, 5, N])
def test_figures_are_those_of_dense_codes(corpus: dict[str, Any], size: int) -> None:
    gathered, moments = LatentStatistics(D_SAE, CONTEXT), Moments(D_SAE)
    for number, (found, _, keep) in enumerate(batches(corpus, size)):
        gathered.add(found, keep.sum())
        moments.add(found, number % 3)
    figures, acts = gathered.figures(moments), corpus["acts"].astype(np.float64)
    n_counted = corpus["keep"].sum()
    for latent in range(D_SAE):
        own = acts[..., latent]
        values, places = own[own > 0], np.flatnonzero(own.reshape(-1) > 0)
        assert figures["count"][latent] == len(values)
        assert figures["density"][latent] == pytest.approx(len(values) / n_counted, rel=1e-12)
        assert figures["mean_all"][latent] == pytest.approx(values.sum() / n_counted, rel=1e-6)
        if len(values) == 0:
            assert figures["first"][latent] == figures["last"][latent] == -1
            assert np.isnan([figures[name][latent] for name in ("max", "mean", "variance", "skew", "kurtosis")]).all()
            continue
        assert figures["max"][latent] == values.max()
        assert figures["mean"][latent] == pytest.approx(values.mean(), rel=1e-6)
        assert figures["variance"][latent] == pytest.approx(values.var(), rel=1e-6)
        assert (figures["first"][latent], figures["last"][latent]) == (places[0], places[-1])
        assert figures["mean_position"][latent] == pytest.approx((places % CONTEXT).mean(), rel=1e-12)
        if values.var() > 0:
            assert figures["skew"][latent] == pytest.approx(stats.skew(values), rel=1e-6)
            assert figures["kurtosis"][latent] == pytest.approx(stats.kurtosis(values, fisher=False), rel=1e-6)
        else:
            assert latent == 5 and np.isnan(figures["skew"][latent])


def test_moments_of_activations_that_hardly_vary_are_those_of_their_differences() -> None:
    n = N * CONTEXT
    values = (300 * (1 + 1e-5 * torch.rand(8 * n, generator=torch.Generator().manual_seed(0)) ** 3)).float()
    gathered, moments = LatentStatistics(1, CONTEXT), Moments(1)
    for number, part in enumerate(values.split(n)):
        code = Code(part, Entries(torch.zeros(n, dtype=torch.int64), torch.arange(n + 1), 1))
        keep = torch.ones(N, CONTEXT, dtype=torch.bool)
        found = firings(code, keep.long(), keep, 0)
        gathered.add(found, n)
        moments.add(found, number % 3)
    figures, exact = gathered.figures(moments), values.double().numpy()
    assert figures["mean"][0] == pytest.approx(exact.mean(), rel=1e-12)
    assert figures["variance"][0] == pytest.approx(exact.var(), rel=1e-6)
    assert figures["skew"][0] == pytest.approx(stats.skew(exact), rel=1e-6)
    assert figures["kurtosis"][0] == pytest.approx(stats.kurtosis(exact, fisher=False), rel=1e-6)


def test_histogram_and_quantiles_hold_the_values(corpus: dict[str, Any]) -> None:
    gathered = LatentStatistics(D_SAE, CONTEXT)
    for found, _, keep in batches(corpus, 7):
        gathered.add(found, keep.sum())
    ratio = bin_edges()[1] / bin_edges()[0]
    for latent in set(range(D_SAE)) - {3}:
        values = np.sort(corpus["acts"][..., latent][corpus["acts"][..., latent] > 0]).astype(np.float64)
        counts, edges = shown_histogram(gathered.histogram[latent], 10)
        assert len(counts) <= 10 and (counts == np.histogram(values, edges)[0]).all()
        for quantile, low in zip(QUANTILES, gathered.quantiles()[:, latent], strict=True):
            true = values[max(int(np.ceil(quantile * len(values))), 1) - 1]
            assert low <= true < low * ratio * (1 + 1e-9)
    assert shown_histogram(gathered.histogram[3])[0].size == 0


@pytest.mark.parametrize("size", [1, 6, N])
def test_strongest_examples_are_the_strongest_of_their_contexts(corpus: dict[str, Any], size: int) -> None:
    best = BestOf(D_SAE, 4, np.float32)
    for found, _, _ in batches(corpus, size):
        best.add(found, -found.values)
    kept = best.kept()
    for latent in range(D_SAE):
        own = corpus["acts"][..., latent]
        order = sorted(range(N), key=lambda context: (-own[context].max(), context))[:4]
        expected = [(c, int(own[c].argmax()), own[c].max()) for c in order if own[c].max() > 0]
        places = np.flatnonzero(kept.latents == latent)
        found = [(kept.contexts[i], kept.positions[i], kept.activations[i]) for i in places]
        assert found == expected
        for i in places:
            part = slice(kept.starts[i], kept.starts[i + 1])
            row = np.zeros(CONTEXT, dtype=np.float32)
            row[kept.firing_positions[part]] = kept.firing_values[part]
            assert (row == own[kept.contexts[i]]).all()


def test_sample_does_not_depend_on_batches_and_is_drawn_evenly(corpus: dict[str, Any]) -> None:
    samples = []
    for size in (1, 7, N):
        best = BestOf(D_SAE, 5, np.uint64)
        for found, _, _ in batches(corpus, size):
            best.add(found, priorities(3, found.latents, found.contexts, found.positions))
        samples.append(best.kept())
    for other in samples[1:]:
        for mine, theirs in zip(samples[0], other, strict=True):
            assert (mine == theirs).all()
    # Of 2,000 numbers, those below the quarter of all come from each quarter of the places alike (500 +- 5 sigma).
    numbers = np.arange(8_000)
    chosen = numbers[priorities(1, numbers, numbers % 7) < np.uint64(2**62)]
    counts = np.histogram(chosen, bins=4, range=(0, 8_000))[0]
    assert (abs(counts - 500) < 5 * np.sqrt(500 * 0.75)).all()


def test_long_contexts_keep_the_firings_near_an_example() -> None:
    acts = torch.zeros(1, 700, 1)
    acts[0, [0, 100, 200, 300, 327, 328, 329, 430, 699], 0] = torch.tensor([1.0, 2, 3, 9, 4, 4, 4, 5, 6])
    rows = acts[0]
    where, latents = (rows > 0).nonzero(as_tuple=True)
    code = Code(rows[where, latents], Entries(latents, offsets_of(where, 700), 1))
    found = firings(code, torch.zeros(1, 700, dtype=torch.long), torch.ones(1, 700, dtype=torch.bool), 0)
    best = BestOf(1, 2, np.float32)
    best.add(found, -found.values)
    assert best.kept().positions.tolist() == [300]
    assert best.kept().firing_positions.tolist() == [200, 300, 327, 328, 329]  # 172 to 428


def test_many_examples_that_come_and_go_leave_what_is_kept() -> None:
    best, rng, all_values = BestOf(3, 2, np.float32), np.random.default_rng(1), []
    for first in range(0, 4000, 100):
        acts = torch.tensor(rng.random((100, 8, 3)).astype(np.float32) + first / 100)  # always better than before
        all_values.append(acts.amax(dim=1))
        rows = acts.flatten(end_dim=1)
        code = Code(rows.flatten(), Entries(torch.arange(3).repeat(800), torch.arange(0, 2401, 3), 3))
        best.add(
            firings(code, torch.zeros(100, 8, dtype=torch.long), torch.ones(100, 8, dtype=torch.bool), first),
            -rows.T.flatten().numpy(),
        )
        if first == 2000:
            best.load({name: array.copy() for name, array in best.arrays().items()})
    kept = best.kept()
    expected = torch.cat(all_values).topk(2, dim=0)
    assert kept.activations.reshape(3, 2).T.tolist() == expected.values.tolist()
    assert kept.contexts.reshape(3, 2).T.tolist() == expected.indices.tolist()
    assert len(kept.firing_values) == 3 * 2 * 8


def test_silences_are_contexts_in_which_a_latent_does_not_fire(corpus: dict[str, Any]) -> None:
    found = [Silences(D_SAE, 10, seed=0) for _ in range(2)]
    for silences, size in zip(found, (1, 9), strict=True):
        for some, _, keep in batches(corpus, size):
            silences.add(some, keep)
    one, other = found
    assert (one.contexts == other.contexts).all() and (one.positions == other.positions).all()
    assert 4 not in one.contexts  # of which no position counts
    assert all(corpus["keep"][c, p] for c, p in zip(one.contexts, one.positions, strict=True))
    latents, in_contexts, _ = one.examples(4)
    for latent in range(D_SAE):
        contexts = in_contexts[latents == latent]
        assert not corpus["acts"][contexts][..., latent].any()
        silent = {c for c in one.contexts.tolist() if not corpus["acts"][c, :, latent].any()}
        assert len({*contexts.tolist()}) == len(contexts) == min(4, len(silent)) and {*contexts.tolist()} <= silent
    assert 5 not in latents
    assert len({tuple(in_contexts[latents == latent]) for latent in range(D_SAE)}) > 2


@pytest.mark.parametrize("buffered", [1, 50, 10**9])
def test_mass_by_token_is_that_of_dense_codes(
    corpus: dict[str, Any], buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_analysis.token_mass.BUFFERED", buffered)
    gathered = TokenMass(D_SAE, VOCAB)
    for found, _, _ in batches(corpus, 5):
        gathered.add(found)
        gathered.load({name: array.copy() for name, array in gathered.arrays().items()})
    shares = gathered.shares()
    acts, tokens = corpus["acts"].astype(np.float64), corpus["tokens"]
    before = np.concatenate([np.full((N, 1), -1), tokens[:, :-1]], axis=1)
    for latent in range(D_SAE):
        own = acts[..., latent]
        if latent == 3:
            assert (
                np.isnan(shares.entropy[3]) and shares.top_token[3] == -1 and shares.top_bigram[3].tolist() == [-1, -1]
            )
            continue
        mass = np.array([own[tokens == token].sum() for token in range(VOCAB)]) / own.sum()
        assert shares.entropy[latent] == pytest.approx(-(mass[mass > 0] * np.log2(mass[mass > 0])).sum(), rel=1e-6)
        assert shares.top_token[latent] == mass.argmax()
        assert shares.top_token_share[latent] == pytest.approx(mass.max(), rel=1e-6)
        pairs = {
            (a, b): own[(before == a) & (tokens == b)].sum() / own.sum() for a in range(-1, VOCAB) for b in range(VOCAB)
        }
        assert shares.top_bigram_share[latent] == pytest.approx(max(pairs.values()), rel=1e-6)
        assert pairs[tuple(shares.top_bigram[latent])] == pytest.approx(max(pairs.values()), rel=1e-6)
        latents, ids, of_tokens = gathered.top_tokens(3)
        assert ids[latents == latent].tolist() == np.argsort(-mass, kind="stable")[:3].tolist()
        assert of_tokens[latents == latent] == pytest.approx(np.sort(mass)[::-1][:3], rel=1e-6)


def test_table_of_tokens_is_bounded_and_says_what_it_lost(
    corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_analysis.token_mass.BUFFERED", 1)
    monkeypatch.setattr("sae_analysis.token_mass.MAX_PAIRS", 40)
    gathered = TokenMass(D_SAE, VOCAB)
    for found, _, _ in batches(corpus, 5):
        gathered.add(found)
        assert len(gathered.keys) <= 40
    assert gathered.n_dropped > 0
    totals = corpus["acts"].astype(np.float64).sum(axis=(0, 1))
    assert gathered.total() == pytest.approx(totals, rel=1e-6)
    assert np.nansum(gathered.shares().top_token_share) > 0


def test_correlations_and_common_firings_are_those_of_dense_codes(corpus: dict[str, Any]) -> None:
    sample = RowSample(D_SAE, seed=0)
    for found, code, keep in batches(corpus, 6):
        contexts, positions = np.nonzero(keep)
        sample.add(code, contexts + found.first, positions)
    matrix = sample.matrix()
    rows = corpus["acts"][corpus["keep"]].astype(np.float64)
    assert matrix.shape == rows.shape
    near, together = correlated(matrix, 4), coactive(matrix, 4)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.corrcoef(rows.T)
    fires = rows > 0
    for latent in set(range(D_SAE)) - {3, 5}:
        others = [
            i
            for i in range(D_SAE)
            if i != latent and np.isfinite(pearson[latent, i]) and (fires[:, i] & fires[:, latent]).any()
        ]
        best = sorted(others, key=lambda i: -pearson[latent, i])[:4]
        assert near.others[latent].tolist() == best
        assert near.values[latent] == pytest.approx(pearson[latent, best], rel=1e-6)
        jaccard = [
            (fires[:, i] & fires[:, latent]).sum() / (fires[:, i] | fires[:, latent]).sum() for i in range(D_SAE)
        ]
        jaccard[latent] = 0
        assert together.values[latent] == pytest.approx(np.sort(jaccard)[::-1][:4], rel=1e-12)
    assert (near.others[3] == -1).all() and np.isnan(near.values[3]).all()


def test_sample_of_rows_is_bounded_and_does_not_depend_on_batches(corpus: dict[str, Any]) -> None:
    matrices = []
    for size in (1, 4, N):
        sample = RowSample(D_SAE, seed=2, n=50)
        for found, code, keep in batches(corpus, size):
            contexts, positions = np.nonzero(keep)
            sample.add(code, contexts + found.first, positions)
            sample.load({name: array.copy() for name, array in sample.arrays().items()})
        matrices.append(sample.matrix().toarray())
    assert matrices[0].shape == (50, D_SAE)
    assert all((matrices[0] == other).all() for other in matrices[1:])


def gathered_of(some: list[tuple[int, tuple[Firings, Code, np.ndarray]]]) -> dict[str, Any]:
    """All accumulators after some batches, given with their numbers."""
    parts = {
        "statistics": LatentStatistics(D_SAE, CONTEXT),
        "moments": Moments(D_SAE),
        "strongest": BestOf(D_SAE, 4, np.float32),
        "sampled": BestOf(D_SAE, 5, np.uint64),
        "silences": Silences(D_SAE, 10, seed=0),
        "mass": TokenMass(D_SAE, VOCAB),
        "rows": RowSample(D_SAE, seed=2, n=50),
    }
    for number, (found, code, keep) in some:
        contexts, positions = np.nonzero(keep)
        parts["statistics"].add(found, len(contexts))
        parts["moments"].add(found, number % 6)
        parts["strongest"].add(found, -found.values)
        parts["sampled"].add(found, priorities(3, found.latents, found.contexts, found.positions))
        parts["silences"].add(found, keep)
        parts["mass"].add(found)
        parts["rows"].add(code, contexts + found.first, positions)
    return parts


def results_of(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "figures": parts["statistics"].figures(parts["moments"]),
        "histogram": parts["statistics"].histogram,
        "strongest": parts["strongest"].kept(),
        "sampled": parts["sampled"].kept(),
        "silences": parts["silences"].examples(4),
        "mass": parts["mass"].by_token(),
        "rows": parts["rows"].matrix().toarray(),
    }


@pytest.mark.parametrize(
    "part_of", [lambda i: i % 2, lambda i: 2 - i % 3, lambda i: int(i < 2), lambda i: 3 * (i > 6)],
    ids=["in turn", "in turn, the last first", "the second begins", "two are empty"],
)  # fmt: skip
def test_parts_put_together_are_what_one_gathers(corpus: dict[str, Any], part_of: Callable[[int], int]) -> None:
    numbered = list(enumerate(batches(corpus, 2)))
    expected = results_of(gathered_of(numbered))
    n_parts = 1 + max(part_of(i) for i, _ in numbered)
    first, *others = [gathered_of([b for b in numbered if part_of(b[0]) == part]) for part in range(n_parts)]
    for other in others:
        for name, accumulator in first.items():
            accumulator.merge({key: array.copy() for key, array in other[name].arrays().items()})
    is_by_lanes = len({(i % 6, part_of(i)) for i, _ in numbered}) == 6
    if not is_by_lanes:  # then the sums of a lane are added up in another order
        found, figures = results_of(first)["figures"], expected.pop("figures")
        for name, of_latents in figures.items():
            np.testing.assert_allclose(found[name], of_latents, rtol=1e-12, err_msg=name)
    for name, of_all in expected.items():
        np.testing.assert_equal(results_of(first)[name], of_all, err_msg=name)


def test_similar_directions_are_those_of_the_largest_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_analysis.neighbours.CHUNK", 100)
    directions = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    table = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    unit = directions.double() / directions.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit.T - 2 * torch.eye(30)
    found = most_similar(directions, 3)
    expected = cosines.topk(3, dim=1)
    assert found.others.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    others = most_similar(directions, 3, table)
    expected = (unit @ (table.double() / table.double().norm(dim=1, keepdim=True)).T).topk(3, dim=1)
    assert others.others.tolist() == expected.indices.tolist()
    assert most_similar(directions[:2], 5).others.shape == (2, 1)
    assert most_similar(directions[:1], 5).others.shape == (1, 0)
