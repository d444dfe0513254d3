"""What S3 is called where a path is handed to Spark's own readers."""

import pytest
from image_files import encoded, picture, write_table

from pipeline.config.dataset import SourceSettings
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import SourceError, exact_path, spark_path

pytestmark = pytest.mark.spark

# A real filesystem of Hadoop's, for addresses of any scheme, whose buckets are links to other places.
OVERLOAD = "org.apache.hadoop.fs.viewfs.ViewFileSystemOverloadScheme"


@pytest.fixture
def hadoop(spark, tmp_path):
    """Give Spark a filesystem of a scheme (`hadoop(scheme)`), whose bucket ``bucket`` is a local folder."""
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    before = {}

    def put(name, value):
        before.setdefault(name, conf.get(name))
        conf.set(name, value)

    def set_up(scheme):
        put(f"fs.{scheme}.impl", OVERLOAD)
        put(f"fs.{scheme}.impl.disable.cache", "true")
        put("fs.viewfs.overload.scheme.target.file.impl", "org.apache.hadoop.fs.LocalFileSystem")
        put("fs.viewfs.mounttable.bucket.link./data", f"file://{tmp_path}/data")

    yield set_up
    for name, value in before.items():
        conf.set(name, value) if value is not None else conf.unset(name)


@pytest.mark.parametrize("scheme", ["s3a", "s3"])
def test_a_table_on_s3_is_read_by_the_filesystem_that_spark_has(spark, hadoop, tmp_path, scheme):
    hadoop(scheme)
    write_table(tmp_path / "data" / "table", {"image": [encoded(picture(n)) for n in range(4)], "label": list("abab")})
    assert spark_path(spark, "s3://bucket/data/table") == f"{scheme}://bucket/data/table"
    assert exact_path(spark, "s3://bucket/data/[1].csv") == rf"{scheme}://bucket/data/\[1\].csv"
    source = open_source(spark, SourceSettings(kind="parquet", path="s3://bucket/data/table"), "unused")
    assert (source.rows, source.classes) == ({"": 4}, ("a", "b"))
    assert source.items.count() == 4


def test_a_spark_without_any_is_told_what_it_lacks(spark):
    with pytest.raises(SourceError, match=r"s3://bucket/table: Spark has no filesystem for S3.*hadoop-aws"):
        open_source(spark, SourceSettings(kind="parquet", path="s3://bucket/table"), "unused")


def test_a_table_whose_name_looks_like_a_pattern(spark, tmp_path):
    def rows(path):
        return open_source(spark, SourceSettings(kind="parquet", path=str(path)), "unused").rows

    for name, count in (("a[1]{x}*", 4), ("a1", 2)):
        columns = {"image": [encoded(picture(n)) for n in range(count)], "label": list("abab")[:count]}
        write_table(tmp_path / name, columns)
    assert rows(tmp_path / "a[1]{x}*") == rows(tmp_path / "a[1]{x}*" / "some.parquet") == {"": 4}
    assert rows(tmp_path / "a[1]") == {"": 2}  # there is none of this name
    assert rows(tmp_path / "a1" / "*.parquet") == {"": 2}


def test_other_addresses_stay(spark, tmp_path):
    assert spark_path(spark, "memory://bucket/x") == "memory://bucket/x"
    assert spark_path(spark, "s3a://bucket/x") == "s3a://bucket/x"
    assert spark_path(spark, str(tmp_path)) == f"file://{tmp_path}"
