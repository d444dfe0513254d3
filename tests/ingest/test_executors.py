from pipeline.ingest.executors import differing


def test_versions_that_differ_are_named_with_their_hosts():
    assert differing([]) == ""
    assert differing([("a", "25.0.1"), ("b", "25.0.1")]) == ""
    assert differing([("b", "25.0.1"), ("a", "25.0.1"), ("c", "24.0.0"), ("a", "25.0.1")]) == (
        "24.0.0 on c and 25.0.1 on a, b"
    )
