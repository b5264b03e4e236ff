"""Sparse codes, the choice of active latents, and sparse products, in plain torch, compiled C++ and Triton."""
