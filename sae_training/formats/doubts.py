"""What is refused or doubted about weights once they are read: values that are no numbers, and swapped axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

MAY_BE_INFINITE = ("log_threshold", "inference_threshold", "threshold")
"""-inf lets every pre-activation above 0 through, inf none."""

PART = 2**22  # values that are looked at in one go

CLEARLY = 0.2  # cosine; that of trained latents is 0.3 to 0.9, of random ones 0


MOST_OF_A_MESSAGE = 4000  # characters; a file may name a tensor with millions


def printable(text: str) -> str:
    """A text that may hold what a stranger wrote: without codes that a terminal obeys, and not without end."""
    shown = without_codes(text[:MOST_OF_A_MESSAGE])
    return shown if len(text) <= MOST_OF_A_MESSAGE else f"{shown} ... ({len(text):,} characters)"


def without_codes(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Name the file in whatever error its values cause: they are a stranger's, and may be of any type and shape."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = printable(str(error))
        if not isinstance(error, ValueError) or (str(path) in why and why == str(error)):
            raise
        raise ValueError(why if str(path) in why else f"{path}: {why}") from error
    except (TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ValueError(
            f"{path}: its values do not fit together ({type(error).__name__}: {printable(str(error))}); check the "
            "file, or use another copy."
        ) from error


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """ValueError that names the tensors that hold NaN, or infinite values where these mean nothing."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(name, tensor)]
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: NaN or infinite values, which make every output NaN; use another copy. "
            "`sae-training inspect --full` counts them."
        )


def is_finite(name: str, tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    in_order = tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
    parts = (in_order,) if in_order.is_contiguous() else in_order.split(max(1, PART // in_order[:1].numel()))
    for part in parts:  # of what is not in order a copy is made
        least, largest = torch.aminmax(part)  # NaN, if there is one; needs no memory of the tensor's size
        if least.isnan() or (name not in MAY_BE_INFINITE and not (least.isfinite() and largest.isfinite())):
            return False
    return True


@torch.no_grad()
def swapped_axes(tensors: Mapping[str, Tensor]) -> str | None:
    """A remark if square matrices fit each other better when one of them is transposed, else None."""
    W_enc, W_dec = tensors.get("W_enc"), tensors.get("W_dec")
    if W_enc is None or W_dec is None or W_enc.dim() != 2 or W_enc.shape != W_dec.shape or len(set(W_enc.shape)) > 1:
        return None
    as_it_is, swapped = mean_cosine(W_enc.T, W_dec), mean_cosine(W_enc, W_dec)
    if swapped > as_it_is + CLEARLY:
        return (
            f"W_enc and W_dec are square, and latents' encoders and decoders fit (cosine {swapped:.2f}, not "
            f"{as_it_is:.2f}) if one of the two is transposed; compare with outputs of the program that wrote the file"
        )
    return None


def mean_cosine(rows: Tensor, others: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(rows, others, dim=1).mean())
