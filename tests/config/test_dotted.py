import pytest

from pipeline.config import Settings
from pipeline.config.dotted import is_setting, join_keys, leaves, nearest, put


def test_leaves_are_named_by_their_path_in_the_order_of_the_tree():
    assert list(leaves({"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}})) == [
        ("a", 1),
        ("b.c", [2]),
        ("b.d.e", None),
    ]


@pytest.mark.parametrize(
    ("name", "known"),
    [("train.epochs", True), ("train.augment.flip", True), ("name", True), ("compare.grid", True), ("train", False),
     ("train.augment", False), ("train.epocs", False), ("train.epochs.x", False), ("x.y", False), ("", False)],
)  # fmt: skip
def test_only_single_values_are_settings(name, known):
    assert is_setting(Settings, name) == known


@pytest.mark.parametrize(
    ("name", "hint"),
    [("train.epocs", "train.epochs"), ("trian", "train"), ("train.augment.flp", "train.augment.flip"),
     ("train.zzzz", ""), ("nothing.like.it", ""), ("train.epochs.x", ""), ("learning_rate", "train.learning_rate"),
     ("train.norm", "model.norm"), ("path", "dataset.path"), ("augment.flip", "train.augment.flip"),
     ("train.model", "model")],
)  # fmt: skip
def test_the_nearest_name_is_of_the_same_section_or_the_same_in_another(name, hint):
    assert nearest(Settings, name) == hint


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("name", {"name": 1}),
        ("train.augment.flip", {"train": {"augment": {"flip": 1}}}),
        ("spark.conf.spark.executor.memory", {"spark": {"conf": {"spark.executor.memory": 1}}}),
        ("compare.grid.model.norm", {"compare": {"grid": {"model.norm": 1}}}),
        ("not.known.at.all", {"not": {"known": {"at": {"all": 1}}}}),
    ],
)
def test_a_value_is_put_where_its_name_says(name, tree):
    empty = {}
    put(Settings, empty, name, 1)
    assert empty == tree


def test_what_stands_beside_a_value_stays():
    tree = {"train": {"epochs": 1}, "model": None}
    put(Settings, tree, "train.lanes", 2)
    put(Settings, tree, "model.depth", 3)
    assert tree == {"train": {"epochs": 1, "lanes": 2}, "model": {"depth": 3}}
    with pytest.raises(ValueError, match="epochs is a value, not a section"):
        put(Settings, tree, "train.epochs.x", 1)


def test_nested_entries_of_mappings_get_dotted_keys():
    tree = {"spark": {"conf": {"spark": {"a": 1, "b.c": 2}}}, "compare": {"grid": {"model": {"norm": [1]}}, "tune": []}}
    join_keys(Settings, tree)
    assert tree == {
        "spark": {"conf": {"spark.a": 1, "spark.b.c": 2}}, "compare": {"grid": {"model.norm": [1]}, "tune": []},
    }  # fmt: skip
