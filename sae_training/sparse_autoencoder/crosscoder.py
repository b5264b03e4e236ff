"""Crosscoders: dictionaries whose latents read several places of a model, or of several models, and write several.

A place is a hook point. Latents come in sets of d_sae. With `reads` and `writes` of a set s (`Latents`):

pre_s  = sum of x_r @ W_enc[s, r] over the places r that it reads, + b_enc[s]
acts_s = activation(pre_s)
out_w  = b_dec[w] + sum of acts_s @ W_dec[s, w] over the sets s that write w (+ x_w @ W_skip[w])

| dictionary              | sets          | a set reads | and writes             |
|-------------------------|---------------|-------------|------------------------|
| crosscoder              | one           | all places  | all places             |
| its gates place by place| one a place   | all, shared | its own place          |
| weakly causal           | one a place   | its own     | all places             |
| cross-layer transcoder  | one a layer   | its own     | its own and later ones |

They are read from other programs' files (`formats`) and used. There is no training of them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
from torch import Tensor, nn

from sae_training import formats
from sae_training.config.types import UNKNOWN
from sae_training.formats.several_places import scale_places
from sae_training.machine.device import checked
from sae_training.sparse_autoencoder.architectures import top_k_mask
from sae_training.sparse_autoencoder.checks import check_weights, check_width
from sae_training.sparse_autoencoder.many import Lazily
from sae_training.sparse_autoencoder.normalization import BY_ROW, normalize, restore

Rows = TypeVar("Rows", Tensor, Mapping[str, Tensor])

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")


class Latents(NamedTuple):
    """A set of latents: which places it reads and writes, by their numbers in `reads` and `writes` of the config."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class CrosscoderConfig:
    """What a crosscoder is. The last fields say where it came from."""

    architecture: str
    """"crosscoder" or "cross_layer_transcoder"."""
    reads: tuple[str, ...]
    """Names of the places that are read: hook points, or "0", "1", ... where the files do not name them."""
    writes: tuple[str, ...]
    latents: tuple[Latents, ...]
    d_in: int
    d_out: int
    d_sae: int
    """Latents of each set."""
    activation: str
    """relu; jumprelu, above a threshold; topk; batchtopk, above the threshold that training measured."""
    k: int | None = None
    """topk, and batchtopk by the batch: active latents per row, of each set or (`across_sets`) of all sets together."""
    across_sets: bool = False
    by_batch: bool = False
    """batchtopk: the k * rows largest of all rows that are encoded together, in place of a threshold."""
    shares_encoder: bool = False
    """All sets have the same pre-activations: there is one encoder."""
    skip_connection: bool = False
    normalize_activations: str = "none"
    """How the rows of each place are normalised one by one before they are encoded (`normalization.BY_ROW`)."""
    model_name: str = UNKNOWN
    dataset_path: str = UNKNOWN
    file_format: str | None = None
    file_dtype: str | None = None

    @property
    def has_threshold(self) -> bool:
        return self.activation == "jumprelu" or (self.activation == "batchtopk" and not self.by_batch)

    @property
    def chooses_k(self) -> bool:
        """Whether the active latents are the largest of a row, or of a batch."""
        return self.activation in ("topk", "batchtopk") and not self.has_threshold

    @property
    def encoders(self) -> tuple[Latents, ...]:
        """The sets that have an encoder of their own."""
        return self.latents[:1] if self.shares_encoder else self.latents


class Crosscoder(nn.Module):
    """Latents over several places; the module's docstring has the formula. `cfg` is a CrosscoderConfig.

    W_enc[s][j] (d_in, d_sae) is of the j-th place that set s reads, b_enc (encoders, d_sae), W_dec[s][j] (d_sae, d_out)
    of the j-th place that it writes, b_dec (places written, d_out). threshold (sets, d_sae) is there for jumprelu and
    batchtopk, weight_of_choice (sets, d_sae) where the k largest of pre * weight_of_choice are active, and W_skip
    (places, d_in, d_out) with a skip connection. No parameter asks for a gradient.
    """

    W_enc: Sequence[Sequence[Tensor]]
    W_dec: Sequence[Sequence[Tensor]]
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    weight_of_choice: Tensor
    W_skip: Tensor

    def __init__(self, cfg: CrosscoderConfig, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights` by name (W_enc.0.0, b_enc, ...), without copying. ValueError if they do not fit."""
        super().__init__()
        check_config(cfg)
        shapes = shapes_of(cfg)
        check_weights(weights, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        self.cfg = cfg
        self.W_enc = matrices(weights, "W_enc", [s.reads for s in cfg.encoders])
        self.W_dec = matrices(weights, "W_dec", [s.writes for s in cfg.latents])
        for name in shapes.keys() & {"b_enc", "b_dec", "threshold", "weight_of_choice", "W_skip"}:
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))

    @property
    def n_sets(self) -> int:
        return len(self.cfg.latents)

    @property
    def d_sae(self) -> int:
        """Latents of each set."""
        return self.cfg.d_sae

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.b_dec.device

    # ------------------------------------------------------------------------------------------------- the function

    def encode(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Latent activations (..., sets, d_sae), or (..., d_sae) of a single set.

        `x` has the activations of all places that are read: (..., places, d_in) in the order of `cfg.reads`, or
        (..., d_in) by their names.
        """
        rows = [normalize(place, self.cfg.normalize_activations).to(self.dtype) for place in self.rows_of(x)]
        pre = torch.stack([self.pre_activations(rows, number) for number in range(len(self.W_enc))], dim=-2)
        acts = self.activate(pre.expand(*pre.shape[:-2], self.n_sets, -1))
        return acts if self.n_sets > 1 else acts.squeeze(-2)

    def pre_activations(self, rows: Sequence[Tensor], number: int) -> Tensor:
        """Pre-activations (..., d_sae) of an encoder, from the activations (..., d_in) of all places."""
        reads = self.cfg.encoders[number].reads
        parts = [rows[place] @ W for place, W in zip(reads, self.W_enc[number], strict=True)]
        return torch.stack(parts).sum(dim=0) + self.b_enc[number] if len(parts) > 1 else parts[0] + self.b_enc[number]

    def activate(self, pre: Tensor) -> Tensor:
        """Latent activations of pre-activations, both (..., sets, d_sae)."""
        if self.cfg.has_threshold:
            return torch.where(pre > self.threshold, pre, 0.0)
        acts = pre.relu()
        return acts * self.chosen(acts * self.weight_of_choice) if self.cfg.chooses_k else acts

    def chosen(self, scores: Tensor) -> Tensor:
        """Bool mask of the k largest scores (..., sets, d_sae): of each row, or k * rows of all rows."""
        assert self.cfg.k is not None
        n_groups = 1 if self.cfg.across_sets else self.n_sets
        n_competing = self.n_sets // n_groups * self.d_sae
        rows = scores.reshape(-1, n_groups, n_competing)
        if not self.cfg.by_batch:
            return top_k_mask(rows, self.cfg.k).reshape(scores.shape)
        together = rows.transpose(0, 1).flatten(1)  # (groups, rows * n_competing)
        mask = top_k_mask(together, self.cfg.k * len(rows)).view(n_groups, len(rows), -1)
        return mask.transpose(0, 1).reshape(scores.shape)

    def decode(self, acts: Tensor, x: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs (..., places, d_out) in the order of `cfg.writes`, of latent activations as `encode` returns them.

        A skip connection and normalised rows also need the activations `x` that were encoded.
        """
        check_width(acts, "d_sae", self.d_sae)
        acts = acts.unsqueeze(-2) if self.n_sets == 1 else acts
        if acts.shape[-2:] != (self.n_sets, self.d_sae):
            raise ValueError(f"acts: found shape {tuple(acts.shape)}, expected (..., {self.n_sets}, {self.d_sae}).")
        rows = self.rows_needed(x)
        outs = list(self.b_dec)
        for number, latents in enumerate(self.cfg.latents):
            for place, W in zip(latents.writes, self.W_dec[number], strict=True):
                outs[place] = outs[place] + acts[..., number, :] @ W
        if rows is not None and self.cfg.skip_connection:
            outs = [out + row.to(self.dtype) @ W for out, row, W in zip(outs, rows, self.W_skip, strict=True)]
        if rows is not None and self.cfg.normalize_activations in BY_ROW:
            outs = [restore(out, row, self.cfg.normalize_activations) for out, row in zip(outs, rows, strict=True)]
        return torch.stack([out.expand(*acts.shape[:-2], -1) for out in outs], dim=-2)

    def forward(self, x: Rows) -> Rows:
        """Outputs from the activations `x`: (..., places, d_out), or by the names of `cfg.writes` if x is by name."""
        out = self.decode(self.encode(x), x)
        return out if isinstance(x, Tensor) else dict(zip(self.cfg.writes, out.unbind(-2), strict=True))  # type: ignore[return-value] # pyright: ignore[reportReturnType]

    reconstruct = forward

    def directions(self, latent: int, number: int = 0) -> Tensor:
        """Decoder directions (places written, d_out) of a latent of the set `number`, in the order of its `writes`."""
        return torch.stack([W[latent] for W in self.W_dec[number]])

    def rows_of(self, x: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        """The activations (..., d_in) of each place that is read."""
        names = self.cfg.reads
        if isinstance(x, Mapping):
            missing = [name for name in names if name not in x]
            if missing:
                raise ValueError(f"x: {', '.join(missing)} missing, expected activations of {', '.join(names)}.")
            rows = [x[name] for name in names]
        else:
            check_width(x, "d_in", self.cfg.d_in)
            if x.ndim < 2 or x.shape[-2] != len(names):
                raise ValueError(
                    f"x: found shape {tuple(x.shape)}, expected (..., {len(names)}, {self.cfg.d_in}): the places "
                    f"{', '.join(names)}."
                )
            rows = list(x.unbind(-2))
        for row in rows:
            check_width(row, "d_in", self.cfg.d_in)
        return rows

    def rows_needed(self, x: Tensor | Mapping[str, Tensor] | None) -> list[Tensor] | None:
        """The rows that decoding needs; None if it needs none."""
        if not self.cfg.skip_connection and self.cfg.normalize_activations not in BY_ROW:
            return None
        if x is None:
            why = "has a skip connection" if self.cfg.skip_connection else "normalises rows"
            raise ValueError(f"x: this crosscoder {why}, so decode needs its input: decode(acts, x).")
        return self.rows_of(x)

    # ------------------------------------------------------------------------------------------------------ files

    @classmethod
    def load_from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        norm_factors: Sequence[float] | None = None,
        **given: Unpack[formats.Facts],
    ) -> Crosscoder:
        """Load the crosscoder or cross-layer transcoder of a file or folder, in float32; nothing in it is executed.

        `device` is "cpu" unless it is given. `norm_factors` are the numbers that training multiplied the activations of
        each place with, where the files do not hold them; they become part of the weights. `given`: as in
        `SparseAutoencoder.load_from_pretrained`. ValueError for files of other kinds, and for what is missing.
        """
        with formats.blamed_on(Path(path)):
            return cls.of(formats.the_crosscoder(Path(path), formats.Given(**given)), Path(path), device, norm_factors)

    @classmethod
    def load_many(
        cls, path: str | Path, device: str | None = None, **given: Unpack[formats.Facts]
    ) -> Mapping[str, Crosscoder]:
        """The crosscoders of the folders below `path`, by name, each loaded when asked; ValueError for none."""
        found = formats.read_many(Path(path), formats.Given(**given))
        crosscoders = {name: loaded for name, loaded in found.items() if loaded.is_crosscoder}
        if not crosscoders:
            raise ValueError(
                f"{path}: found {', '.join(list(found)[:8])}, no crosscoder among them, expected one or more; load "
                "them with SparseAutoencoder.load_many."
            )
        return Lazily({name: partial(cls.of, loaded, Path(path), device) for name, loaded in crosscoders.items()})

    @classmethod
    def of(
        cls,
        loaded: formats.Loaded,
        path: Path,
        device: str | None = None,
        norm_factors: Sequence[float] | None = None,
    ) -> Crosscoder:
        """The crosscoder that was read from `path`."""
        with formats.blamed_on(path):
            formats.warn_of(loaded, path)
            tensors = formats.weights_of(loaded, path)
            latents = tuple(Latents(*map(tuple, part)) for part in loaded.values["latents"])
            cfg = CrosscoderConfig(**{**loaded.values, "latents": latents})
            if norm_factors is not None:
                if len(norm_factors) != len(cfg.reads) or len(cfg.reads) != len(cfg.writes):
                    raise ValueError(f"norm_factors: found {len(norm_factors)}, expected one for each of {cfg.reads}.")
                scale_places(tensors, loaded.values, norm_factors, norm_factors)
            return cls(cfg, tensors).to(checked(device or "cpu")).eval()


def shapes_of(cfg: CrosscoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, latents in enumerate(cfg.encoders):
        shapes |= {f"W_enc.{number}.{j}": (cfg.d_in, cfg.d_sae) for j in range(len(latents.reads))}
    for number, latents in enumerate(cfg.latents):
        shapes |= {f"W_dec.{number}.{j}": (cfg.d_sae, cfg.d_out) for j in range(len(latents.writes))}
    shapes |= {"b_enc": (len(cfg.encoders), cfg.d_sae), "b_dec": (len(cfg.writes), cfg.d_out)}
    if cfg.has_threshold:
        shapes["threshold"] = (len(cfg.latents), cfg.d_sae)
    if cfg.chooses_k:
        shapes["weight_of_choice"] = (len(cfg.latents), cfg.d_sae)
    if cfg.skip_connection:
        shapes["W_skip"] = (len(cfg.writes), cfg.d_in, cfg.d_out)
    return shapes


def matrices(weights: Mapping[str, Tensor], name: str, places: Sequence[tuple[int, ...]]) -> Any:
    """A ModuleList with the matrices of each set, one for each of its places."""
    return nn.ModuleList(
        nn.ParameterList(nn.Parameter(weights[f"{name}.{number}.{j}"], requires_grad=False) for j in range(len(of_set)))
        for number, of_set in enumerate(places)
    )


def check_config(cfg: CrosscoderConfig) -> None:
    """ValueError for a config that no crosscoder can be built from."""
    if cfg.activation not in ACTIVATIONS:
        raise ValueError(f"activation: found {cfg.activation}, expected one of {', '.join(ACTIVATIONS)}.")
    if cfg.chooses_k and not (isinstance(cfg.k, int) and cfg.k > 0):
        raise ValueError(f"k: found {cfg.k} with activation {cfg.activation}, expected a whole number from 1 on.")
    if not cfg.latents:
        raise ValueError("latents: found no set, expected at least one.")
    for latents in cfg.latents:
        for name, found, places in (("reads", latents.reads, cfg.reads), ("writes", latents.writes, cfg.writes)):
            if not found or not all(0 <= place < len(places) for place in found):
                raise ValueError(f"latents: {name} {found}, expected numbers of the {len(places)} places {places}.")
    by_place = cfg.skip_connection or cfg.normalize_activations in BY_ROW
    if by_place and len(cfg.reads) != len(cfg.writes):
        raise ValueError(f"reads, writes: found {cfg.reads} and {cfg.writes}, expected one written for each read.")
