"""Decoding: continuing prompts token by token."""

from jaxlm.decode.generation import Samples, generate, sample
from jaxlm.decode.scores import logits

__all__ = ["Samples", "generate", "logits", "sample"]
