from pipeline.config.cluster import SparkSettings


def test_numbers_and_booleans_become_the_texts_that_spark_writes():
    assert SparkSettings(conf={"a": True, "b": 2, "c": 0.5, "d": "x"}).conf == {
        "a": "true", "b": "2", "c": "0.5", "d": "x",
    }  # fmt: skip
