# SPDX-License-Identifier: GPL-3.0-or-later
"""Every metric on a case whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backend.evaluation import features, health, images, lightfield, metrics, shapes

RNG = np.random.default_rng


# --- sets of features -------------------------------------------------------------------------------------------------


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Samples whose mean and covariance are exactly these."""
    x = RNG(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    turn = np.linalg.qr(RNG(0).standard_normal((3, 3)))[0]
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])  # commuting covariances: sum (sqrt a - sqrt b)^2
    first = with_moments(np.zeros(3), turn @ np.diag(a) @ turn.T, 50, 1)
    second = with_moments(np.array([3.0, 4.0, 0.0]), turn @ np.diag(b) @ turn.T, 70, 2)
    expected = 25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert metrics.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    # tr of the root of a 2 x 2 matrix: sqrt(trace + 2 sqrt(determinant))
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    x, y = with_moments(np.zeros(2), a, 30, 1), with_moments(np.zeros(2), b, 40, 2)
    assert metrics.frechet_distance(x, y) == pytest.approx(4 + 4 - 2 * root, rel=1e-9)


def test_frechet_distance_is_the_same_by_either_way_of_taking_the_root() -> None:
    wide_a, wide_b = RNG(1).standard_normal((20, 30)), 2 + RNG(2).standard_normal((25, 30))
    roots = [metrics._root((x - x.mean(0)) / np.sqrt(len(x) - 1)) for x in (wide_a, wide_b)]
    nuclear = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    mean = wide_a.mean(0) - wide_b.mean(0)
    expected = mean @ mean + np.trace(np.cov(wide_a.T)) + np.trace(np.cov(wide_b.T)) - 2 * nuclear
    assert metrics.frechet_distance(wide_a, wide_b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_and_right_for_points() -> None:
    values = [metrics.kernel_distance(RNG(i).standard_normal((60, 4)), RNG(999 - i).standard_normal((60, 4)))
              for i in range(100)]  # fmt: skip
    assert abs(np.mean(values)) < 3 * np.std(values) / 10  # around 0, also below it
    assert min(values) < 0
    # all of one set at x, all of the other at y: k(x, x) + k(y, y) - 2 k(x, y)
    x, y = np.array([[1.0, 2.0]] * 3), np.array([[0.0, -1.0]] * 4)
    assert metrics.kernel_distance(x, y) == pytest.approx(3.5**3 + 1.5**3 - 2 * 0.0**3)
    with pytest.raises(ValueError, match="at least two"):
        metrics.kernel_distance(x[:1], y)


def test_kernel_distance_grows_with_a_shift() -> None:
    a, b = RNG(0).standard_normal((200, 8)), RNG(1).standard_normal((200, 8))
    assert np.all(np.diff([metrics.kernel_distance(a, b + s) for s in (0, 0.3, 0.6, 1.2)]) > 0)


# --- matrices of distances --------------------------------------------------------------------------------------------


def matrices(g: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return metrics.euclidean(g, g), metrics.euclidean(g, r), metrics.euclidean(r, r)


def test_coverage_and_minimum_matching_distance_by_hand() -> None:
    r = np.array([[0.0], [1.0], [2.0], [10.0]])
    gr = metrics.euclidean(np.array([[0.1], [0.2], [1.9], [2.3]]), r)
    assert metrics.coverage(gr) == 0.5  # 0 and 2 are someone's nearest
    assert metrics.minimum_matching_distance(gr) == pytest.approx((0.1 + 0.8 + 0.1 + 7.7) / 4)
    assert metrics.coverage(metrics.euclidean(r, r)) == 1
    assert metrics.coverage(metrics.euclidean(np.repeat(r[:1], 4, 0), r)) == 0.25  # duplicates cover one


def test_one_nearest_neighbour_accuracy() -> None:
    a, b = RNG(0).standard_normal((400, 2)), RNG(1).standard_normal((400, 2))
    assert metrics.one_nearest_neighbour_accuracy(*matrices(a, b)) == pytest.approx(0.5, abs=0.05)
    assert metrics.one_nearest_neighbour_accuracy(*matrices(a, b + 100)) == 1
    assert metrics.one_nearest_neighbour_accuracy(*matrices(a, a)) == 0


def test_precision_and_recall() -> None:
    r = RNG(0).standard_normal((300, 3))
    assert metrics.precision_recall(*matrices(r, r)) == (1, 1)
    assert metrics.precision_recall(*matrices(r + 50, r)) == (0, 0)
    half = RNG(1).standard_normal((600, 3))
    half = half[half[:, 0] > 0][:250]
    precision, recall = metrics.precision_recall(*matrices(half, r))  # all fidelity, half of the variety
    assert precision > 0.85
    assert recall == pytest.approx(np.mean(r[:, 0] > -0.25), abs=0.12)


def test_nearest_does_not_count_itself() -> None:
    d = metrics.euclidean(np.array([[0.0], [1.0], [5.0]]), np.array([[0.0], [1.0], [5.0]]))
    assert metrics.nearest(d, itself=True).tolist() == [1, 1, 4]
    assert metrics.nearest(d).tolist() == [0, 0, 0]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_psnr_of_known_noise() -> None:
    a = torch.full((1, 3, 8, 8), 0.5)
    noise = torch.tensor([0.1, -0.1]).repeat(96).view(1, 3, 8, 8)
    assert images.psnr(a, a + noise) == pytest.approx(20)
    assert images.psnr(a, a) == images.LOSSLESS
    half = torch.zeros(1, 8, 8, dtype=torch.bool)
    half[:, :4] = True
    wrong = a.clone()
    wrong[:, :, 4:] = 0
    assert images.psnr(a, wrong, half) == images.LOSSLESS
    assert images.psnr(a, wrong) == pytest.approx(-10 * math.log10(0.125))


def test_ssim_of_constants_and_of_one_window_by_hand() -> None:
    rng = RNG(0)
    x = torch.from_numpy(rng.random((2, 3, 16, 20)))
    assert images.ssim(x, x).shape == (2, 6, 10)
    assert torch.allclose(images.ssim(x, x), torch.ones(2, 6, 10, dtype=torch.float64))
    a, b = torch.full((1, 1, 11, 11), 0.8), torch.full((1, 1, 11, 11), 0.4)
    assert float(images.ssim(a, b)) == pytest.approx((2 * 0.32 + 1e-4) / (0.64 + 0.16 + 1e-4), rel=1e-6)
    p, q = rng.random((11, 11)), rng.random((11, 11))
    w = np.exp(-((np.arange(11) - 5) ** 2)[:, None] / 4.5) * np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w /= w.sum()
    mp, mq = (w * p).sum(), (w * q).sum()
    vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
    expected = (2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
    found = images.ssim(torch.from_numpy(p)[None, None], torch.from_numpy(q)[None, None])
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_laplacian_pyramid_gives_the_image_back() -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = images.laplacian_pyramid(x)
    assert [level.shape[2] for level in levels] == [64, 32, 16]
    back = levels[-1]
    for level in levels[-2::-1]:
        back = level + images.enlarge(back, level)
    assert torch.allclose(back, x, atol=1e-6)
    flat = images.laplacian_pyramid(torch.full((1, 1, 32, 32), 0.7))
    assert float(flat[0].abs().max()) < 1e-6  # a constant has no details


def test_sliced_wasserstein_finds_the_level_that_differs() -> None:
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(40, 3, 8, 8, generator=g), (64, 64), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(40, 3, 64, 64, generator=g)
    assert set(images.sliced_wasserstein(smooth, smooth).values()) == {0.0}
    found = images.sliced_wasserstein(smooth, noisy)
    assert list(found) == [64, 32, 16]
    assert found[64] > 3 * found[16]


def test_sliced_wasserstein_of_two_level_images_in_closed_form() -> None:
    """Images of one value each: a patch is v (1, ..., 1), so along a direction u the distance is W1(v) |sum u|, and on
    the sphere in 49 dimensions |sum u| is 7 gamma(24.5) / (sqrt(pi) gamma(25)) on average."""
    values = [
        torch.tensor(v).view(-1, 1, 1, 1).expand(-1, 1, 16, 16) for v in ([0.2, 0.2, 0.8, 0.8], [0.1, 0.1, 0.1, 0.5])
    ]
    # normalised to mean 0 and deviation 1: -1, -1, 1, 1 and three times -1 / sqrt 3, once sqrt 3
    low, high = 1 / math.sqrt(3), math.sqrt(3)
    w1 = (2 * (1 - low) + (1 + low) + (high - 1)) / 4
    expected = w1 * 7 * math.exp(math.lgamma(24.5) - math.lgamma(25)) / math.sqrt(math.pi)
    once, again = (images.sliced_wasserstein(*values, seed=5, directions=4096)[16] for _ in range(2))
    assert once == again
    assert once == pytest.approx(expected, rel=0.03)
    assert images.sliced_wasserstein(values[0], 3 * values[0] + 2)[16] == pytest.approx(0, abs=1e-5)


# --- features ---------------------------------------------------------------------------------------------------------


def figures(count: int) -> torch.Tensor:
    """Pictures [N, 3, 128, 128] of shaded, striped capsules of random size and colour on grey."""
    rng = RNG(3)
    y, x = np.mgrid[0:128, 0:128] / 64 - 1
    out = np.full((count, 3, 128, 128), 0.86)
    for i in range(count):
        for top, bottom in ((-0.9, -0.6), (-0.6, 0.1), (0.1, 0.9)):
            half = rng.uniform(0.1, 0.35)
            inside = (np.abs(x) < half) & (y > top) & (y < bottom)
            stripes = 1 + 0.3 * np.sign(np.sin(y * rng.uniform(10, 60)))
            shade = np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1)) * stripes
            for channel in range(3):
                out[i, channel][inside] = (rng.uniform(0.2, 0.75) * shade)[inside]
    return torch.from_numpy(out.clip(0, 1)).float()


def test_gabor_filters_have_no_mean_and_prefer_their_direction() -> None:
    filters = features.gabor()
    assert filters.shape == (8, 1, 9, 9)
    assert float(filters.sum((2, 3)).abs().max()) < 1e-6
    wave = torch.sin(torch.arange(32) * math.pi / 2).expand(1, 1, 32, 32)  # changes along x
    answer = features.modulus(wave, filters)[0, :, 16, 16]
    assert answer.argmax() == 0
    assert answer[0] > 3 * answer[1:].max()


def test_features_react_to_blur_noise_and_colour_the_more_the_worse() -> None:
    clean = figures(48)
    reference = features.scattering(clean[:24]).double().numpy()
    assert reference.shape == (24, 672)
    scale = features.Scale.of(reference)
    assert scale(reference).std(0).mean() == pytest.approx(1 / math.sqrt(features.DIMENSIONS), rel=0.4)
    others, noise = clean[24:], torch.randn(24, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def blurred(times: int) -> torch.Tensor:
        x = others
        for _ in range(times):
            x = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x

    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    ladders = [
        [others, blurred(1), blurred(3), blurred(9)],
        [others, *(others + s * noise for s in (0.02, 0.05, 0.15))],
        [others, *((others + s * tint).clamp(0, 1) for s in (0.05, 0.12, 0.3))],
    ]
    for ladder in ladders:
        found = [features.scattering(x).double().numpy() for x in ladder]
        fids = [metrics.frechet_distance(scale(reference), scale(f)) for f in found]
        kids = [metrics.kernel_distance(scale.whole(reference), scale.whole(f)) for f in found]
        assert np.all(np.diff(fids) > 0), fids
        assert np.all(np.diff(kids) > 0), kids


def test_inception_without_torchvision_says_what_to_do(tmp_path) -> None:
    assert features.extractor()[0] == features.NAME
    try:
        import torchvision  # noqa: F401
    except ImportError:
        from backend.protocol import PopulaceError

        with pytest.raises(PopulaceError, match="torchvision"):
            features.extractor(tmp_path / "inception.safetensors")


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_chamfer_of_parallel_planes_and_of_all_pairs() -> None:
    u = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 2), -1).reshape(-1, 2)
    plane = np.column_stack([u, np.zeros(len(u))])
    assert shapes.chamfer(plane, plane + np.array([0, 0, 0.03])) == pytest.approx(0.03)
    clouds = np.stack([plane + np.array([0, 0, z]) for z in (0, 0.02, 0.07)])
    found = shapes.pairwise_chamfer(clouds)
    assert np.allclose(found, [[0, 0.02, 0.07], [0.02, 0, 0.05], [0.07, 0.05, 0]], atol=1e-4)
    random = RNG(0).random((3, 500, 3)), RNG(1).random((2, 700, 3)) * 2
    found = shapes.pairwise_chamfer(*random)
    assert np.allclose(found, [[shapes.chamfer(a, b) for b in random[1]] for a in random[0]], atol=1e-4)


def test_two_drawings_from_one_surface_are_half_the_root_of_the_area_per_point_apart() -> None:
    count = 8000
    plane = np.column_stack([RNG(0).random((count, 2)), np.zeros(count)])
    assert shapes.resampling_distance(plane) == pytest.approx(0.5 * math.sqrt(1 / count), rel=0.05)


def disc(radius: float, size: int = 96, centre: tuple[float, float] = (0, 0)) -> np.ndarray:
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size * 2 - 1
    return np.hypot(x - centre[0], y - centre[1]) < radius


def test_zernike_moments_of_a_disc_and_of_a_turned_shape() -> None:
    # a centred disc: only m = 0; for n = 2: integral of 3 / pi * (2 r^2 - 1) over area = 3 R^2 (R^2 - 1), over R^2
    found = lightfield.zernike(disc(0.6))
    orders = [(n, m) for n in range(1, 11) for m in range(n % 2, n + 1, 2)]
    assert len(found) == len(orders) == 35
    assert found[orders.index((2, 0))] == pytest.approx(3 * (1 - 0.36), rel=0.01)
    assert found[orders.index((1, 1))] == pytest.approx(0, abs=1e-9)
    shape = disc(0.3, centre=(0.4, 0.1)) | disc(0.2, centre=(-0.2, 0.5))
    for turned in (np.rot90(shape), shape[:, ::-1]):
        assert np.allclose(lightfield.zernike(turned), lightfield.zernike(shape))
        assert np.allclose(lightfield.fourier(turned), lightfield.fourier(shape), atol=0.01)


def test_fourier_descriptor_of_a_disc_and_of_an_ellipse() -> None:
    assert lightfield.fourier(disc(0.7, 256)).max() < 0.01  # always as far from the middle
    y, x = (np.mgrid[0:256, 0:256] + 0.5) / 128 - 1
    found = lightfield.fourier((x / 0.9) ** 2 + (y / 0.45) ** 2 < 1)
    assert found.argmax() == 1  # twice around
    assert found[0] < 0.01
    assert lightfield.fourier(disc(0.7, 256) | disc(0.1, 256, (0.9, 0.9))).max() < 0.01  # only the largest piece
    assert lightfield.fourier(np.eye(5, dtype=bool) & (np.arange(5) == 2)).max() == 0  # a pixel


def test_outline_goes_around_once() -> None:
    square = np.zeros((9, 9), bool)
    square[2:6, 3:8] = True
    square[3:5, 4:6] = False  # holes do not count
    path = lightfield.outline(square)
    assert len(path) == len(np.unique(path, axis=0)) == 2 * (4 + 5) - 4
    assert np.abs(np.diff(path, axis=0)).max() == 1
    line = np.zeros((3, 9), bool)
    line[1, 1:8] = True
    assert len(lightfield.outline(line)) == 12  # there and back


def test_light_field_distance_forgives_rotations_and_sees_other_shapes() -> None:
    turns = lightfield.rotations()
    assert turns.shape == (60, 10)
    assert len(np.unique(turns, axis=0)) == 60
    assert all(sorted(t) == list(range(10)) for t in turns.tolist())
    a = RNG(0).random((1, 10, 45))
    turned = np.empty_like(a)
    turned[:, turns[17]] = a
    assert lightfield.light_field_distance(a, turned)[0, 0] == pytest.approx(0)
    assert lightfield.light_field_distance(a, turned, aligned=True)[0, 0] > 1
    assert lightfield.light_field_distance(a, a + 0.01, aligned=True)[0, 0] == pytest.approx(4.5)
    assert lightfield.cameras(np.array([[-1, 0, -1], [1, 2, 1.0]])).mvp.shape == (10, 4, 4)


# --- mesh health ------------------------------------------------------------------------------------------------------

TET = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
TET_FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def torus(n: int = 24, m: int = 12) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.arange(n) * 2 * np.pi / n, np.arange(m) * 2 * np.pi / m, indexing="ij")
    r = 1 + 0.3 * np.cos(v)
    vertices = np.stack([r * np.cos(u), r * np.sin(u), 0.3 * np.sin(v)], -1).reshape(-1, 3)
    i, j = (k.reshape(-1) for k in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
    a, b, c, d = i * m + j, (i + 1) % n * m + j, (i + 1) % n * m + (j + 1) % m, i * m + (j + 1) % m
    return vertices, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


def test_topology() -> None:
    assert health.topology(TET_FACES) == {"closed": True, "components": 1, "genus": 0}
    two = np.concatenate([TET_FACES, TET_FACES + 4])
    assert health.topology(two) == {"closed": True, "components": 2, "genus": 0}
    assert health.topology(torus()[1]) == {"closed": True, "components": 1, "genus": 1}
    assert health.topology(TET_FACES[:3]) == {"closed": False, "components": 1, "genus": None}
    flipped = TET_FACES.copy()
    flipped[0] = flipped[0, ::-1]
    assert not health.topology(flipped)["closed"]


def test_self_intersections_of_two_tetrahedra() -> None:
    both = np.concatenate([TET_FACES, TET_FACES + 4])
    assert health.self_intersections(np.concatenate([TET, TET + 5]), both) == 0
    # the corner of one comes in through the oblique face of the other, and three of its faces go through that one
    corner = np.concatenate([TET, 0.2 + TET])
    assert health.intersecting_pairs(corner, both).tolist() == [[3, 4], [3, 5], [3, 6]]
    assert health.self_intersections(*torus()) == 0
    inside = np.concatenate([TET, 0.1 + 0.2 * TET])
    assert health.self_intersections(inside, both) == 0  # a shell within a shell does not cross it


def test_touching_is_not_crossing_and_a_shared_corner_can_cross() -> None:
    flat = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0.5, 0.5, 0], [0.5, 0.5, 1], [1, 1, 1.0]])
    assert health.self_intersections(flat, np.array([[0, 1, 2], [3, 4, 5]])) == 0  # stands on it
    through = flat.copy()
    through[3, 2] = -0.5
    assert health.self_intersections(through, np.array([[0, 1, 2], [3, 4, 5]])) == 1
    fan = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [1, 0.5, -1], [0.5, 0.5, 1.0]])
    assert health.self_intersections(fan, np.array([[0, 1, 2], [0, 3, 4]])) == 1  # meets it away from the corner
    assert health.self_intersections(fan, np.array([[0, 1, 2], [0, 4, 3], [1, 0, 4]])) >= 1


def test_self_intersections_agree_with_looking_at_all_pairs() -> None:
    """Random triangles: the spatial hash finds what the definition in floating point finds."""
    rng = RNG(4)
    count = 160
    vertices = (rng.random((count, 1, 3)) + 0.25 * rng.standard_normal((count, 3, 3))).reshape(-1, 3)
    faces = np.arange(3 * count).reshape(-1, 3)
    corners = vertices[faces]

    def crosses(p: np.ndarray, q: np.ndarray, t: np.ndarray) -> bool:
        matrix = np.column_stack([t[1] - t[0], t[2] - t[0], p - q])
        u, v, s = np.linalg.solve(matrix, p - t[0])
        return u >= 0 and v >= 0 and u + v <= 1 and 0 <= s <= 1

    expected = [
        [i, j] for i in range(count) for j in range(i + 1, count)
        if any(crosses(x[k], x[(k + 1) % 3], y) for x, y in ((corners[i], corners[j]), (corners[j], corners[i]))
               for k in range(3))
    ]  # fmt: skip
    assert len(expected) > 300
    assert health.intersecting_pairs(vertices, faces).tolist() == expected
