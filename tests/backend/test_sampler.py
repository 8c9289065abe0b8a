# SPDX-License-Identifier: GPL-3.0-or-later
"""Sampled people: splits, exact borders, colours, the visible surface and pictures, against answers by hand."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

from backend import poses
from backend.families.people.cut import arm_distance, borders
from backend.protocol import PopulaceError
from backend.render.camera import Camera, look_at, orthographic
from backend.training.casting import CUT, SKIRT, Garment, cast
from backend.training.clothes import clip, push_out, tuck
from backend.training.crowd import CrowdMaker
from backend.training.makehuman import BODY, Kit
from backend.training.naming import COLORS, color_name, item_name
from backend.training.person import LABELS, Layer, Paint, SampledPerson, Tint, posed, texels_at
from backend.training.portrait import render_person
from backend.training.sampler import Sampler, template
from backend.training.splits import seeds, split_of

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))
needs_kit = pytest.mark.skipif(not (KIT / "3dobjs" / "base.obj").exists(), reason="no MakeHuman assets here")
RED, GREEN, BLUE = np.array([[[255, 0, 0, 255]], [[0, 255, 0, 255]], [[0, 0, 255, 255]]], np.uint8)[:, None]


def mesh_layer(mesh: trimesh.Trimesh, part: str, texels: np.ndarray, **more) -> Layer:
    faces = np.asarray(mesh.faces, np.int64)
    return Layer(part, np.asarray(mesh.vertices, np.float32), faces, np.zeros((1, 2), np.float32),
                 np.zeros_like(faces), Paint(texels), **more)  # fmt: skip


def ball(radius: float, part: str = "body", texels: np.ndarray = RED, centre=(0, 1, 0)) -> Layer:
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    return mesh_layer(mesh.apply_translation(centre), part, texels)


def card(part: str, z: float, texels: np.ndarray, half: float = 0.5, **more) -> Layer:
    """A square that faces +Z around (0, 1, z), its texture upright."""
    corners = np.array([[-half, 1 - half, z], [half, 1 - half, z], [half, 1 + half, z], [-half, 1 + half, z]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    uvs = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    return Layer(part, corners.astype(np.float32), faces, uvs, faces, Paint(texels), **more)


def someone(*layers: Layer, filler: Layer | None = None) -> SampledPerson:
    return SampledPerson(0, layers, filler, None)


def front(size: float = 0.5) -> Camera:
    """Sees 2 size x 2 size metres around (0, 1, 0) from +Z, 3 m away."""
    eye, target = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    return Camera(look_at(eye, target)[None], orthographic(size, 1.0, 0.1, 6.0)[None])


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_never_overlap_and_never_change() -> None:
    found = {s: seeds(s, 400) for s in ("train", "validation", "test")}
    assert not set(found["train"]) & set(found["test"])
    assert not set(found["train"]) & set(found["validation"])
    assert not set(found["validation"]) & set(found["test"])
    assert all(split_of(s) == split for split, some in found.items() for s in some)
    # the published check value: CRC-32 of "123456789" is 0xCBF43926 = 3421780262, whose last digit says train
    assert split_of(123456789) == "train"
    assert split_of(0) == "test"  # CRC-32 of "0" is 0xF4DBDF21 = 4108050209
    assert found["test"][:5] == [0, 9, 11, 25, 30]  # these numbers must never change
    assert split_of(np.int64(9)) == "test"
    share = np.mean([split_of(s) == "train" for s in range(20_000)])
    assert share == pytest.approx(0.8, abs=0.01)


# --- borders ----------------------------------------------------------------------------------------------------------


def test_clipping_is_exact_and_keeps_the_area() -> None:
    """A 1 m square of 8 triangles cut by x < 0.3 and by a corner; areas by hand."""
    grid = np.array([[x, y, 0.0] for y in (0, 0.5, 1) for x in (0, 0.5, 1)])
    quads = np.array([[i, i + 1, i + 4, i + 3] for i in (0, 1, 3, 4)])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])

    def area(border) -> tuple[float, np.ndarray, np.ndarray]:
        cut = clip(faces, faces, grid, border)
        v, uv = cut.vertices(grid), cut.uvs(grid[:, :2])
        corner = v[cut.faces]
        cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        assert (cross[:, 2] > -1e-12).all()  # nothing is turned over
        assert np.allclose(uv[cut.face_uvs], corner[..., :2])  # UVs are cut where the vertices are
        return cross[:, 2].sum() / 2, v[np.unique(cut.faces)], cut.source

    found, vertices, source = area(lambda p: p[:, 0] - 0.3)
    assert found == pytest.approx(0.3, abs=1e-9)
    assert vertices[:, 0].max() == pytest.approx(0.3, abs=1e-9)
    assert set(source.tolist()) == {0, 2, 4, 6}
    assert area(lambda p: -np.ones(len(p)))[0] == pytest.approx(1)
    assert area(lambda p: np.ones(len(p)))[0] == 0
    # a border with a corner: max of two planes. Crossings on edges are exact, only the corner itself is beveled.
    found, vertices, _ = area(lambda p: np.maximum(p[:, 0] - 0.7, p[:, 1] - 0.6))
    assert found == pytest.approx(0.42, abs=0.012)
    edge = vertices[(vertices[:, 0] > 0.6) | (vertices[:, 1] > 0.55)]
    assert np.abs(np.maximum(edge[:, 0] - 0.7, edge[:, 1] - 0.6)).min() < 1e-9


def test_a_clipped_mesh_has_no_cracks() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    faces, points = np.asarray(mesh.faces), np.asarray(mesh.vertices)
    cut = clip(faces, faces, points, lambda p: p[:, 1] - 0.1)
    half = trimesh.Trimesh(cut.vertices(points), cut.faces, process=False)
    edges, counts = np.unique(np.sort(half.edges, 1), axis=0, return_counts=True)
    rim = np.unique(edges[counts == 1])
    assert counts.max() == 2
    assert np.allclose(half.vertices[rim, 1], 0.1, atol=1e-9)  # open along the border and nowhere else


def test_sleeves_end_on_arms_and_do_not_cut_the_flanks() -> None:
    shoulder, elbow = np.array([0.176, 1.33, 0.023]), np.array([0.338, 1.153, 0.03])
    middle = (shoulder + elbow) / 2
    length = float(np.linalg.norm(elbow - shoulder))
    points = np.array([shoulder, middle, elbow, middle * [-1, 1, 1], [0.15, 1.1, 0.05], [0.17, 0.9, 0.0]])
    found = arm_distance(points)
    assert found[:4] == pytest.approx([0, length / 2, length, length / 2], abs=1e-6)
    assert (found[4:] < 0.0875).all()  # the flank and the hip lie within the shortest sleeve
    assert arm_distance(torch.from_numpy(points)).numpy() == pytest.approx(found)
    sleeve = (length / 2 - 0.26) / 0.23  # the border at the middle of the upper arm
    assert borders("top", (sleeve, -4.0, -3.0, 0.0), points[1:2])[0] == pytest.approx(0, abs=1e-6)


def test_outer_layers_are_pushed_out_by_the_missing_gap_only() -> None:
    grid = np.stack(np.meshgrid(np.linspace(-0.1, 0.1, 21), np.linspace(-0.1, 0.1, 21)), -1).reshape(-1, 2)
    inner = np.concatenate([grid, np.zeros((len(grid), 1))], 1)
    normals = np.tile([0.0, 0, 1], (len(grid), 1))
    outer = np.array([[0, 0, 0.002], [0, 0, 0.02], [0, 0, -0.01], [0.3, 0, 0], [0, 0, -0.2]])
    moved = push_out(outer, inner, normals, 0.005)
    assert moved == pytest.approx(np.array([[0, 0, 0.005], [0, 0, 0.02], [0, 0, 0.005], [0.3, 0, 0], [0, 0, -0.2]]))


def test_hair_is_tucked_under_the_hat_and_stays_where_there_is_none() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.1)
    upper = mesh.faces[mesh.triangles_center[:, 1] > 0]
    inner = np.array([[0, 0.15, 0], [0, 0.08, 0], [0.1, 0.1, 0], [0, -0.2, 0], [0.2, -0.01, 0]])
    moved = tuck(inner, np.zeros(3), np.asarray(mesh.vertices), upper, 0.004)
    assert np.linalg.norm(moved, axis=1) == pytest.approx([0.096, 0.08, 0.096, 0.2, math.hypot(0.2, 0.01)], abs=1e-3)
    assert np.cross(moved, inner) == pytest.approx(0, abs=1e-12)


# --- colours ----------------------------------------------------------------------------------------------------------


def test_texels_are_bilinear_with_the_top_row_first() -> None:
    texels = np.zeros((2, 2, 4), np.uint8)
    texels[0, 0], texels[1, 1] = 255, 51
    uvs = np.array([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [0, 1], [0.5, 0.75]], np.float32)
    found = texels_at(texels, uvs)[:, 0]
    assert found == pytest.approx([1, 0.2, 0.3, 1, 0.5], abs=1e-6)


def test_tints_keep_shade_and_follow_the_pattern() -> None:
    tint = Tint(np.array([0.4, 0.2, 0.1, 0.0, 0.5, 1.0], np.float32), typical=0.5, pattern="block")
    rgb = np.array([[0.5, 0.5, 0.5], [0.25, 0.25, 0.25], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]], np.float32)
    where = np.array([[0, 1.3, 0], [0, 1.3, 0], [0, 1.3, 0], [0, 1.3, 0], [0, 1.0, 0]])
    found = tint(rgb, where)
    assert found[0] == pytest.approx([0.4, 0.2, 0.1], abs=1e-6)
    assert found[1] == pytest.approx([0.2, 0.1, 0.05], abs=1e-6)
    assert found[2] == pytest.approx([0.72, 0.36, 0.18], abs=1e-6)  # no brighter than 1.8 times
    assert found[3] == pytest.approx([0.06, 0.03, 0.015], abs=1e-6)
    assert found[4] == pytest.approx([0, 0.5, 1], abs=1e-6)  # below the block's edge: the second colour


def test_patterns_are_baked_into_the_texture_where_the_uvs_say() -> None:
    tint = Tint(np.array([1, 0, 0, 0, 0, 1], np.float32), pattern="block")
    layer = card("top", 0.0, np.full((1, 1, 4), 255, np.uint8))
    layer = replace(
        layer, paint=Paint(layer.paint.texels, tint=tint), canonical=layer.vertices + np.array([0, 0.17, 0])
    )
    image = layer.texture
    assert image.shape == (512, 512, 4)
    assert image[100, 256].tolist() == [255, 0, 0, 255]  # the block ends at canonical 1.17 m, the card's middle
    assert image[400, 256].tolist() == [0, 0, 255, 255]
    edge = np.flatnonzero(image[:, 256, 2] > 127)[0]
    assert edge == pytest.approx(256 + 0.005 * 512, abs=1.5)  # the edge is 1 cm of the 1 m card wide


def test_colors_and_garments_have_plain_names() -> None:
    assert all(color_name(np.array(rgb)) == name for name, rgb in COLORS.items())
    assert color_name(np.array([0.8, 0.1, 0.1])) == "red"
    palette = np.zeros(6, np.float32)
    assert item_name("bottom", Garment(SKIRT, palette, trims=(-0.8, -1.0))) == "long skirt"
    assert item_name("bottom", Garment(CUT, palette, trims=(0.5, -1.0))) == "shorts"
    assert item_name("top", Garment(CUT, palette, trims=(-0.5, 0, 0, 0))) == "t-shirt"


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_pictures_see_through_cut_out_texels() -> None:
    """Hair whose left half is clear, in front of skin, with another hair card between them."""
    half = np.zeros((1, 2, 4), np.uint8)
    half[0, 1] = (0, 255, 0, 255)
    person = someone(card("body", 0.0, RED), card("hair", 0.2, half, cutout=True))
    seen = render_person(person, front(), (32, 32), supersample=1, lit=False)
    left, right = seen.label[0, 16, 4], seen.label[0, 16, 28]
    assert (int(left), int(right)) == (LABELS.index("body"), LABELS.index("hair"))
    assert (seen.label[0, :, :16] == 0).all()
    assert (seen.label[0, :, 16:] == 1).all()
    assert seen.rgb[0, 16, 4].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert seen.rgb[0, 16, 28].tolist() == pytest.approx([0, 1, 0], abs=1e-5)
    assert float(seen.depth[0, 16, 4]) == pytest.approx(3.0, abs=1e-5)
    assert float(seen.depth[0, 16, 28]) == pytest.approx(2.8, abs=1e-5)
    assert seen.normal[0, 5, 5].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert seen.mask.min() == 1


def test_back_faces_look_at_the_viewer_and_nothing_is_background() -> None:
    flipped = card("top", 0.0, BLUE, half=0.25)
    flipped = replace(flipped, faces=flipped.faces[:, ::-1].copy())
    seen = render_person(someone(flipped), front(), (32, 32), supersample=2, lit=False, background=(0, 0, 0))
    assert int(seen.label[0, 16, 16]) == LABELS.index("top")
    assert seen.normal[0, 16, 16].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert int(seen.label[0, 0, 0]) == -1
    assert float(seen.depth[0, 0, 0]) == 0
    assert float(seen.mask.mean()) == pytest.approx(0.25, abs=1e-6)


def test_brows_are_paint_on_the_skin_and_not_on_hair() -> None:
    ink = np.array([[[0, 0, 0, 128]]], np.uint8)
    brow = card("brows", 0.004, ink, half=0.25)
    seen = render_person(someone(card("body", 0.0, RED), brow), front(), (32, 32), supersample=1, lit=False)
    assert seen.rgb[0, 16, 16].tolist() == pytest.approx([127 / 255, 0, 0], abs=1e-5)
    assert seen.rgb[0, 2, 2].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert (seen.label == 0).all()
    assert float(seen.depth[0, 16, 16]) == pytest.approx(3, abs=1e-5)
    veiled = someone(card("body", 0.0, RED), brow, card("hair", 0.1, GREEN))
    seen = render_person(veiled, front(), (32, 32), supersample=1, lit=False)
    assert seen.rgb[0, 16, 16].tolist() == pytest.approx([0, 1, 0], abs=1e-5)


def test_the_visible_surface_of_a_ball_is_the_ball() -> None:
    pytest.importorskip("embreex")
    from backend.training.surface import signed_distance_samples, visible_surface

    person = someone(ball(0.3), ball(0.2, "top", GREEN))
    seen = visible_surface(person, 4000, seed=1)
    assert seen.points.shape == seen.normals.shape == seen.colors.shape == (4000, 3)
    offset = seen.points - [0, 1, 0]
    radius = np.linalg.norm(offset, axis=1)
    assert (seen.labels == 0).all()  # the inner ball is never seen
    assert (seen.colors == [1, 0, 0]).all()
    assert np.abs(radius - 0.3).max() < 5e-4  # chords of the icosphere
    assert ((offset / radius[:, None]) * seen.normals).sum(1).min() > 0.999
    # even over the sphere: a cap of height h holds h / 2r of the area (Archimedes)
    assert np.mean(offset[:, 1] > 0.15) == pytest.approx(0.25, abs=0.03)
    again = visible_surface(person, 4000, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(seen, again, strict=True))
    around = signed_distance_samples(person, 3000, seed=2, surface_points=20_000)
    exact = np.linalg.norm(around.points - [0, 1, 0], axis=1) - 0.3
    assert ((around.distances < 0) == (exact < 0))[np.abs(exact) > 1e-3].all()
    assert np.abs(around.distances - exact)[np.abs(exact) < 0.007].max() < 1e-3
    assert np.abs(around.distances - exact).max() < 6e-3


def test_hair_is_seen_where_opaque_and_skin_through_the_rest() -> None:
    pytest.importorskip("embreex")
    from backend.training.surface import visible_surface

    half = np.zeros((1, 2, 4), np.uint8)
    half[0, 1] = (0, 255, 0, 255)
    box = mesh_layer(trimesh.creation.box((1, 1, 0.2)).apply_translation((0, 1, -0.1)), "body", RED)
    hair = card("hair", 0.005, half, cutout=True)  # close before the front: no looking behind it
    seen = visible_surface(someone(box, hair, card("brows", 0.003, BLUE, half=0.1)), 6000, seed=0)
    on_hair = seen.labels == LABELS.index("hair")
    assert on_hair.any()
    assert (seen.points[on_hair, 0] > -1e-3).all()  # bilinear: half opacity is the card's middle
    assert np.allclose(seen.points[on_hair, 2], 0.005)
    front_skin = (seen.labels == 0) & (np.abs(seen.points[:, 2]) < 1e-6)
    assert (seen.points[front_skin, 0] < 0).mean() > 0.9  # the right half is behind hair
    painted = front_skin & (np.abs(seen.points[:, 0]) < 0.09) & (np.abs(seen.points[:, 1] - 1) < 0.09)
    assert painted.any()
    assert (seen.colors[painted] == [0, 0, 1]).all()


def test_filler_blocks_sight_and_is_never_seen() -> None:
    pytest.importorskip("embreex")
    from backend.training.surface import visible_surface

    with pytest.raises(PopulaceError, match="seen from outside"):
        visible_surface(someone(ball(0.2, "top", GREEN), filler=ball(0.3)), 10, 0)


# --- the kit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    kit = Kit(KIT)
    return Sampler(kit, template(kit, 24))


@needs_kit
def test_batches_and_single_bodies_are_the_kits(sampler: Sampler) -> None:
    castings = [cast(sampler.kit, s) for s in (3, 4, 5)]
    bodies = sampler.bodies([3, 4, 5]).numpy()
    for casting, body in zip(castings, bodies, strict=True):
        sliders = {k: np.array([v]) for k, v in casting.sliders.items()}
        want = sampler.kit.people(sliders, casting.details[None])[0] * 0.1
        want[:, 1] -= want[BODY, 1].min()
        assert np.abs(body - want).max() < 3e-6
    assert bodies[:, BODY, 1].min(1) == pytest.approx(0, abs=1e-7)
    mean = template(sampler.kit, 3)
    want = sampler.bodies(seeds("train", 3)).double().mean(0).numpy()
    want[:, 1] -= want[BODY, 1].min()  # their mean does not quite stand on the floor
    assert np.abs(mean - want).max() < 1e-6


@needs_kit
def test_a_person_is_whole_shod_and_says_what_it_is(sampler: Sampler) -> None:
    for seed in range(6):
        person, casting = sampler.person(seed), cast(sampler.kit, seed)
        parts = {layer.part for layer in person.layers}
        assert {"body", "eyes", "brows"} <= parts
        assert parts - {"body", "eyes", "brows"} == set(casting.parts)
        assert person.bounds[0, 1] == pytest.approx(0, abs=1e-6)
        assert person.split == split_of(seed)
        for layer in person.layers:
            assert layer.weights.sum(1) == pytest.approx(1, abs=1e-4)
            assert layer.faces.max() < len(layer.vertices)
            assert layer.face_uvs.max() < len(layer.uvs)
        said = person.attributes
        naked = sampler.bodies([seed])[0, BODY, 1]
        assert said["height_m"] == pytest.approx(float(naked.max() - naked.min()), abs=1e-6)
        assert said["age_years"] == pytest.approx(25 + (casting.sliders["age"] - 0.5) * 130)
        assert (said["hair"] == "none") == ("hair" not in casting.parts)
        heads, _ = person.joints
        names = list(person.bones.names)
        assert heads[names.index("head"), 1] > heads[names.index("pelvis"), 1] > heads[names.index("calf_l"), 1]
        assert heads[names.index("hand_l"), 0] > 0 > heads[names.index("hand_r"), 0]  # the left hand is at +X


@needs_kit
def test_cut_garments_end_exactly_at_their_borders(sampler: Sampler) -> None:
    casting = cast(sampler.kit, 0)
    trims = (-0.5, 0.0, 0.5, 0.0)
    top = Garment(CUT, np.zeros(6, np.float32), "plain", 0.0, trims, 0.008, 0.02)
    casting = replace(casting, parts={"top": top})
    person = sampler.person(casting)
    layer, body = person.layer("top"), person.layer("body")
    value = borders("top", trims, layer.canonical.astype(np.float64))
    edges, counts = np.unique(np.sort(np.concatenate([layer.faces[:, [i, (i + 1) % 3]] for i in range(3)]), 1), axis=0,
                              return_counts=True)  # fmt: skip
    rim = np.unique(edges[counts == 1])
    assert value.max() < 1e-5
    assert np.abs(value[rim]).max() < 1e-5
    # the cloth stands off the skin it was cut from by its thickness, more towards the hem
    naked = sampler.bodies([casting])[0].numpy()
    skin = trimesh.Trimesh(naked[BODY], sampler.kit.base.triangles(sampler.kit.base.groups["body"])[0], process=False)
    lift = sampler.bodies([casting])[0, BODY, 1].min() - (skin.vertices[:, 1].min())
    assert lift == pytest.approx(0, abs=1e-6)
    chest = (layer.canonical[:, 1] > 1.2) & (layer.canonical[:, 1] < 1.3) & (np.abs(layer.canonical[:, 0]) < 0.08)
    shift = np.array([0, person.layer("body").vertices[:, 1].min() - naked[BODY, 1].min(), 0])
    distance = cKDTree(naked[BODY] + shift).query(layer.vertices[chest])[0]
    assert distance.min() > 0.0075
    assert len(body.faces) < len(sampler.kit.base.triangles(sampler.kit.base.groups["body"])[0])  # hidden skin is gone
    assert person.filler is not None


@needs_kit
def test_posing_moves_every_layer_with_its_bones(sampler: Sampler) -> None:
    person = sampler.person(1)
    still = np.tile([1.0, 0, 0, 0], (len(person.bones.names), 1))
    same = posed(person, still)
    for a, b in zip(person.layers, same.layers, strict=True):
        assert np.abs(a.vertices - b.vertices).max() < 1e-5
    turn = still.copy()
    turn[0] = [math.cos(math.pi / 4), 0, math.sin(math.pi / 4), 0]  # the root by 90 degrees about Y: +Z becomes +X
    turned = posed(person, turn)
    root = person.bones.heads[0]
    for a, b in zip(person.layers, turned.layers, strict=True):
        from_root = a.vertices - root
        want = np.stack([from_root[:, 2], from_root[:, 1], -from_root[:, 0]], 1) + root
        assert np.abs(b.vertices - want).max() < 1e-4
    sitting = sampler.person(1, poses.pose_names()[1])
    assert sitting.bounds[0, 1] == pytest.approx(0, abs=1e-6)


@needs_kit
def test_crowds_are_the_same_people(sampler: Sampler) -> None:
    people = [1, 2, 3]
    crowd = CrowdMaker(sampler)(people)
    persons = [sampler.person(s) for s in people]
    for i, person in enumerate(persons):
        drop = person.bones.heads - crowd.heads[i].numpy()
        assert np.abs(drop - drop[0]).max() < 1e-5  # barefoot there, shod here
        assert drop[0] == pytest.approx([0, drop[0, 1], 0], abs=1e-6)
        compared = 0
        for worn in crowd.worn:
            layer = person.layer(worn.part)
            if i in worn.rows.tolist() and worn.part in ("eyes", "brows", "shoes"):  # nothing pushes these
                mine = worn.vertices[worn.rows.tolist().index(i)].numpy() + drop[0]
                assert np.abs(mine - layer.vertices).max() < 1e-5
                compared += 1
        assert compared == sum(person.layer(p) is not None for p in ("eyes", "brows", "shoes"))
    turn = np.random.default_rng(0).normal([1, 0, 0, 0], 0.15, (len(people), len(persons[0].bones.names), 4))
    moved = CrowdMaker(sampler)(people, torch.from_numpy(turn).float())
    for i, person in enumerate(persons):
        want = posed(person, turn[i])
        eyes = next(w for w in moved.worn if w.part == "eyes")
        here, there = eyes.vertices[i].numpy(), want.layer("eyes").vertices
        assert np.abs(here - here.mean(0) - (there - there.mean(0))).max() < 2e-5
        ends = moved.heads[i].numpy()
        assert np.abs(ends - ends[0] - (want.bones.heads - want.bones.heads[0])).max() < 2e-5


@needs_kit
def test_crowds_carry_the_borders_of_cut_garments(sampler: Sampler) -> None:
    trims = (-0.5, 0.0, 0.5, 0.0)
    casting = replace(cast(sampler.kit, 1), parts={"top": Garment(CUT, np.zeros(6), "plain", 0.0, trims, 0.008, 0.02)})
    crowd = CrowdMaker(sampler)([casting, casting])
    worn = next(w for w in crowd.worn if w.part == "top")
    assert worn.vertices.shape[0] == 2
    assert worn.border[1].numpy() == pytest.approx(borders("top", trims, sampler.mean), abs=1e-6)
    person = sampler.person(casting)
    inside = np.unique(worn.faces.numpy()[(worn.border[0].numpy()[worn.faces.numpy()] < 0).all(1)])
    mine = worn.vertices[0].numpy()[inside] + (person.bones.heads[0] - crowd.heads[0, 0].numpy())
    assert cKDTree(person.layer("top").vertices).query(mine)[0].max() < 1e-5  # uncut, they are the same
