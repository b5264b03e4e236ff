"""What a step of a job of several processes takes: operations, bytes moved in memory, and bytes between processes.

Pure functions of sizes, each with its formula. N is the number of ranks, rows those of a step over all of them, w the
width of a row at all hooks together, s the bytes of a number in the language model's precision. "Received" is what one
rank receives; it sends as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT = 4  # bytes of a gradient, of a partial reconstruction, of a candidate of a choice
COUNT = 8  # bytes of a latent's firing count
GIGA = 1e9

SAMPLED = 2
"""How many times the entries that it keeps a choice among all rows looks at, where a sample gives its lower limit."""

BYTES_PER_WEIGHT = {"adam": 36, "adam8bit": 24, "signum": 28}
"""Bytes that an optimizer step moves for each weight: weight and moments read and written, gradient written and read
twice (once by the norm of decoder rows), and W_enc once more in 16 bits."""

PRODUCTS_OF_A_DENSE_STEP = 3  # of encoder and decoder each: forward, gradient of the weights, gradient of the input
PASSES_OF_A_DENSE_STEP = 9  # over the (rows, d_sae) code, as `kernels.triton_products` counts
PASSES_OF_A_SPARSE_STEP = 3
GATHERS_OF_A_SPARSE_STEP = 4  # of k rows of weights for each row of the batch


@dataclass(frozen=True)
class Machines:
    """GPUs, or processes on a CPU, and what each of them can do at most. Rates are per second and GPU."""

    gpus: int
    """Of a node."""
    nodes: int
    memory: float
    """Bytes of a GPU."""
    flops_16: float
    """Operations in 16 bits."""
    flops_32: float
    """Operations in float32."""
    bandwidth: float
    """Bytes from and to its memory."""
    interconnect: float
    """Bytes received from GPUs of the same node."""
    network: float
    """Bytes received from other nodes."""
    disk: float
    """Bytes that a node reads or writes."""
    efficiency: float
    """Share of these rates that is reached."""

    @property
    def n(self) -> int:
        return self.gpus * self.nodes

    def together(self, ranks: int) -> int:
        """Return how many of a group of so many neighbouring ranks share a node, at least: groups may straddle two."""
        return ranks if self.nodes == 1 else math.gcd(self.gpus, ranks)

    def link(self, ranks: int) -> float:
        """Return bytes/s of the slowest link of a ring over so many neighbouring ranks."""
        return self.efficiency * (self.interconnect if self.together(ranks) == ranks else self.network)


@dataclass(frozen=True)
class Shape:
    """One autoencoder: what its step depends on."""

    d_in: int
    d_out: int
    d_sae: int
    k: int
    """Active latents of a row; 0 if the architecture has no fixed number."""
    weights: int
    optimizer: str
    sparse: bool
    """Whether the step computes active entries alone."""
    itemsize: int
    """Bytes of a number of the step."""
    active: float
    """Active latents of a row among these: k, or the share of k that a shard of the latents has."""


# ------------------------------------------------------------------------------------------------------------- compute


def step_flops(sae: Shape, rows: float) -> float:
    """Return the operations of a step on so many rows.

    sparse: 2 * d_in * d_sae a row, the encoder's product. dense: 3 * 2 * (d_in + d_out) * d_sae.
    """
    if sae.sparse:
        return 2 * rows * sae.d_in * sae.d_sae
    return PRODUCTS_OF_A_DENSE_STEP * 2 * rows * (sae.d_in + sae.d_out) * sae.d_sae


def step_traffic(sae: Shape, rows: float) -> float:
    """Return the bytes that a step moves from and to memory, beside its products.

    passes * rows * d_sae * itemsize for the code, 4 * rows * active * d_in * itemsize for gathers if it is sparse, and
    what the optimizer moves for each weight.
    """
    passes = PASSES_OF_A_SPARSE_STEP if sae.sparse else PASSES_OF_A_DENSE_STEP
    gathered = GATHERS_OF_A_SPARSE_STEP * sae.active * (sae.d_in + sae.d_out) / 2 if sae.sparse else 0
    of_optimizer = BYTES_PER_WEIGHT[sae.optimizer] * sae.weights / FLOAT
    return rows * (passes * sae.d_sae + gathered) * sae.itemsize + of_optimizer


def step_seconds(sae: Shape, rows: float, machines: Machines) -> float:
    """Return flops / F + bytes / B, because products and passes over memory follow each other."""
    flops = machines.flops_16 if sae.sparse or sae.itemsize < FLOAT else machines.flops_32
    compute = step_flops(sae, rows) / flops + step_traffic(sae, rows) / machines.bandwidth
    return compute / machines.efficiency


def passes_seconds(
    tokens: float, flops_per_token: float, weights: float, per_pass: int, wide: bool, machines: Machines
) -> float:
    """Return tokens * flops_per_token / F + tokens / per_pass * weights / B, of passes that one GPU makes.

    `weights` is the language model's bytes, which each pass of `per_pass` tokens reads; `wide`: it runs in float32.
    """
    flops = machines.flops_32 if wide else machines.flops_16
    compute = tokens * flops_per_token / flops + tokens / per_pass * weights / machines.bandwidth
    return compute / machines.efficiency


def reading_seconds(n_bytes: float, machines: Machines) -> float:
    """Return bytes / disk of what a node reads of a cache: each byte once, which its memory keeps for all its GPUs."""
    return n_bytes / (machines.disk * machines.efficiency)


# ------------------------------------------------------------------------------------------------- bytes between ranks


def rows_received(rows: float, width: int, itemsize: int, n: int) -> float:
    """rows * w * s * (N - 1) / N: a rank makes 1 / N of the passes, and gets all other rows at the hooks it needs.

    In `layers`, where w is the width at the rank's own hooks.
    """
    return rows * width * itemsize * (n - 1) / n


def rows_dealt(rows: float, width: int, itemsize: int, n: int, buffered: int) -> float:
    """rows / N * w * s * (N - 1) / N * b / r: each of N ranks keeps 1 / N of the b rows of a buffer.

    A refill replaces the r rows that have been served, all steps of half the buffer, and deals out all b anew.
    """
    replaced = max(1, buffered // 2 // rows) * rows
    return rows / n * width * itemsize * (n - 1) / n * buffered / replaced


def rows_gathered(rows: float, width: int, itemsize: int, n: int) -> float:
    """rows * w * s * (N - 1) / N: N ranks that share latents get the rows of a batch that the others keep."""
    return rows * width * itemsize * (n - 1) / n


def ring_all_reduce(n_bytes: float, n: int) -> float:
    """2 * (N - 1) / N * bytes: a ring reduces N parts in N - 1 turns, and hands them round in as many."""
    return 2 * (n - 1) / n * n_bytes


def counts_reduced(d_sae: int, n: int) -> float:
    """`data`: a ring over d_sae * 8, the firing counts of all rows."""
    return ring_all_reduce(d_sae * COUNT, n)


def choice_of_batch_gathered(rows: float, k: int, n: int, sampled: bool) -> float:
    """(N - 1) / N * rows * 2 k * 4: what others offer to a choice of rows * k entries among all rows and latents.

    If no limit is sampled, each rank offers as many as are chosen: (N - 1) * rows * k * 4.
    """
    offered = SAMPLED * rows * k / n if sampled else rows * k
    return (n - 1) * offered * FLOAT


def choice_of_rows_gathered(rows: float, k: int, n: int) -> float:
    """`latents`: (N - 1) * rows * k * 4: the k largest of each row of each rank."""
    return (n - 1) * rows * k * FLOAT


def reconstructions_reduced(rows: float, d_out: int, n: int) -> float:
    """`latents`: a ring over rows * d_out * 4, to which each rank adds what its latents contribute."""
    return ring_all_reduce(rows * d_out * FLOAT, n)


# ------------------------------------------------------------------------------------------------------- over the links


def all_to_all_seconds(received: float, machines: Machines, n: int) -> float:
    """Return the time of rows from N - 1 others: of g - 1 in the same node, and of N - g by the network at once."""
    if n == 1:
        return 0.0
    inside = machines.together(n) - 1
    outside = n - 1 - inside
    shares = received * inside / (n - 1) / machines.interconnect, received * outside / (n - 1) / machines.network
    return max(shares) / machines.efficiency


def ring_seconds(received: float, machines: Machines, n: int) -> float:
    """Return received / the slowest link of a ring of N ranks."""
    return received / machines.link(n) if n > 1 else 0.0
