"""One call at a time changes a registered model: claims in its tags, served in the order of Lamport's bakery (1974).

A registry sets a tag without a look at what was there, so no tag can be taken by one of several that want it. Here each
call writes a tag of its own, and reads those of all: first one that says that it draws a ticket, then the ticket, which
is higher than all that it has read. Whoever has the lowest ticket has the model; of equal ones the token decides.
While a call lives, a thread writes its tag again and again (`storage.lease`). A tag that has not changed for as long
as it says, or whose process has ended on this machine, is deleted by whoever waits for it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from pydantic import Field, ValidationError

from pipeline.config.frozen import FrozenModel
from pipeline.driver.lease import DriverProcess, has_ended, this_process
from pipeline.storage.lease import Lease
from pipeline.tracking.registry import Registry, RegistryError

log = logging.getLogger(__name__)

# A claim lasts for so long beyond `tracking.outage_seconds`: calls that wait for a server that is down end before it.
GRACE_SECONDS = 60.0
# A claim is renewed so often within its time; others are looked at after such a pause.
_RENEWALS, _PAUSE_SECONDS = 9, 0.5
_PREFIX = "sparknorm.claim."
# The tokens of the claims that this process has.
_held: set[str] = set()


class ClaimContent(FrozenModel):
    """What the tag of a claim says.

    ticket : 0 while it is drawn
    driver : the process
    seconds : after which the claim has ended, if it is not renewed
    renewals : how often it was
    """

    ticket: int = Field(ge=0)
    driver: DriverProcess
    seconds: float = Field(gt=0)
    renewals: int = 0


class Claim(Lease):
    """The right of one call to change a registered model, renewed by a thread from `begin` to `end`.

    It does not wait for a server that is down: the next renewal comes soon, and at its end it ends by itself.
    """

    def __init__(self, registry: Registry, token: str, content: ClaimContent):
        self.token, self.content, self._registry = token, content, registry.impatient()
        super().__init__(registry.model, 0, "", seconds=content.seconds, renewals=_RENEWALS)

    def check(self) -> None:
        """Raise RegistryError where this call has shown no sign of life for so long that another may have the model."""
        if time.monotonic() - self._renewed_at >= self._seconds or not self.holds():
            raise RegistryError(
                f"this call had shown no sign of life for {self._seconds:g} s, and another may have gone on with "
                f"{self.folder}: nothing more was changed; run it again, which finishes what was begun"
            )

    def _is_newest(self) -> bool:
        return _key(self.token) in self._registry.model_tags()

    def _text(self, renewals: int, *, released: bool = False) -> bytes:
        return self.content.model_copy(update={"renewals": renewals}).model_dump_json().encode()

    def _write(self, renewals: int, *, released: bool = False) -> None:
        if released:
            self._registry.untag_model(_key(self.token))
        else:
            self._registry.tag_model(_key(self.token), self._text(renewals).decode())


@contextmanager
def claimed(registry: Registry, *, wait_seconds: float, outage_seconds: float) -> Iterator[None]:
    """Have a registered model for this call alone while the context lasts; within it, all that changes the model asks
    first whether that still holds.

    Parameters
    ----------
    registry : whose model there is
    wait_seconds : to wait for others to end
    outage_seconds : for which a call to the store may wait

    Raises
    ------
    RegistryError
        Others are at the model for longer than that; the message names one.
    """
    claim = _draw(registry, outage_seconds + GRACE_SECONDS)
    claim.begin()
    try:
        _wait_for_turn(registry, claim, wait_seconds)
        registry.check = claim.check
        yield
    finally:
        registry.check = None
        claim.end()
        _held.discard(claim.token)


def _draw(registry: Registry, seconds: float) -> Claim:
    """A claim with a ticket that is higher than all there are."""
    token, drawing = uuid.uuid4().hex[:16], ClaimContent(ticket=0, driver=this_process(), seconds=seconds)
    _held.add(token)
    try:
        registry.tag_model(_key(token), drawing.model_dump_json())
        ticket = 1 + max((each.ticket for each in _claims(registry).values()), default=0)
        claim = Claim(registry, token, drawing.model_copy(update={"ticket": ticket}))
        registry.tag_model(_key(token), claim.content.model_dump_json())
        return claim
    except BaseException:
        _held.discard(token)
        with suppress(Exception):  # a store that fails hides no error; it is seen to be of nobody, since not in `_held`
            registry.untag_model(_key(token))
        raise


def _wait_for_turn(registry: Registry, claim: Claim, wait_seconds: float) -> None:
    """Return when nobody is before this claim; delete the claims of processes that have ended."""
    me, give_up_at = claim.content.driver, time.monotonic() + wait_seconds
    seen: dict[str, tuple[ClaimContent, float]] = {}
    while True:
        before = {
            token: each
            for token, each in _claims(registry).items()
            if token != claim.token and (each.ticket, token) < (claim.content.ticket, claim.token)
        }
        now = time.monotonic()
        seen = {token: seen[token] if token in seen and seen[token][0] == each else (each, now)
                for token, each in before.items()}  # fmt: skip
        living = {token: each for token, each in before.items() if not _is_dead(token, each, me, now - seen[token][1])}
        for token in before.keys() - living.keys():
            log.warning("%s was claimed by process %s, which has ended", registry.model, before[token].driver)
            registry.untag_model(_key(token))
        if not living:
            claim.check()
            return
        first = min(living.values(), key=lambda each: each.ticket)
        if now > give_up_at:
            raise RegistryError(
                f"{registry.model} is being changed by process {first.driver} since {first.driver.since}, for longer "
                f"than registry.wait_seconds = {wait_seconds:g}: run this again when that has ended"
            )
        time.sleep(_PAUSE_SECONDS)


def _is_dead(token: str, content: ClaimContent, me: DriverProcess, unchanged_seconds: float) -> bool:
    driver = content.driver
    if (driver.pid, driver.started, driver.machine, driver.host) == (me.pid, me.started, me.machine, me.host):
        return token not in _held
    return bool(has_ended(driver, me)) or unchanged_seconds >= content.seconds


def _claims(registry: Registry) -> Mapping[str, ClaimContent]:
    """All claims, by their tokens."""
    found = {}
    for key, value in registry.model_tags().items():
        if key.startswith(_PREFIX):
            try:
                found[key.removeprefix(_PREFIX)] = ClaimContent.model_validate_json(value)
            except ValidationError:
                raise RegistryError(
                    f"the tag {key} of {registry.model} is no claim that this version can read: if no `register` is "
                    "at work, delete that tag in MLflow"
                ) from None
    return found


def _key(token: str) -> str:
    return f"{_PREFIX}{token}"
