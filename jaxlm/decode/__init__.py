"""Decoding: continuing prompts token by token."""

from jaxlm.decode.generation import Samples, generate, sample

__all__ = ["Samples", "generate", "sample"]
