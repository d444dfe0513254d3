"""Statistics of drift against their formulas, and what they say of samples of one population and of another."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2

from pipeline.data.profile import Profile, merged, profile_of_answers, profile_of_images, side_bin
from pipeline.report.drift import drift_of, index_by_chance, js_distance, stability_index, state_of
from pipeline.report.score_page import drawing_of, page_of, picture_of, verdict

CLASSES = ("cat", "cow", "dog")


def profile(images, probabilities, sides=None) -> Profile:
    figures, answers = profile_of_images(images), profile_of_answers(probabilities)
    sums = figures["channel_sums"].tolist()
    return Profile(
        images=len(images),
        pixels=int(figures["pixels"]),
        channel_sums=(tuple(sums[0]), tuple(sums[1])),
        brightness=tuple(figures["brightness"].tolist()),
        contrast=tuple(figures["contrast"].tolist()),
        shorter_sides=sides or {},
        classes=tuple(answers["classes"].tolist()),
        confidence=tuple(answers["confidence"].tolist()),
        confidence_sum=float(answers["confidence_sum"]),
    )


def some(rows, seed, *, brighter=0, sure=1.0):
    """Images and answers of a population."""
    random = np.random.default_rng(seed)
    base = random.integers(20, 180, (rows, 1, 1, 1))
    images = np.clip(base + random.normal(0, 20, (rows, 2, 6, 5)) + brighter, 0, 255).astype(np.uint8)
    return images, random.dirichlet(np.full(3, 1 / sure), rows).astype(np.float32)


def test_figures_of_images_are_those_of_numpy():
    images, probabilities = some(50, 0)
    made = merged([profile(images[:20], probabilities[:20]), profile(images[20:], probabilities[20:])])
    scaled = images / 255
    np.testing.assert_allclose(made.channel_means, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(made.channel_stds, scaled.std((0, 2, 3)), rtol=1e-9)
    flat = images.reshape(50, -1)
    assert made.brightness == tuple(np.histogram(flat.mean(1), 256, (0, 255))[0])
    assert made.contrast == tuple(np.histogram(flat.std(1), 256, (0, 127.5))[0])
    assert made.classes == tuple(np.bincount(probabilities.argmax(1), minlength=3))
    assert made.confidence == tuple(np.histogram(probabilities.max(1), 200, (0, 1))[0])
    assert made.confidence_sum == pytest.approx(probabilities.max(1).sum(dtype=float))
    assert made.images == 50


def test_an_empty_set_adds_nothing():
    images, probabilities = some(9, 1)
    whole = profile(images, probabilities)
    assert merged([whole, profile(images[:0], probabilities[:0])]) == whole


def test_sizes_have_a_bin_each():
    assert [side_bin(*size) for size in ((16, 900), (17, 900), (5000, 4097))] == [
        "up to 16", "up to 32", "more than 4096",
    ]  # fmt: skip


def test_the_index_is_its_formula():
    before, now = (10, 20, 70), (30, 30, 40)
    q, p = (np.array(counts) + 0.5 for counts in (before, now))
    q, p = q / q.sum(), p / p.sum()
    assert stability_index(before, now) == pytest.approx(sum((p - q) * np.log(p / q)))
    assert stability_index(before, before) == 0
    assert js_distance(before, now) == pytest.approx(jensenshannon(before, now, base=2))
    assert js_distance((1, 0), (0, 1)) == 1


@pytest.mark.parametrize(("bins", "before", "now"), [(10, 2000, 3000), (10, 2000, 20), (100, 4000, 50), (1, 10, 10)])
def test_by_chance_the_index_is_where_it_is_said_to_be(bins, before, now):
    """With few images in a bin fewer false alarms than said are no defect; more would be one."""
    random, shares = np.random.default_rng(0), np.full(bins, 1 / bins)
    samples = [(random.multinomial(before, shares), random.multinomial(now, shares)) for _ in range(300)]
    alarms = np.mean([stability_index(*each) > index_by_chance(*each) for each in samples])
    assert alarms <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(samples))
    if bins == 10 and now == 3000:
        assert alarms > 0.01
        formula = (1 / before + 1 / now) * chi2.ppf(0.95, bins - 1)
        assert index_by_chance(*samples[0]) == pytest.approx(formula, rel=0.1)


@pytest.mark.parametrize(("classes", "images"), [(20, 10), (100, 50), (1000, 50)])
def test_images_that_are_all_of_one_class_have_moved_however_few(classes, images):
    before = np.random.default_rng(0).multinomial(4000, np.full(classes, 1 / classes))
    now = np.eye(1, classes, dtype=int)[0] * images
    assert stability_index(before, now) > index_by_chance(before, now)


def test_states_are_named():
    assert [state_of(index, 0.01) for index in (0.005, 0.05, 0.2, 0.3)] == [
        "as before", "moved slightly", "moved", "moved far",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return profile(*some(3000, 2))


def compared(scored, reference):
    return drift_of(scored, images=reference, images_of="train", answers=reference, answers_of="test", classes=CLASSES)


def test_another_sample_of_the_same_has_not_moved(reference):
    drift = compared(profile(*some(2000, 3)), reference)
    assert max(figure.psi for figure in drift.figures) < 0.02
    assert max(abs(channel.shift) for channel in drift.channels) < 0.1
    for figure in drift.figures:
        assert sum(figure.shares) == pytest.approx(1) and sum(figure.reference_shares) == pytest.approx(1)
    brightness = drift.figures[0]
    assert len(brightness.bins) == 10 and max(brightness.reference_shares) < 0.13


@pytest.mark.parametrize("sure", [0.999, 0.334])
def test_a_value_that_most_images_have_does_not_hide_the_others(sure):
    """Nearly all answers of the reference are in one fine bin, the last or the first that three classes can have."""
    images, _ = some(2000, 8)
    random = np.random.default_rng(8)

    def answers(share):
        largest = np.where(random.random(2000) < share, sure, random.uniform(0.4, 0.9, 2000))
        return np.stack([largest, (1 - largest) / 2, (1 - largest) / 2], axis=1).astype(np.float32)

    before = profile(images, answers(0.95))
    states = [compared(profile(images, answers(share)), before).figures[3].state for share in (0.95, 0.0)]
    assert states == ["as before", "moved far"]


def test_dark_images_have_moved_from_white_ones():
    white, black = (np.full((500, 2, 6, 5), value, np.uint8) for value in (255, 0))
    probabilities = some(500, 9)[1]
    drift = compared(profile(black, probabilities), profile(white, probabilities))
    assert drift.figures[0].state == "moved far"
    assert [channel.state for channel in drift.channels] == ["moved far"] * 2
    assert "it had no deviation there" in " ".join(verdict(drift))


def test_swapped_channels_are_said_though_brightness_is_the_same():
    images, probabilities = some(1000, 10)
    images[:, 0] = np.clip(images[:, 0].astype(int) + 60, 0, 255)
    before = profile(images, probabilities)
    drift = compared(profile(images[:, ::-1].copy(), probabilities), before)
    assert {figure.state for figure in drift.figures} == {"as before"}
    text = " ".join(verdict(drift))
    assert "Pixels of channel 0: moved far from the train split" in text and "channel 1" in text
    assert "as they were" in " ".join(verdict(compared(before, before)))


def test_channels_without_any_spread_have_no_shift():
    same = np.full((5, 2, 6, 5), 7, np.uint8)
    before = profile(same, some(5, 6)[1])
    drift = compared(profile(*some(5, 7)), before)
    assert [channel.shift for channel in drift.channels] == [None, None]
    assert drift.figures[0].bins[0].startswith("0 to")


def test_brighter_images_and_surer_answers_have_moved(reference):
    drift = compared(profile(*some(2000, 4, brighter=40, sure=4), {"up to 16": 2000}), reference)
    states = {figure.name: figure.state for figure in drift.figures}
    assert (states["brightness"], states["confidence"]) == ("moved far", "moved far")
    assert states["contrast"] in ("as before", "moved slightly")
    assert drift.channels[0].shift == pytest.approx(40 / 255 / drift.channels[0].reference_std, abs=0.1)
    assert "Brightness: moved far from the train split" in " ".join(verdict(drift))


def test_the_page_and_the_picture_show_it(reference):
    scored = profile(*some(400, 5, brighter=40), {"up to 16": 400})
    drift = compared(scored, reference)
    result = {
        "images": 400, "set_aside": {"truncated": 3}, "already_there": 0, "version": 1, "scores": "<folder>",
        "table": None, "notes": ["a note"], "model": {"name": "photos", "version": "3", "uri": "models:/p@champion"},
    }  # fmt: skip
    page = page_of("small", result, drift, scored)
    assert "&lt;folder&gt;" in page and "Note: a note" in page and page.count("<svg ") == 4
    assert all(name in page for name in CLASSES) and "up to 16" in page and "truncated" in page
    assert picture_of(drift).startswith(b"\x89PNG")
    assert drawing_of(drift.figures[2]).rows[0][:2] == ("predicted classes", "cat")
    assert "Nothing was compared" in page_of("small", result, None, None)
