"""The training of the bundled language model: stretches add up to one run, and the text behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.demo_data.corpus import Share, divide
from scripts.demo_data.sources import Document, chapters, clean, field_text
from scripts.demo_data.tokens import END_OF_TEXT_ID, Batches
from scripts.demo_data.train_demo_lm import Run, lr_factor, parse_arguments

SMALL = "--vocab 40 --width 8 --layers 1 --heads 1 --mlp 8 --context 9 --batch 2 --tokens 200 --no-compile --threads 1"


def make_run(work: Path, more: str = "") -> Run:
    torch.manual_seed(0)
    args = parse_arguments([*SMALL.split(), *more.split(), "--work", str(work)])
    stream = torch.arange(1, 400) % 40
    return Run(Batches(stream, 9, 2, 0), stream.view(-1, 3)[:8], args)


@pytest.mark.parametrize("muon_lr", [0.02, 0.0])
def test_a_run_in_stretches_is_the_run_in_one(tmp_path: Path, muon_lr: float) -> None:
    whole = make_run(tmp_path / "whole", f"--muon-lr {muon_lr}")
    assert whole.train() and whole.progress.step == 13
    first = make_run(tmp_path / "parts", f"--muon-lr {muon_lr}")
    for _ in range(5):
        first.step()
    first.save()
    second = make_run(tmp_path / "parts", f"--muon-lr {muon_lr}")
    assert second.progress.step == 5
    assert second.train()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stretch_without_time_saves_and_is_not_finished(tmp_path: Path) -> None:
    assert not make_run(tmp_path, "--minutes 0").train()
    assert (tmp_path / "state.pt").is_file()


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path).save()
    with pytest.raises(SystemExit, match="or another --work"):
        make_run(tmp_path, "--batch 4")


def test_batches_follow_from_the_step_and_cover_an_epoch() -> None:
    stream = torch.arange(1, 1_000)
    forwards = [Batches(stream, 9, 4, 0)[step] for step in range(40)]
    batches = Batches(stream, 9, 4, 0)
    for step in reversed(range(40)):
        assert torch.equal(batches[step], forwards[step])
    epoch = torch.cat(forwards[: batches.steps_an_epoch])
    assert (epoch[:, 0] == END_OF_TEXT_ID).all()
    assert len(epoch[:, 1:].unique()) == epoch[:, 1:].numel() > 0.9 * len(stream)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [lr_factor(step, 1_000) for step in range(1_000)]
    assert factors[0] == 0.05 and max(factors) == factors[19] == 1.0
    assert factors[19:] == sorted(factors[19:], reverse=True) and factors[-1] < 1e-5


def test_held_out_documents_are_whole_or_cut_and_never_in_train() -> None:
    documents = [Document(f"Work, {i}", f"{'Word. ' * (i + 1)}End.") for i in range(60)]
    corpus = divide(documents, Share(3, 10, cut=60))
    assert len(corpus.held_out) == 3 and len(corpus.train) == 57 and len(corpus.embedded) == 10
    assert not {d.title for d in corpus.held_out} & {d.title for d in corpus.train}
    assert all(len(d.text) <= 60 and d.text.endswith(".") for d in corpus.held_out + corpus.embedded)


def test_clean_drops_marks_and_keeps_paragraphs() -> None:
    text = "A hard\nline &quot;break&quot;[1]--it ends.\n\n#Bold# and _italic_\n\n* * *\n\n[Illustration: a\nb]\n\nEnd"
    assert clean(text) == 'A hard line "break"—it ends.\n\nBold and italic\n\nEnd'


def test_chapters_are_numbered_and_contents_left_out() -> None:
    text = "Title\n\nCHAPTER I\n\nOne\nmore.\n\nCHAPTER II\n\nTwo.\n"
    assert list(chapters("Book", text, r"^CHAPTER [IVX]+$")) == [
        Document("Book, chapter 1", "One more."),
        Document("Book, chapter 2", "Two."),
    ]


def test_a_field_of_the_factbook_is_one_line() -> None:
    field = {"text": "wet ++ cold", "urban": {"text": "80%", "note": {"text": "rising"}}, "map": {"text": None}}
    assert field_text(field) == "wet; cold; urban: 80%; rising"
