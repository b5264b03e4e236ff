"""The text that a config names, as contexts of token ids: for training, and kept from it for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sae_training.config import LanguageModelSAERunnerConfig
from sae_training.language_model.load import LanguageModel
from sae_training.language_model.tokenizer import tokenizer_of
from sae_training.text.chat import renderer
from sae_training.text.documents import Documents
from sae_training.text.mixture import open_mixture
from sae_training.text.open import open_documents
from sae_training.text.pretokenized import check_tokenizer
from sae_training.text.stream import TokenStream


class ReadAgain(Protocol):
    """What starts again at its end; `epoch`: how often it has."""

    epoch: int


class TrainingText:
    """The documents of `cfg.dataset_path` (or `dataset`), and `tokens`, the stream of their training contexts."""

    def __init__(
        self, cfg: LanguageModelSAERunnerConfig, model: LanguageModel, dataset: Any, notify: Callable[[str], None]
    ) -> None:
        self.cfg, self.model, self.notify = cfg, model, notify
        self.tokenizer = tokenizer_of(model)
        if self.tokenizer is None:
            warnings.warn(
                f"model_name: {cfg.model_name!r} has no tokenizer, so no BOS is put before contexts and no ids are "
                "special; token ids are read as they are, and text cannot be read",
                stacklevel=3,
            )
        self.documents = self.open(cfg.dataset_path if dataset is None else dataset)
        self.n_held_out = cfg.n_eval_batches * cfg.store_batch_size if cfg.eval_dataset_path is None else 0
        """How many contexts training skips because the run is evaluated on them."""
        self.tokens = self.stream(self.documents, self.n_held_out)
        self.cache: ReadAgain | None = None
        """What reads a cache of its activations, which stands in for it."""

    @property
    def n_passes(self) -> int:
        """How often training has read it to its end, or the cache of it, and begun again."""
        return max(self.tokens.epoch, 0 if self.cache is None else self.cache.epoch)

    def open(self, dataset: Any, field: str = "dataset_path") -> Documents:
        """Open a data set; error messages name the config field that it is the value of."""
        how = {
            "field": field,
            "split": self.cfg.dataset_split,
            "text_column": self.cfg.dataset_text_column,
            "streaming": self.cfg.streaming,
            "on_bad_rows": self.cfg.on_bad_rows,
            "render": renderer(self.tokenizer),
            "notify": self.notify,
        }
        paths = dataset if isinstance(dataset, list) else [dataset]
        for path in paths:
            check_tokenizer(path, self.tokenizer, field)
        if isinstance(dataset, list) and dataset is self.cfg.dataset_path:
            return open_mixture(dataset, self.cfg.dataset_weights, **how)
        return open_documents(dataset, **how)

    def stream(self, documents: Documents, n_held_out: int = 0) -> TokenStream:
        if self.tokenizer is None and not documents.is_tokenized:
            raise ValueError(
                f"model_name: {self.cfg.model_name!r} has no tokenizer, but {documents.given.field} "
                f"{documents.given.name} holds text (column {documents.column!r}); put the tokenizer's files into the "
                "model's folder (tokenizer.save_pretrained), or give token ids."
            )
        return TokenStream(
            documents,
            self.tokenizer,
            self.cfg.context_size,
            prepend_bos=self.cfg.prepend_bos,
            n_held_out=n_held_out,
            vocab_size=self.model.cfg.d_vocab,
            notify=self.notify,
            separator=self.cfg.sequence_separator_token,
            pack_sequences=self.cfg.pack_sequences,
        )

    def held_out(self) -> Tensor:
        """Return contexts (n, context_size) that training never sees: of `eval_dataset_path`, or else 1 in 20 here."""
        if self.cfg.eval_dataset_path is None:
            return self.tokens.held_out_contexts()
        n_contexts = self.cfg.n_eval_batches * self.cfg.store_batch_size
        documents = self.open(self.cfg.eval_dataset_path, "eval_dataset_path")
        return self.stream(documents).first_contexts(n_contexts)

    def say_skipped(self) -> None:
        """Say how many bad rows of the training text were left out, if there were any."""
        self.documents.bad_rows.say_skipped()
