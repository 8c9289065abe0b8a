# SPDX-License-Identifier: GPL-3.0-or-later
"""The same answers on CUDA as on the CPU. Skipped where there is no CUDA device (or no nvdiffrast, for its parity)."""

from __future__ import annotations

import math

import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from torch import Tensor

from backend import pipeline
from backend.families.capsule.model import load
from backend.protocol import GenerateRequest
from backend.render.camera import orbit, to_clip
from backend.render.rasterize import Backend, interpolate, rasterize
from backend.render.silhouette import antialias
from backend.render.visibility import visible_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def body() -> tuple[Tensor, Tensor]:
    """Clip positions [3, V, 4] and faces of an ellipsoid of a person's size from three sides, on the CPU."""
    mesh = trimesh.creation.icosphere(subdivisions=5)
    vertices = torch.tensor(mesh.vertices).float() * torch.tensor([0.3, 0.9, 0.25]) + torch.tensor([0.0, 0.9, 0.0])
    bounds = torch.stack([vertices.amin(dim=0), vertices.amax(dim=0)])
    cameras = orbit(bounds, [0.0, 0.7, math.pi], 0.2, aspect=0.75)
    return to_clip(vertices, cameras.mvp), torch.tensor(mesh.faces).long()


def outline_gradient(clip: Tensor, faces: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    clip = clip.detach().requires_grad_()
    raster = rasterize(clip, faces, (256, 192), backend)
    image = antialias(interpolate(clip[..., :2], raster, faces), raster, clip, faces)
    (gradient,) = torch.autograd.grad(image.square().sum(), clip)
    return image.detach().cpu(), gradient.cpu()


def test_the_portable_rasteriser_is_the_same_on_cuda(body: tuple[Tensor, Tensor]):
    clip, faces = body
    for image in clip.double():
        expected = visible_torch(image, faces, (256, 192))
        assert torch.equal(visible_torch(image.cuda(), faces.cuda(), (256, 192)).cpu(), expected)
    on_cpu, on_cuda = rasterize(clip, faces, (256, 192)), rasterize(clip.cuda(), faces.cuda(), (256, 192), "torch")
    assert torch.allclose(on_cuda.barycentrics.cpu(), on_cpu.barycentrics, atol=1e-6)
    assert torch.allclose(on_cuda.depth.cpu(), on_cpu.depth, atol=1e-6)


def test_outlines_and_gradients_are_the_same_on_cuda(body: tuple[Tensor, Tensor]):
    clip, faces = body
    image, gradient = outline_gradient(clip, faces, "numba")
    image_cuda, gradient_cuda = outline_gradient(clip.cuda(), faces.cuda(), "torch")
    assert torch.allclose(image_cuda, image, atol=1e-5)
    assert (gradient_cuda - gradient).norm() < 1e-4 * gradient.norm()


def test_nvdiffrast_sees_the_same_faces(body: tuple[Tensor, Tensor]):
    dr = pytest.importorskip("nvdiffrast.torch")
    clip, faces = body
    ours = rasterize(clip, faces, (256, 192))
    theirs = rasterize(clip.cuda(), faces.cuda(), (256, 192), "nvdiffrast")
    same = ours.face_id == theirs.face_id.cpu()
    # it snaps corners to a coarser grid: pixel centres within that distance of an edge may go to the neighbour
    assert same.float().mean() > 0.98
    assert torch.allclose(theirs.barycentrics.cpu()[same], ours.barycentrics[same], atol=1e-4)
    flipped = (clip * torch.tensor([1.0, -1.0, 1.0, 1.0])).cuda().contiguous()
    context = dr.RasterizeCudaContext(device=flipped.device)
    raw, _ = dr.rasterize(context, flipped, faces.int().cuda(), (256, 192))
    seen = raw[..., 3].cpu() > 0
    both = same & seen
    assert torch.allclose(raw[..., :2].cpu()[both], ours.barycentrics[..., :2][both], atol=1e-3)
    assert torch.allclose(raw[..., 2].cpu()[both], ours.depth[both], atol=1e-4)


def test_capsule_people_are_the_same_on_cuda():
    request = GenerateRequest(family="capsule", seed=11, grid_resolution=64, faces=3000, texture_size=512)
    models = load(torch.device("cpu")), load(torch.device("cuda"))
    latents = [model.sample(request.seed, 0.7, {}) for model in models]
    fields = [model.decode(codes)[0] for model, codes in zip(models, latents)]
    low, high = fields[0].bounds
    points = low + (high - low) * torch.rand(5000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fields[1].sdf(points.cuda()).cpu(), fields[0].sdf(points), atol=1e-5)
    assert torch.allclose(fields[1].color(points.cuda()).cpu(), fields[0].color(points), atol=1e-3)

    on_cpu, on_cuda = (pipeline.generate(request, model)[0] for model in models)
    for ours, theirs in zip(on_cpu.parts, on_cuda.parts, strict=True):
        assert len(theirs.faces) == pytest.approx(len(ours.faces), rel=0.02)
        for a, b in ((ours.vertices, theirs.vertices), (theirs.vertices, ours.vertices)):
            assert cKDTree(a).query(b)[0].mean() < 0.005  # simplification may choose other vertices of one surface
    facts = [(asset.meta["parts"][0]["closed"], asset.meta["attributes"]["height_m"]) for asset in (on_cpu, on_cuda)]
    assert facts[1] == (True, pytest.approx(facts[0][1], abs=1e-4))


def test_get3d_by_graphs_in_bfloat16_stays_within_its_bound():
    from backend.families.get3d.config import Config
    from backend.families.get3d.fast import ERROR, FastSynthesis, error
    from backend.families.get3d.networks import Generator

    torch.manual_seed(0)
    net = Generator(Config()).cuda().eval().requires_grad_(False)
    fast = FastSynthesis(net.synthesis)
    points = torch.rand(1, 5000, 3, device="cuda") - 0.5
    kept = []
    for _ in range(3):
        z = torch.randn(2, 1, 512, device="cuda")
        geo, tex = net.mapping_geo(z[0]), net.mapping(z[1])
        kept.append((fast(geo, tex), net.synthesis(geo, tex)))
    for replayed, exact in kept:  # also those that later replays followed
        assert max(error(replayed, exact, points).values()) < ERROR
