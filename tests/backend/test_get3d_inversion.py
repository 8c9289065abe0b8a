# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D from photos: surfaces and pictures with gradients, cameras, and the fit of what the generator itself shows."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backend import pipeline
from backend.families.base import PersonPhoto
from backend.families.get3d import inversion, surfaces
from backend.families.get3d.config import Config
from backend.families.get3d.dmtet import repair
from backend.families.get3d.fields import planes_on_axis, read_planes, separated, to_unit
from backend.families.get3d.model import DualField, Get3dModel
from backend.families.get3d.networks import Generator
from backend.geometry.mesh import signed_volume
from backend.photo.album import Album
from backend.pipeline import mesh_facts
from backend.protocol import Inversion, PopulaceError, parse_request
from backend.render.camera import Camera, to_clip
from tests.backend.get3d_taught import taught

CPU = torch.device("cpu")


@functools.cache
def shown(azimuth: float = 1.0, size: int = 96) -> tuple[PersonPhoto, Tensor, Tensor]:
    """A photo of a shape of the generator's own off the photo's centre, and the shape's codes."""
    net = taught()
    z = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    geo, tex = net.mapping_geo(z[0], 0.9), net.mapping(z[1], 0.9)
    decoded = net.synthesis(geo, tex)
    cameras = inversion.Cameras(torch.tensor([azimuth]), torch.tensor([0.3]), torch.tensor([[0.1, -0.05]]),
                                torch.tensor([-0.1]))  # fmt: skip
    mesh = surfaces.Surfacer(net.config, 24, CPU)(decoded)
    colors, mask = surfaces.see(decoded, mesh, cameras.mvp()[None], size)
    rgba = torch.cat([(colors[0, 0].clamp(-1, 1) + 1) / 2, mask[0, 0].clamp(0, 1)])
    pixels = (rgba.permute(1, 2, 0) * 255).round().byte().numpy()
    rows, columns = np.nonzero(pixels[..., 3] > 127)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return PersonPhoto(pixels, box), geo[0], tex[0]


def test_the_fit_finds_what_the_generator_shows() -> None:
    photo, *_ = shown()
    told: list[float] = []
    found = inversion.fit(taught(), [photo], 30, size=40, cells=14, step=lambda stage, done: told.append(done))
    assert min(found.losses) < 0.5 * found.losses[0]
    assert found.scores["mask_iou"] > max(0.92, found.begun["mask_iou"] + 0.05)
    assert found.scores["psnr"] > found.begun["psnr"] + 5
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_model_encodes_and_the_camera_sees_the_object_where_the_photo_has_it() -> None:
    model = Get3dModel(taught(), CPU)
    photo, *_ = shown()
    found = model.encode([photo], Inversion(steps=3))
    assert set(found.scores) == {"mask_iou", "psnr"}
    field = model.decode(found.latents)[0]
    mesh = surfaces.Surfacer(taught().config, 20, CPU)(field.decoded)
    camera = found.camera
    assert (camera["width"], camera["height"]) == (96, 96)
    lens = surfaces.projection(CPU, camera["fov_y_rad"])
    clip = to_clip(mesh.meshes[0][0] * field.metres, Camera(torch.tensor(camera["c2w"]).float(), lens).mvp)
    place = (clip[:, :2] / clip[:, 3:] * torch.tensor([1, -1]) + 1) * 48
    left, top, right, bottom = photo.box
    low, high = place.amin(0), place.amax(0)
    assert torch.allclose(low, torch.tensor([left, top]).float(), atol=5)
    assert torch.allclose(high, torch.tensor([right, bottom]).float(), atol=5)


def test_no_steps_give_the_mean_shape_and_time_ends_a_fit() -> None:
    model = Get3dModel(taught(), CPU)
    photo, *_ = shown()
    found = model.encode([photo], Inversion(steps=0))
    assert torch.equal(found.latents.codes["body/shape"][0], taught().mapping_geo.w_avg)
    hasty = inversion.fit(taught(), [photo], 1000, seconds=0.01, size=24, cells=12)
    assert len(hasty.losses) <= 3


def test_a_photo_goes_the_whole_road_and_the_packet_makes_the_object_again() -> None:
    model, album, out = Get3dModel(taught(), CPU), Album(), io.BytesIO()
    Image.fromarray(shown(size=256)[0].rgba).save(out, "PNG")
    asked = {"family": "get3d", "grid_resolution": 24, "faces": 600, "texture_size": 512, "maps": "color"}
    photos = {"photos": [{"image": album.add(out.getvalue())}], "inversion": {"steps": 2}}
    stages: list[str] = []
    made, _ = pipeline.generate(parse_request({**asked, **photos}), model, lambda stage, _: stages.append(stage), album)
    assert made.meta["stats"]["closed"]
    assert set(made.meta["photo"]["scores"]) == {"mask_iou", "psnr"}
    assert "fit" in stages
    again, _ = pipeline.generate(
        parse_request({**asked, "latents": {name: code.tolist() for name, code in made.latents.items()}}), model
    )
    assert np.array_equal(again.parts[0].vertices, made.parts[0].vertices)
    assert again.parts[0].base_color_png == made.parts[0].base_color_png


def test_several_photos_are_of_one_object() -> None:
    photos = [shown()[0], shown(azimuth=2.6)[0]]
    found = inversion.fit(taught(), photos, 3, size=24, cells=12)
    assert found.cameras.azimuth.shape == (2,)
    assert found.ws_geo.shape == (taught().config.geo_rows, 32)


def test_photos_are_placed_and_empty_ones_refused() -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 20:30] = (255, 0, 128, 255)
    target = inversion.place(PersonPhoto(pixels, (20, 10, 30, 30)), 50, CPU)
    assert target.square == (25, 20, 25)
    assert float(target.mask.sum()) == pytest.approx(40 * 20, rel=0.03)
    assert torch.allclose(target.rgb[:, 25, 25], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]), atol=1e-5)
    assert torch.allclose(target.rgb[:, 0, 0], torch.tensor(-1.0), atol=1e-5)
    for box in ((0, 0, 5, 5), (20, 10, 20, 10)):
        with pytest.raises(PopulaceError, match="mask is empty"):
            inversion.place(PersonPhoto(pixels, box), 16, CPU)


def test_cameras_are_the_authors() -> None:
    azimuth, polar = torch.tensor([0.4, 2.0]), torch.tensor([1.3, 1.5])
    c2w = surfaces.c2w_of(azimuth, polar)
    for i in range(2):
        a, t = float(azimuth[i]), float(polar[i])
        c = -a - math.pi / 2
        expected = 1.2 * np.array([math.sin(t) * math.cos(c), math.cos(t), math.sin(t) * math.sin(c)])
        assert np.allclose(c2w[i, :3, 3].numpy(), expected, atol=1e-6)
        assert np.allclose(c2w[i, :3, 2].numpy(), expected / 1.2, atol=1e-6)
    assert pytest.approx(math.radians(49.134), abs=1e-4) == surfaces.FOV_Y


def test_lattice_values_are_those_of_points_and_have_their_gradients() -> None:
    net = Generator(Config.tiny(resolution=8)).double()
    decoded = net(torch.randn(2, 32).double(), torch.randn(2, 32).double())
    axis = torch.linspace(-0.5, 0.5, 5).double()
    nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(1, -1, 3).expand(2, -1, -1)
    planes = decoded.geometry[0].detach().requires_grad_()
    mlp = net.synthesis.generator.mlp_synthesis_def
    at_points = mlp(read_planes(planes, to_unit(nodes, 1.0)), decoded.geo_rows)
    on_lattice = separated(planes_on_axis(planes, to_unit(axis, 1.0)), mlp, decoded.geo_rows)
    assert torch.allclose(on_lattice, at_points, atol=1e-10)
    weight = torch.randn_like(at_points)
    (slow,) = torch.autograd.grad((at_points * weight).sum(), planes, retain_graph=True)
    (fast,) = torch.autograd.grad((on_lattice * weight).sum(), planes)
    assert torch.allclose(slow, fast, atol=1e-10)


@pytest.mark.parametrize("surface", ["dmtet", "flexicubes"])
def test_pictures_have_gradients_down_to_both_codes(surface: str) -> None:
    torch.manual_seed(0)
    net = Generator(Config.tiny(resolution=8, surface=surface))
    geo = net.mapping_geo(torch.randn(2, 32)).detach().requires_grad_()
    tex = net.mapping(torch.randn(2, 32)).detach().requires_grad_()
    decoded = net.synthesis(geo, tex)
    shapes = surfaces.Surfacer(net.config, 12, CPU)(decoded)
    mvp = inversion.Cameras(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)).mvp()
    colors, masks = surfaces.see(decoded, shapes, mvp.expand(2, 2, 4, 4), 24)
    assert colors.shape == (2, 2, 3, 24, 24)
    assert masks.shape == (2, 2, 1, 24, 24)
    empty = (masks[:, :, 0] == 0)[0, 0]
    around = colors[0, 0].permute(1, 2, 0)[empty]
    assert torch.allclose(around, net.synthesis.to_rgb.bias.expand_as(around))
    (by_mask,) = torch.autograd.grad(masks.square().sum(), geo, retain_graph=True)
    assert (by_mask != 0).any()
    by_color = torch.autograd.grad(colors.square().sum(), (geo, tex), retain_graph=True)
    assert all((gradient != 0).any() for gradient in by_color)
    regulariser = shapes.regulariser()
    (by_rule,) = torch.autograd.grad(regulariser, geo)
    assert (by_rule != 0).any()
    assert (float(shapes.deviation.detach()) > 0) == (surface == "flexicubes")


def test_flexicubes_learned_weights_are_asked_and_the_option_extracts_closed_surfaces() -> None:
    plain = Get3dModel(taught(), CPU)
    latents = plain.sample(2, 0.7)
    field = plain.decode(latents, surface="flexicubes")[0]
    assert isinstance(field, DualField)
    mesh = field.extract(24)
    facts = mesh_facts(mesh.faces.numpy(), len(mesh.vertices))
    assert facts["closed"]
    assert signed_volume(mesh.vertices, mesh.faces) > 0
    assert not isinstance(plain.decode(latents)[0], DualField)
    torch.manual_seed(0)
    net = Generator(taught().config.__class__(**{**taught().config.__dict__, "surface": "flexicubes"})).eval()
    net.load_state_dict({**net.state_dict(), **taught().state_dict()})
    learned = Get3dModel(net, CPU)
    other = learned.decode(latents)[0]
    assert isinstance(other, DualField)
    moved = other.extract(24)
    assert torch.equal(moved.faces.unique(), mesh.faces.unique())
    assert 1e-5 < float((moved.vertices - mesh.vertices).norm(dim=1).mean()) < field.metres / 24


def test_the_repair_of_flexicubes_sees_the_inner_nodes() -> None:
    surfacer = surfaces.Surfacer(Config.tiny(surface="flexicubes"), 8, CPU)
    assert len(surfacer.rim) == 9**3 - 5**3
    values = torch.full((1, 9**3), -1.0)
    values[0, 0] = 1.0  # only at the rim
    fixed, loss = repair(values, surfacer.grid.centre, surfacer.rim, interior=True)
    assert float(loss) == 1.0
    assert float(fixed[0, surfacer.grid.centre]) > 0
    assert float(repair(values, surfacer.grid.centre, surfacer.rim)[1]) == 0
    assert surfacer.cubic_edges.shape == (3 * 8 * 81, 2)
