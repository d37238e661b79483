"""Benchmarks: jaxlm and its peers in alternation, in fresh processes, on equal terms."""
