"""What readers decode: stored images, and binary arrays as rows."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from small_images import COLOUR, GREY, file_of, noise

from pipeline.data.codec import BadImageError, as_binary, as_rows, decode_stored
from pipeline.ingest.images import ImageSpec, from_pixels


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_stored_images_of_another_shape_are_refused(encoding):
    stored = from_pixels(noise(*COLOUR), ImageSpec(COLOUR, encoding=encoding))
    for shape in ((3, 13, 10), (1, 12, 10), (3, 10, 13)):
        with pytest.raises(BadImageError, match="wrong_size"):
            decode_stored(stored, encoding, shape)


@pytest.mark.parametrize("mode", ["1", "P", "I;16"])
def test_stored_images_of_another_mode_are_refused(mode):
    with pytest.raises(BadImageError, match="wrong_size"):
        decode_stored(file_of(Image.new(mode, (10, 12)), "PNG"), "png", GREY)


def test_damaged_stored_images_are_refused():
    stored = from_pixels(noise(*COLOUR), ImageSpec(COLOUR, encoding="png"))
    for payload, reason in ((b"", "undecodable"), (b"x" * 50, "undecodable"), (stored[:-60], "truncated")):
        with pytest.raises(BadImageError, match=reason):
            decode_stored(payload, "png", COLOUR)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_rows_are_a_view_also_of_a_slice(kind):
    array = pa.array([b"abcd", b"efgh", b"ijkl"], kind)
    np.testing.assert_array_equal(as_rows(array.slice(1), 4), [list(b"efgh"), list(b"ijkl")])
    np.testing.assert_array_equal(as_rows(array.slice(1, 1), 4), [list(b"efgh")])
    assert np.shares_memory(as_rows(array, 4), np.frombuffer(array.buffers()[2], np.uint8))
    assert as_rows(pa.array([], kind), 4).shape == (0, 4)


def test_rows_of_other_lengths_are_refused():
    assert as_rows(pa.array([b"abcd", b"abc"]), 4) is None
    assert as_rows(pa.array([b"abc", b"abcde"]), 4) is None
    assert as_rows(pa.array([b"abcd", None]), 4) is None
    assert as_rows(pa.array([b"", b""]), 4) is None


def test_rows_and_binary_are_the_inverse_of_each_other():
    rows = noise(7, 6)
    array = as_binary(rows)
    array.validate(full=True)
    assert array.to_pylist() == [row.tobytes() for row in rows]
    np.testing.assert_array_equal(as_rows(array, 6), rows)
    assert as_binary(rows[:, ::2]).to_pylist() == [row[::2].tobytes() for row in rows]
    assert as_binary(rows[:0]).to_pylist() == []
