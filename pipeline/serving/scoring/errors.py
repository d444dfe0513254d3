"""What `score` says where it cannot do what it is asked."""


class ScoreError(ValueError):
    """There is nothing to score, the model does not fit, or the output is another one's; nothing was changed."""


class ScoreJobError(RuntimeError):
    """The Spark job failed; the message says why. What it has scored is kept, and the same command goes on."""
