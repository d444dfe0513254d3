"""What a search may try: the values of `tune.space`, which of them go together, and the settings that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config import Settings, SettingsError
from pipeline.config.dotted import takes_only_integers
from pipeline.config.or_auto import AUTO
from pipeline.config.tune import Parameter, ordered
from pipeline.data import Manifest
from pipeline.report.names import SettingValue, Values
from pipeline.study.trainable import check_trainable, values_in_words

Space = Mapping[str, Parameter]

# Up to so many combinations all are checked before launch; of more, all pairs of values.
MOST_COMBINATIONS = 1_000
# Values of a range that are checked.
_MOST_VALUES = 32


def is_whole(name: str, parameter: Parameter) -> bool:
    """Whether a range is of whole numbers: as it says, or as its setting takes no others."""
    if parameter.whole is not None:
        return parameter.whole
    return takes_only_integers(Settings, name)


def is_active(parameter: Parameter, values: Values) -> bool:
    """Whether the condition of a parameter holds with the values of those before it."""
    return all(other in values and values[other] in allowed for other, allowed in parameter.when.items())


def values_of(name: str, parameter: Parameter, most: int | None = None) -> list[SettingValue]:
    """The values of a list, or of a range with steps, both ends included where the steps meet them.

    Parameters
    ----------
    most : with it, so many values of any range that are likely to show what its setting refuses
    """
    if parameter.choices is not None:
        return list(parameter.choices)
    assert parameter.low is not None and parameter.high is not None
    low, high, whole = parameter.low, parameter.high, is_whole(name, parameter)
    step = parameter.step or (1 if whole else None)
    if step is None:
        return [low, high]
    count = math.floor((high - low) / step + 1e-9) + 1
    if parameter.step is None and most is not None:  # low + 1 shows a setting that takes multiples alone
        return list(dict.fromkeys([low, min(low + 1, high), high]))
    numbers = range(count) if most is None or count <= most else [*range(most - 1), count - 1]
    return [round(low + number * step, 12) for number in numbers]


def combinations(space: Space, candidates: Mapping[str, Sequence[SettingValue]]) -> Iterator[Values]:
    """Every combination of candidates, the last parameter varying fastest; a parameter is absent where its condition
    does not hold."""

    def below(names: Sequence[str], values: Values) -> Iterator[Values]:
        if not names:
            yield values
            return
        name, *others = names
        if is_active(space[name], values):
            for value in candidates[name]:
                yield from below(others, {**values, name: value})
        else:
            yield from below(others, values)

    yield from below(ordered(space), {})


def grid_of(space: Space) -> list[Values]:
    """Every combination of a space that is finite."""
    return list(combinations(space, {name: values_of(name, parameter) for name, parameter in space.items()}))


def trial_settings(settings: Settings, values: Values, *, seed: int | None = None) -> Settings:
    """What a trial with these values is trained with: it is evaluated on the split that chooses, by its last network.

    Raises
    ------
    SettingsError
        A value cannot be used, alone or with the others.
    """
    own: Values = {"train.evaluate_on": settings.tune.search_on, "train.final_network": "last"}
    seeded: Values = {} if seed is None else {"train.seed": seed}
    return settings.with_values({**values, **own, **seeded})


def winner_settings(settings: Settings, values: Values, *, seed: int | None = None) -> Settings:
    """What the values taken are trained with at the end: evaluated on the split that judges, by its last network.

    Raises
    ------
    SettingsError
        A value cannot be used, alone or with the others.
    """
    seeded: Values = {} if seed is None else {"train.seed": seed}
    return settings.with_values({**values, "train.final_network": "last", **seeded})


def check_space(settings: Settings, manifest: Manifest) -> None:
    """Find what cannot be tried before anything is launched: by values at the ends of ranges and all listed ones.

    All combinations of these are checked where they are up to `MOST_COMBINATIONS`, else all pairs.

    Raises
    ------
    SettingsError
        There is nothing to search, a setting refuses a value, or a combination cannot be trained; it is named.
    """
    space = settings.tune.space
    if not space:
        raise SettingsError("tune.space is empty: name settings with the values to try, such as train.learning_rate")
    for name, parameter in space.items():
        if AUTO in (parameter.choices or ()):
            raise SettingsError(f"tune.space.{name} has {AUTO}, which the dataset decides: write numbers")
    manifest.split(settings.tune.search_on)  # raises where there is none
    networks: set[str] = set()
    for values in _checked_combinations(space):
        if problem := _problem(settings, manifest, values, networks):
            if _problem(settings, manifest, {}, set()) == problem:  # it is no matter of what varies
                raise SettingsError(problem.partition(": ")[2])
            few = _culprits(settings, manifest, values)
            raise SettingsError(
                f"tune.space: {values_in_words(few)} {_problem(settings, manifest, few, set()) or problem}"
            )


def _problem(settings: Settings, manifest: Manifest, values: Values, networks: set[str]) -> str:
    """Why a training with these values cannot be; empty where it can.

    Parameters
    ----------
    networks : see `check_trainable`
    """
    try:
        made = trial_settings(settings, values)
    except SettingsError as error:
        reason = str(error).partition("train.final_network=last: ")[2] or str(error)
        return f"cannot be used: {reason}"
    try:
        check_trainable(made, manifest, networks)
    except ValueError as error:
        return f"cannot be trained: {error}"
    return ""


def _culprits(settings: Settings, manifest: Manifest, values: Values) -> Values:
    """The fewest of the values that cannot be trained, with the file's values of all other settings."""
    for size in range(1, min(3, len(values))):
        for names in itertools.combinations(values, size):
            few = {name: values[name] for name in names}
            if _problem(settings, manifest, few, set()):
                return few
    return values


def _checked_combinations(space: Space) -> Iterator[Values]:
    candidates = {name: values_of(name, parameter, _MOST_VALUES) for name, parameter in space.items()}
    if math.prod(map(len, candidates.values())) <= MOST_COMBINATIONS:
        yield from combinations(space, candidates)
        return
    seen = set()
    for one, other in itertools.combinations(space, 2):
        needed = {one, other}
        while more := {parent for name in needed for parent in space[name].when} - needed:
            needed |= more
        few = {name: values if name in needed else values[:1] for name, values in candidates.items()}
        for values in combinations(space, few):
            if (key := repr(values)) not in seen:
                seen.add(key)
                yield values
