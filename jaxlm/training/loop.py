"""The training loop: resume or start, step, look, save, stop well."""

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm.data.loader import prefetch
from jaxlm.dist import multihost
from jaxlm.objectives.forward import policy
from jaxlm.optim import chain
from jaxlm.training import evaluate, finish, lock, reference_cache, rollout, signals, stopping, teacher, teacher_cache
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.meta import compare_meta
from jaxlm.training.metrics import METRICS_FILE
from jaxlm.training.plan import check_limit
from jaxlm.training.progress import Progress, open_progress
from jaxlm.training.recorder import Recorder
from jaxlm.training.setup import Setup, global_batch, load_frozen, prepare, settle, start, use_compilation_cache
from jaxlm.training.step import State, train_step
from jaxlm.training.stopping import Stopping
from jaxlm.types import Batch, Variables

if TYPE_CHECKING:
    from jaxlm.config import RunConfig


Scorer = Callable[[Setup, Variables, Path], dict[str, float]]
"""`(run, model, directory for results) -> values by name`: what scores the tasks of a run before and after it."""


def train(config: "RunConfig", scorer: Scorer | None = None) -> int:
    """Train as the configuration says; in a run directory with a checkpoint, go on from it.

    Args:
      config: the run.
      scorer: called before the first and after the last step, with a folder in `evals` of the run directory.

    Returns:
      0 when done, 130 or 143 when a signal ended the run after its state was saved.

    Raises:
      ValueError, FileNotFoundError: bad input, `where: what; what to do`; a first start then leaves no directory.
      RuntimeError: a failure during the run; the last good checkpoint stays.
    """
    use_compilation_cache()
    multihost.initialize()
    setup = prepare(config)
    check_limit(config, setup.program)
    multihost.agree("configuration and data", repr(setup.identity).encode())
    directory = Path(config.run.dir)
    progress = open_progress(config.train.steps, enabled=multihost.is_main())
    with contextlib.ExitStack() as stack:
        # Attention, head and tensor-parallel products share out their work by the mesh in force.
        stack.enter_context(jax.set_mesh(setup.program.mesh))
        stack.callback(progress.close)
        stack.enter_context(_gone_if_refused(directory))
        stack.enter_context(lock.hold(directory, progress.message))
        stop = stack.enter_context(signals.catch(progress.message))
        setup = teacher_cache.taught(setup, progress.message)
        setup = reference_cache.referred(setup, progress.message)
        run = Run(setup, directory, progress, scorer)
        # Only now, so that what refuses a run says little else.
        for note in setup.data.notes:
            progress.message(note)
        return run.go(stop)


@contextlib.contextmanager
def _gone_if_refused(directory: Path) -> Iterator[None]:
    """A first start that bad input ends before its first metrics leaves no directory."""
    is_new = multihost.is_main() and not directory.exists()
    try:
        yield
    except (ValueError, FileNotFoundError):
        file = directory / METRICS_FILE
        if is_new and not (file.is_file() and file.stat().st_size):
            shutil.rmtree(directory, ignore_errors=True)
        raise


class Run:
    """One sitting of a run: the host's side of the loop and what it has open."""

    def __init__(self, setup: Setup, directory: Path, progress: Progress, scorer: Scorer | None = None) -> None:
        self.scorer = scorer
        self.setup, self.train, self.directory, self.progress = setup, setup.config.train, directory, progress
        self.checkpoints = Checkpoints(directory / "checkpoints", progress.message, keep=self.train.keep)
        self.stopping, self.begun, self.seconds = Stopping(), time.monotonic(), 0.0
        self.state, self.frozen, tokens = self._resume_or_start()
        finish.write_files(setup, directory)
        self.recorder = Recorder(setup, directory, progress, tokens)
        program = setup.program
        self.step_function = jax.jit(
            functools.partial(train_step, program.recipe), donate_argnums=0, out_shardings=(program.shardings, None)
        )
        self.rollout = rollout.make(setup)
        self.evaluator = evaluate.make(setup)
        self.pending: tuple[int, dict[str, Any]] | None = None

    def go(self, stop: signals.Stop) -> int:
        """Step until done, stopped early, or told to stop; returns the exit code."""
        step = int(self.state.step)
        with contextlib.ExitStack() as stack:
            stack.callback(self.recorder.close)
            stack.callback(self.checkpoints.close)
            if step == 0:
                self._evaluate(0)
                self._score("before", 0)
            batches = stack.enter_context(self._batches(step))
            while step < self.train.steps and not stopping.should_stop(self.stopping, self.train.patience):
                self._step(step, next(batches))
                step += 1
                code = stop(step)
                last = step == self.train.steps
                evaluated = self._evaluate(step) if last or step % self.train.eval_every == 0 else None
                if code is not None or last or step % self.train.checkpoint_every == 0:
                    self._save(step, evaluated)
                if code is not None and not last:
                    self.checkpoints.wait()
                    self.progress.message(
                        f"stopped at step {step}, state saved; the same command again goes on from there"
                    )
                    return code
            if step < self.train.steps:
                self._save(step, None)
                best = f"best step {self.stopping.best_step}"
                self.progress.message(
                    f"stopped early at step {step}: no better evaluation for {self.train.patience}; {best}"
                )
            self.checkpoints.wait()
            self._score("after", step)
            finish.finish(self, step)
        return 0

    @property
    def variables(self) -> Variables:
        """The model that is evaluated, sampled and exported, with what is frozen of it."""
        return policy(self.params, self.known)

    @property
    def known(self) -> Variables:
        """All trees that are there besides the trained ones."""
        return {**self.frozen, **self.state.extra}

    @property
    def params(self) -> Variables:
        """The trained trees; their average where one is kept."""
        if self.state.ema is not None:
            return self.state.ema
        return chain.evaluation_params(self.state.opt_state, self.state.params)

    @property
    def elapsed(self) -> float:
        """Seconds of training over all sittings."""
        return self.seconds + time.monotonic() - self.begun

    def _resume_or_start(self) -> tuple[State, Variables, int]:
        config, program, identity = self.setup.config, self.setup.program, self.setup.identity
        restored = self.checkpoints.restore(program.abstract, lambda saved: compare_meta(saved, identity))
        if restored is not None and restored.step > self.train.steps:
            raise ValueError(
                f"train.steps: {self.train.steps}, but {self.directory} is at step {restored.step} already; raise it, "
                "or choose another run.dir"
            )
        self.progress.status("initialising")
        frozen = load_frozen(config, program)
        if restored is None:
            params = teacher.student(config, program, frozen)
            return start(config.model.path, program, frozen, params), settle(program, frozen), 0
        self.stopping = stopping.from_json(restored.meta["stopping"])
        self.seconds = float(restored.meta["seconds"])
        self.progress.message(f"resuming {self.directory} at step {restored.step}")
        return restored.state, settle(program, frozen), int(restored.meta["tokens"])

    def _batches(self, first: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        setup = self.setup

        def make(step: int) -> Batch:
            return global_batch(setup.data.train, setup.loader.rows(step), setup.program.mesh)

        return prefetch(make, range(first, self.train.steps))

    def _step(self, step: int, batch: Batch) -> None:
        """Dispatch a step, then record the one before it, whose values are ready by then."""
        if self.recorder.first:
            self.progress.status("compiling the training step")
        self.checkpoints.check()
        if self.rollout is not None:
            batch = self.rollout(self.state.params, self.known, batch, step)
        self.state, metrics = self.step_function(self.state, self.frozen, batch)
        self._flush()
        self.pending = (step + 1, metrics)
        if step + 1 == self.train.steps or self.recorder.first:
            self._flush()

    def _flush(self) -> None:
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        self.recorder.step(step, metrics)
        if self.recorder.skips >= self.train.max_skips:
            last = max(self.checkpoints.steps(), default=None)
            kept = "nothing was saved yet" if last is None else f"the state of step {last} is saved"
            raise RuntimeError(
                f"loss: not finite, or its gradient, for {self.recorder.skips} steps in a row, up to step {step}; "
                f"{kept}; lower optimizer.learning_rate or look at the data, then run again"
            )

    def _evaluate(self, step: int) -> float:
        self._flush()
        with self.recorder.pause("evaluating"):
            values = self.evaluator(self.params, self.known)
            self.recorder.evaluation(step, values)
            self.recorder.samples(step, finish.take_samples(self.setup, self.variables))
        if step:
            self.stopping = stopping.update(self.stopping, step, values["loss"])
        return values["loss"]

    def _score(self, when: str, step: int) -> None:
        if self.scorer is None:
            return
        with self.recorder.pause("scoring the tasks"):
            values = self.scorer(self.setup, self.variables, self.directory / "evals" / when)
            self.recorder.evaluation(step, values)

    def _save(self, step: int, metric: float | None) -> None:
        self._flush()
        description = self.setup.identity | {
            "step": step,
            "tokens": self.recorder.tokens,
            "seconds": self.elapsed,
            "stopping": stopping.to_json(self.stopping),
        }
        finite = metric if metric is not None and math.isfinite(metric) else None
        with self.recorder.pause("saving"):
            self.checkpoints.save(step, self.state, description, finite)
