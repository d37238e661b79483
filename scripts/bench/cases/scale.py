"""jaxlm alone over lengths and widths: throughput and temporary memory."""

from scripts.bench.cases.train import jaxlm

SIDES = {"jaxlm": jaxlm}
