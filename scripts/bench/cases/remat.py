"""Memory and time of the training step under each rematerialisation policy."""

import functools
from typing import Any

from scripts.bench.cases.train import jaxlm

SIDES: dict[str, Any] = {
    policy: functools.partial(lambda options, policy: jaxlm(options | {"remat": policy}), policy=policy)
    for policy in ("none", "dots", "block", "full")
}
