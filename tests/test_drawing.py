"""Drawn scenes: a function of seed and index, masks that fit image and boxes."""

import numpy as np
import pytest

from zoo.data._drawing import CLASSES, MOST, draw_scene


@pytest.mark.parametrize('size', [64, 97])
def test_masks_boxes_and_labels_agree(size):
    seen, hidden = np.zeros(len(CLASSES) + 1, int), 0
    for index in range(60):
        scene = draw_scene(3, index, size, most=MOST)
        count = len(scene.labels)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (count, size, size) and scene.masks.dtype == bool
        assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32
        assert scene.labels.dtype == np.int64
        assert 1 <= count <= MOST and scene.masks.sum(0).max() == 1, 'a pixel belongs to two objects'
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.astype(int)):
            assert mask.sum() >= 16
            box = mask[top:bottom, left:right]
            assert box.sum() == mask.sum(), 'the mask leaves its box'
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any(), 'the box is too large'
        seen += np.bincount(scene.labels, minlength=len(seen))
        hidden += count > 1
    assert seen[0] == 0 and (seen[1:] > 10).all() and hidden > 20


def test_what_a_mask_covers_has_the_color_of_an_object():
    """Objects are bright or saturated, the ground is neither, so a mask is brighter in its brightest channel."""
    inside, outside = [], []
    for index in range(40):
        scene = draw_scene(0, index, 64)
        brightest, ground = scene.image.max(-1), ~scene.masks.any(0)
        inside.append(brightest[scene.masks.any(0)].mean())
        outside.append(brightest[ground].mean())
    assert (np.array(inside) > np.array(outside) + 20).all()


def test_a_function_of_seed_and_index():
    a, b, c, d = draw_scene(1, 5, 64), draw_scene(1, 5, 64), draw_scene(2, 5, 64), draw_scene(1, 6, 64)
    assert np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)
    assert not np.array_equal(a.image, c.image) and not np.array_equal(a.image, d.image)


def test_circles_have_the_area_of_circles():
    """Exact masks: a circle that nothing hides covers pi / 4 of its box, up to its rim."""
    shares = []
    for index in range(200):
        scene = draw_scene(7, index, 96, most=1)
        (left, top, right, bottom), inside = scene.boxes[0], scene.masks[0]
        if scene.labels[0] == 1 and left > 0 and top > 0 and right < 96 and bottom < 96:
            shares.append(inside.sum() / ((right - left) * (bottom - top)))
    assert len(shares) > 10 and abs(np.mean(shares) - np.pi / 4) < 0.03
