"""The aliases of a registered model, moved one after the other so that a process that dies in between is gone on with.

Only one process at a time does so (`serving.claim`). Before anything moves, the version says by its tags what is
decided and that it is not done; after all has moved, that it is. At any moment one version at most is the champion, and
the one before it can be found.
"""

from __future__ import annotations

import time

from pipeline.tracking.registry import Registry, RegistryError, Version

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
# Tags of a version. The status is `PENDING` from its first moment until what was decided of it is done.
STATUS, DECISION, HISTORY = "sparknorm.status", "sparknorm.decision", "sparknorm.history"
PENDING, DONE = "pending", "done"
# On the version that a rollback takes the alias from, while it is under way: the version that gets it.
_ROLLING_BACK_TO = "sparknorm.rolling_back_to"
ROLLED_BACK = "rolled back"


def aliases_of(registry: Registry) -> dict[str, str]:
    """The version of each of our aliases that one has."""
    holders = {alias: registry.holder(alias) for alias in (CHALLENGER, CHAMPION, PREVIOUS)}
    return {alias: holder.number for alias, holder in holders.items() if holder}


def promote(registry: Registry, version: Version, champion: Version | None, tags: dict[str, str]) -> None:
    """Make a version the champion, and the champion the previous one.

    Parameters
    ----------
    champion : that it was held against
    tags : what is decided, beside its status

    Raises
    ------
    RegistryError
        Another version is the champion by now, which it was not held against; nothing was moved.
    """
    now = registry.holder(CHAMPION)
    if (now and now.number) != (champion and champion.number):
        raise RegistryError(
            f"version {version.number} of {registry.model} was held against "
            f"{f'version {champion.number}' if champion else 'no champion'}, and meanwhile somebody has made "
            f"{f'version {now.number}' if now else 'none'} the champion: run register again"
        )
    registry.tag(version.number, {STATUS: PENDING, **tags})
    if champion is not None and champion.number != version.number:
        registry.set_alias(PREVIOUS, champion.number)
    registry.set_alias(CHAMPION, version.number)
    finish_promotion(registry, version)


def finish_promotion(registry: Registry, version: Version) -> None:
    """What is left to do once a version is the champion."""
    challenger = registry.holder(CHALLENGER)
    if challenger is not None and challenger.number == version.number:
        registry.delete_alias(CHALLENGER)
    registry.tag(version.number, {STATUS: DONE})


def roll_back(registry: Registry) -> tuple[Version, Version]:
    """Let champion and previous champion change places; done again, they change back, but not before `end_rollback`.

    Returns
    -------
    from, to : the version that was the champion, and the one that is it now

    Raises
    ------
    RegistryError
        There is no champion, or none before it.
    """
    under_way = registry.versions(_ROLLING_BACK_TO)
    if under_way:  # a process died within it
        fallen = under_way[0]
        back = registry.version(fallen.tags[_ROLLING_BACK_TO])
    else:
        fallen, back = registry.require_holder(CHAMPION), registry.require_holder(PREVIOUS)
        if fallen.number == back.number:
            raise RegistryError(
                f"version {fallen.number} of {registry.model} is champion and previous in one: there is nothing to "
                "roll back to"
            )
        registry.tag(fallen.number, {_ROLLING_BACK_TO: back.number})
    registry.set_alias(CHAMPION, back.number)
    registry.set_alias(PREVIOUS, fallen.number)
    registry.tag(fallen.number, {DECISION: ROLLED_BACK, HISTORY: history(fallen, f"rolled back to {back.number}")})
    registry.tag(back.number, {DECISION: "promoted", HISTORY: history(back, f"champion again after {fallen.number}")})
    return fallen, back


def end_rollback(registry: Registry, fallen: Version) -> None:
    """Called once the result is written: a process that dies before has its rollback finished, and not turned round, by
    the next."""
    registry.untag(fallen.number, _ROLLING_BACK_TO)


def history(version: Version, event: str) -> str:
    """The tag with what was decided of a version before, and this; the newest first, since long tags are cut."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return "\n".join([f"{now} {event}", *filter(None, [version.tags.get(HISTORY, "")])])
