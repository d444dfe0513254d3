"""The seeds that a training takes, for every setting that says some."""

from __future__ import annotations

from collections.abc import Sequence

# Beyond this, torch's generators do not take what the weights' seeds are multiplied by.
LAST_SEED = 2**46
# Left free beyond a seed that others follow; of these, those are passed over that a comparison has already.
ROOM = 2**20


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Check a list of seeds.

    Parameters
    ----------
    name : of the setting

    Raises
    ------
    ValueError
        A training cannot take one of them.
    """
    if wrong := [seed for seed in seeds if not 0 <= seed <= LAST_SEED]:
        raise ValueError(f"{name} has {wrong[0]}: a seed is 0 or more, and at most {LAST_SEED}")
