"""The end of one training before that of its schedule, decided by what its evaluations show while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.cluster.stop import Stop
from pipeline.telemetry import Event


class EarlyEnd(Stop):
    """Is set when a training must end: since it is pruned, or since all trials must end.

    Parameters
    ----------
    decide : called with each event of an evaluation, in the order written and from one thread at a time; returns
        whether the training is to be pruned. After a restart it gets what it got before once more
    all_trials : set when every trial must end

    Attributes
    ----------
    pruned : whether `decide` has said so
    error : what `decide` has raised, which ends the training too
    """

    def __init__(self, decide: Callable[[Event], bool], all_trials: Stop):
        super().__init__()
        self._decide, self._all_trials = decide, all_trials
        self.pruned = False
        self.error: Exception | None = None

    def is_set(self) -> bool:
        return super().is_set() or self._all_trials.is_set()

    def was_killed(self) -> bool:
        return self._all_trials.was_killed()

    def see(self, events: Sequence[Event]) -> None:
        """Decide by the evaluations among these events, until the first that says that the training ends."""
        for event in events:
            if self.pruned or self.error is not None:
                return
            if event["kind"] == "evaluation":
                self._see(event)

    def prune(self) -> None:
        """End the training as one that is pruned."""
        self.pruned = True
        self.set()

    def _see(self, event: Event) -> None:
        try:
            if self._decide(event):
                self.prune()
        except Exception as error:  # noqa: BLE001 - raised where the training was begun
            self.error = error
            self.set()
