"""What is decided and refused once the dataset is known, before Spark is asked for anything."""

import pytest

from pipeline import study
from pipeline.config import load_settings
from pipeline.data import manifest, versions
from pipeline.data.manifest import DatasetError, Image, Manifest, Shard, Split
from pipeline.driver import checks, train
from pipeline.serving.result import ExportError
from pipeline.serving.trained import find_trained

AUTO = ("train.epochs=auto", "train.batch_size=auto", "train.warmup_epochs=auto")
GOOD = {"train": (600, 300, 148), "validation": (60, 30, 10), "test": (60, 30, 10)}


def load(folder, *overrides, **label_counts):
    """Settings, and the manifest of a dataset of which nothing else is there."""
    splits = {
        name: manifest.with_statistics(
            list(counts), [[0], [0]],
            (Shard(path=f"{name}/a.parquet", rows=sum(counts), bytes=9, sha256="0", row_groups=groups(sum(counts))),),
            (1, 8, 8),
        )
        for name, counts in {**GOOD, **label_counts}.items()
    }  # fmt: skip
    versions.publish(
        str(folder / "data"),
        Manifest(
            name="pets", settings_digest="", spark_application="", classes=("cat", "dog", "eel"), set_aside={},
            input_rows=sum(split.rows for split in splits.values()), sources=(), splits=splits,
            image=Image(encoding="raw", shape=(1, 8, 8)),
        ),
    )  # fmt: skip
    given = (f"dataset.path={folder}/data", f"output={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    return load_settings("conf/quickstart.yaml", [*given, *overrides])


def groups(rows):
    """Row groups of 30."""
    return (30,) * (rows // 30) + ((rows % 30,) if rows % 30 else ())


def test_auto_ends_where_the_dataset_is_opened(tmp_path, capsys):
    settings, found = checks.open_dataset(load(tmp_path, *AUTO))
    assert found.name == "pets"
    assert (settings.train.batch_size, settings.train.epochs, settings.train.warmup_epochs) == (32, 47, 2.35)
    assert (
        "note: auto, for 1,048 training images: batch size 32, 47 epochs, warm-up over 2.35" in capsys.readouterr().err
    )
    assert checks.open_dataset(settings)[0] == settings
    assert not capsys.readouterr().err


def test_a_training_of_auto_settings_is_looked_for_by_its_numbers(tmp_path):
    with pytest.raises(ExportError, match="no finished training 'quickstart batch seed=0'"):
        find_trained(load(tmp_path, *AUTO))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train": (1048, 0, 0)}, "images of one class alone, 'cat'"),
        ({"test": (60, 39, 1)}, r"fewer than 2 images of 'eel' \(1\)"),
        ({"test": (9, 9, 9)}, "split 'test' has 27 images, and below 30 an accuracy says nothing"),
    ],
)
def test_a_comparison_that_cannot_be_measured_is_refused_before_anything_runs(tmp_path, counts, words):
    with pytest.raises(DatasetError, match=words):
        study.compare(None, load(tmp_path, **counts))
    assert not (tmp_path / "runs").exists()


def test_a_training_of_one_class_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check_trial", lambda *_: None)
    with pytest.raises(DatasetError, match="images of one class alone, 'cat'"):
        train(None, load(tmp_path, train=(1048, 0, 0)))


def test_weights_of_a_class_that_is_not_there_are_refused(tmp_path):
    settings = load(tmp_path, "train.class_weights={shark: 2}", "train.batch_size=32")
    with pytest.raises(
        ValueError, match="names 'shark', which is no class of dataset pets: use names of cat, dog, eel"
    ):
        checks.check_dataset(settings)


def test_the_comparison_keeps_what_was_said_of_its_dataset():
    from small_comparisons import comparison_of

    from pipeline.report.comparison import StudyRun
    from pipeline.study.summary import summarize

    made = comparison_of(seeds=2)
    settings = load_settings("conf/quickstart.yaml")
    split = Split(rows=20, label_counts=(10, 10), pixel_sums=((0,), (0,)), mean=(0.0,), std=(1.0,), shards=())
    pets = Manifest(
        name="pets", settings_digest="", spark_application="", classes=("cat", "dog"), input_rows=0, set_aside={},
        sources=(), splits={"test": split}, image=Image(encoding="raw", shape=(1, 8, 8)),
    )  # fmt: skip
    runs = [StudyRun(**run.model_dump(include=set(StudyRun.model_fields), exclude_unset=True)) for run in made.runs]
    runs = [run.model_copy(update={"recall": run.recall[:2]}) for run in runs]  # of cat and dog
    said = ["Dataset pets has 900 images."]
    result = summarize(settings, pets, runs, [], notes=said, side_by_side=1, parent_run_id="p")
    assert result.warnings[0] == "Dataset pets has 900 images."
