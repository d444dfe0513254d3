"""What is new is told by ids: an image whose id is there already is left out, and that is said."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
from image_files import encoded, folder_settings, picture, rows_of, write_folder, write_table

from pipeline import __main__ as commands
from pipeline.data.manifest import DatasetError
from pipeline.ingest.job import ingest_dataset

pytestmark = [pytest.mark.spark, pytest.mark.long]


def test_images_that_are_left_out_for_their_ids_are_counted_and_said(spark, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "one", 20)
    other = write_folder(tmp_path / "two", 5, first=20)
    for path in (tmp_path / "one").rglob("*.png"):  # other images with the same names
        (other / path.relative_to(tmp_path / "one")).write_bytes(encoded(picture(1000 + int(path.stem))))

    def ingest(folder, **changes):
        settings = folder_settings(tmp_path / "data", tmp_path / folder, **changes)
        values = {"name": "x", "output": "out", "dataset": settings.model_dump(mode="json")}
        Path("settings.yaml").write_text(json.dumps(values))  # which is YAML, too
        commands.app(["ingest", "-c", "settings.yaml"], standalone_mode=False)
        result = json.loads(Path("out", "ingest.json").read_text())
        return sum(result["rows"].values()), result["already_there"], capsys.readouterr().err

    images, already_there, said = ingest("one")
    assert (images, already_there) == (20, 0)
    assert "already" not in said
    images, already_there, said = ingest("two", append=True)
    assert (images, already_there) == (25, 20)
    assert "20 images of the source were there already, by their ids (for a folder: the path below it;" in said
    with pytest.raises(DatasetError, match=r"nothing to append\. Images are known by their ids .* needs another name"):
        ingest("two", append=True, shard_bytes=1000)


@pytest.mark.parametrize("form", ["id_column", "labels"])
def test_ids_with_other_labels_are_warned_of(spark, tmp_path, caplog, form):
    """Ids that start anew at 0, or a file of labels that was mended."""

    def ingest(numbers, labels, **changes):
        if form == "id_column":
            columns = {"image": [encoded(picture(n)) for n in numbers], "label": labels,
                       "key": pa.array(range(len(labels)), pa.int32())}  # fmt: skip
            path = write_table(tmp_path / "table", columns)
            source = {"kind": "parquet", "id_column": "key"}
        else:
            path = write_folder(tmp_path / "in", len(numbers))
            rows = [f"{('cat', 'dog')[n % 2]}/{n}.png,{label}" for n, label in enumerate(labels)]
            (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
            source = {"labels": str(tmp_path / "labels.csv")}
        return ingest_dataset(spark, folder_settings(tmp_path / "data", path, source=source, **changes), cache="unused")

    ingest(range(20), ["a", "b"] * 10)
    before = rows_of(tmp_path / "data")
    with caplog.at_level(logging.WARNING, "pipeline.ingest.existing"):
        ingest(range(100, 124), ["a", "b"] * 5 + ["b", "a"] * 5 + ["a", "b"] * 2, append=True)
    assert "10 images of the source have another label than the images of the same ids" in caplog.text
    after = rows_of(tmp_path / "data")
    assert {key: after[key] for key in before} == before
    assert len(after) == 24
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pipeline.ingest.existing"):  # what only grows is no matter
        ingest(range(30), ["a", "b"] * 5 + ["a", "b"] * 10, append=True)
    assert "another label" not in caplog.text
