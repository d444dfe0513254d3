import numpy as np
import pyarrow as pa

from pipeline import images


def test_reasons():
    payloads = pa.array([b"abcd", None, b"abc", b"abcd", b"abcd", b"", b"abcde"], pa.binary())
    labels = pa.array([0, 0, 0, 2, None, 1, -1], pa.int32())
    reasons = images.reasons_against(payloads, labels, image_bytes=4, num_classes=2).to_pylist()
    assert reasons == [
        None,
        "missing_image",
        "wrong_size",
        "unknown_label",
        "unknown_label",
        "wrong_size",
        "wrong_size",
    ]


def test_rows_are_a_view_also_of_a_slice():
    array = pa.array([b"abcd", b"efgh", b"ijkl"], pa.binary())
    np.testing.assert_array_equal(images.as_rows(array.slice(1), 4), [list(b"efgh"), list(b"ijkl")])
    assert np.shares_memory(images.as_rows(array, 4), np.frombuffer(array.buffers()[2], np.uint8))
    assert images.as_rows(pa.array([], pa.binary()), 4).shape == (0, 4)


def test_rows_of_other_lengths_are_refused():
    assert images.as_rows(pa.array([b"abcd", b"abc"]), 4) is None
    assert images.as_rows(pa.array([b"abcd", None]), 4) is None
    assert images.as_rows(pa.array([b"abcd", b"abcd"], pa.large_binary()), 4).shape == (2, 4)
