import numpy as np
import pytest

from pistoseg.models.subcategories import cluster


def blobs(seed=0):
    """Windows of two classes; class 0 has two kinds of features, class 1 has three, some windows have both."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(5), 12)
    centres = np.eye(5) * 20
    features = (centres[kinds] + rng.standard_normal((60, 5))).astype(np.float32)
    labels = np.stack([kinds < 2, kinds >= 2], 1).astype(np.uint8)
    labels[0, 1] = 1
    return features, labels, kinds


def test_windows_of_one_kind_share_a_subcategory_of_their_class():
    features, labels, kinds = blobs()
    flags = cluster(features, labels, 2, 0)
    assert flags.shape == (60, 4)
    assert flags.dtype == np.uint8
    of_class = flags[kinds < 2][:, :2].argmax(1)
    assert set(of_class[:12]) == {of_class[0]}
    assert set(of_class[12:]) == {1 - of_class[0]}
    three = cluster(features[12:], labels[12:], 3, 0)[12:, 3:].argmax(1)
    assert [len(set(three[start : start + 12])) for start in (0, 12, 24)] == [1, 1, 1]
    assert len(set(three)) == 3


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_window_has_one_subcategory_of_each_of_its_classes(k):
    features, labels, _ = blobs()
    flags = cluster(features, labels, k, 0)
    np.testing.assert_array_equal(flags.reshape(60, 2, k).sum(2), labels)


def test_the_seed_alone_decides():
    features, labels, _ = blobs()
    noise = np.random.default_rng(1).standard_normal(features.shape).astype(np.float32)
    np.testing.assert_array_equal(cluster(noise, labels, 4, 7), cluster(noise, labels, 4, 7))


def test_every_seed_of_a_config_will_do_and_decides():
    features, labels, _ = blobs()
    noise = np.random.default_rng(1).standard_normal(features.shape).astype(np.float32)
    found = [cluster(noise, labels, 4, seed).tobytes() for seed in (0, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1)]
    assert len(set(found)) == 5
    assert cluster(noise, labels, 4, 2**63 - 1).tobytes() == found[-1]


def test_a_class_of_few_windows_has_fewer_subcategories():
    features, labels, _ = blobs()
    labels[:] = [1, 0]
    labels[:2, 1] = 1
    flags = cluster(features, np.pad(labels, ((0, 0), (0, 1))), 4, 0)
    assert flags.shape == (60, 12)
    np.testing.assert_array_equal(flags[:2, 4:8].sum(0).nonzero()[0], [0, 1])
    assert flags[2:, 4:8].sum() == flags[:, 8:].sum() == 0


def test_arguments_that_make_no_sense_are_refused():
    features, labels, _ = blobs()
    with pytest.raises(ValueError, match="60, 59, 2"):
        cluster(features, labels[1:], 2, 0)
    with pytest.raises(ValueError, match="k >= 1"):
        cluster(features, labels, 0, 0)
