"""Sparse codes, and the products and choices that make and use them: plain torch, compiled C++, Triton."""
