"""Any file and any override ends in settings, or in one error that says where it is, whatever is in it."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from pipeline.config import Settings, SettingsError, load_settings, yaml_text
from pipeline.config.dotted import leaves
from pipeline.config.effective import effective_yaml
from pipeline.config.secrets import MASK

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
NAMES = sorted(name for name, _ in leaves(Settings(name="x").model_dump()))
SECTIONS = sorted({name.rpartition(".")[0] for name in NAMES} - {""})
WORDS = (
    "",
    "auto",
    "off",
    "none",
    "batch",
    "[a",
    "1e400",
    "0x1f",
    "model.norm",
    "train.seed",
    "***",
    "s3://a:b@c",
    "a\nb",
)

texts = some.text(max_size=20) | some.sampled_from(WORDS + tuple(NAMES))
scalars = some.none() | some.booleans() | some.integers() | some.floats() | texts | some.binary(max_size=5)
keys = some.sampled_from([*NAMES, *SECTIONS, "extends"]) | texts | some.none() | some.integers() | some.booleans()
values = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=4) | some.dictionaries(keys, inner, max_size=4), max_leaves=8
)
DEFAULTS = dict(leaves(Settings(name="x").model_dump(mode="json")))
known = some.sampled_from([*NAMES, *SECTIONS, *(f"compare.grid.{name}" for name in NAMES)])
entries = known.flatmap(lambda name: some.tuples(some.just(name), some.just(DEFAULTS.get(name, [1, 2])) | values))
# Most of a tree is sound, so that what is not gets far.
sound = {"name": "x", "model": {"norm": ["none", "batch"]}, "train": {"learning_rate": 0.1, "lanes": 4}}


def ends_well(path, overrides=()):
    """Whether settings came of it; they are read back from what `sparknorm settings` prints of them."""
    try:
        loaded = load_settings(path, overrides)
    except SettingsError as error:
        lines = str(error).split("\n")
        assert all(line.startswith((str(path), "override ")) for line in lines), str(error)
        assert all(len(line) < 3_000 + len(str(path)) for line in lines), str(error)
        return False
    printed = path.with_name("printed.yaml")
    printed.write_text(effective_yaml(loaded), encoding="utf-8")
    if MASK not in printed.read_text(encoding="utf-8"):
        again = load_settings(printed)
        assert again.model_dump_json() == loaded.model_dump_json()
    return True


def put(tree, name, value):
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def dump(value):
    return yaml.dump(value, Dumper=yaml_text._Dumper, allow_unicode=True, sort_keys=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "study.yaml"


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=count < 1_000, database=None)


def check_trees(study, count):
    reached = []

    @examples(count)
    @given(some.lists(entries, min_size=1, max_size=4), some.integers(0, 3))
    def any_tree(chosen, alone):
        tree = {**sound, "model": dict(sound["model"]), "train": dict(sound["train"])} if alone else {}
        for name, value in chosen:
            put(tree, name, value)
        study.write_text(dump(tree), encoding="utf-8")
        reached.append(ends_well(study))

    any_tree()
    assert 0 < sum(reached) < len(reached)
    return len(reached), sum(reached)


def check_overrides(study, count):
    reached = []
    study.write_text(dump(sound))
    names = some.sampled_from(["", "=", ".", "a..b", "name.x", "train.epochs.x", "reader"]) | texts
    written = some.builds(lambda value: dump(value).strip(), values) | texts | some.builds(yaml_text.write, scalars)
    usual = some.builds(lambda entry: f"{entry[0]}={yaml_text.write(entry[1])}", entries)

    @examples(count)
    @given(some.lists(usual | some.builds("{}={}".format, names | known, written) | texts, max_size=3))
    def any_overrides(overrides):
        reached.append(ends_well(study, overrides))

    any_overrides()
    assert 0 < sum(reached) < len(reached)
    return len(reached), sum(reached)


def check_files(study, count):
    reached = []
    whole = QUICKSTART.read_bytes().replace(b"extends: dataset/fashion_mnist.yaml", b"output: x")

    @examples(count)
    @given(some.binary(max_size=30), some.integers(0, len(whole)), some.integers(0, 30), some.booleans())
    def any_file(data, at, length, alone):
        study.write_bytes(data if alone else whole[:at] + data + whole[at + length :])
        reached.append(ends_well(study))

    any_file()
    assert 0 < sum(reached) < len(reached)
    return len(reached), sum(reached)


@pytest.mark.parametrize("check", [check_trees, check_overrides, check_files])
def test_settings_or_one_error(study, check):
    check(study, 100)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_trees, check_overrides, check_files])
def test_settings_or_one_error_many_times(study, check):
    inputs, of_them = check(study, 3_000)
    print(f"\n{check.__name__}: {inputs} inputs, {of_them} of them settings")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5_000, "{a: " * 5_000, "name: &a [*a]", "name: x\nmodel: &a {depth: *a}", "a: &x {<<: *x}",
        "name: x\ntrain: {epochs: 1" + "0" * 5_000 + "}", "name: x\ntrain: {epochs: 0x" + "f" * 5_000 + "}",
        "name: \x00", "name: \ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe", "--- a\n--- b",
        "? [a, b]\n: c", "? {a: b}\n: c", "name: !!python/object/apply:os.getcwd []", "name: x\n1: 2",
        "name: x\nspark: &a {conf: {a: *a}}", "name: x\ncompare: {grid: {1: [2]}}",
    ],
    ids=lambda text: repr(text[:40]),
)  # fmt: skip
def test_what_random_trees_seldom_hold(study, text):
    study.write_bytes(text if isinstance(text, bytes) else text.encode())
    ends_well(study)
    with pytest.raises(SettingsError):
        load_settings(study)
