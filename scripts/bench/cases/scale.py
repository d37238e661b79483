"""jaxlm alone over lengths, widths and depths: throughput and temporary memory."""

from scripts.bench.cases.train import jaxlm

SIDES = {"jaxlm": jaxlm}
