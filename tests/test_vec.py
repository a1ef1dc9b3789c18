"""Arithmetic on lists of tensors, against the same in float64 on one long vector."""

from __future__ import annotations

import math
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from steppe import vec
from steppe.parts import Adaptive, Ascent, DynamicSparse, FilterNoise, FisherSparse
from steppe.point import Memory, Point

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
quick = settings(deadline=None, max_examples=40)


@st.composite
def vectors(draw, count=2, types=TYPES):
    """Some vectors of the same shapes, each tensor of a type of its own."""
    shapes = draw(SHAPES)
    kinds = [draw(st.sampled_from(types)) for _ in shapes]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(shape, kind):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    return [[tensor(*each) for each in zip(shapes, kinds, strict=True)] for _ in range(count)]


def flat(u):
    return torch.cat([t.double().reshape(-1) for t in u])


def rounding(u):
    """Twice the largest rounding error of an entry near 1."""
    return max(torch.finfo(t.dtype).eps for t in u)


def close(found, wanted, u, factor=1.0):
    """Compare a vector to the float64 one, to the precision of its tensors' types."""
    torch.testing.assert_close(flat(found), wanted, rtol=rounding(u), atol=factor * rounding(u))


@quick
@given(vectors(), st.sampled_from([1.0, 1.5, 2.0, 3.0, math.inf]))
def test_norm_and_dot_are_those_of_the_long_vector(pair, p):
    u, v = pair
    length, product = vec.norm(u, p), vec.dot(u, v)
    wide = max(torch.finfo(t.dtype).bits for t in u) == 64
    assert length.dtype == product.dtype == (torch.float64 if wide else torch.float32)
    assert length.shape == product.shape == ()
    torch.testing.assert_close(length.double(), torch.linalg.vector_norm(flat(u), p), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product.double(), flat(u) @ flat(v), rtol=1e-5, atol=1e-5)


@quick
@given(vectors(), st.floats(-2, 2), st.booleans())
def test_entry_by_entry(pair, c, as_tensor):
    u, v = pair
    a, b = flat(u), flat(v)
    factor = torch.tensor(c, dtype=torch.float64) if as_tensor else c
    overwritten = {
        "add_": (lambda w: vec.add_(w, v, factor), a + c * b),
        "scale_": (lambda w: vec.scale_(w, factor), c * a),
        "mul_": (lambda w: vec.mul_(w, v), a * b),
        "lerp_": (lambda w: vec.lerp_(w, v, c), a + c * (b - a)),
        "copy_": (lambda w: vec.copy_(w, v), b),
    }
    for change, wanted in overwritten.values():
        w = vec.clone(u)
        places = [t.data_ptr() for t in w]
        change(w)
        close(w, wanted, u, 16)
        assert [t.data_ptr() for t in w] == places
        assert [t.dtype for t in w] == [t.dtype for t in u]
    assert torch.equal(flat(u), a)
    assert torch.equal(flat(v), b)


@quick
@given(vectors(types=[torch.float64, torch.float32]))
def test_rejection_is_orthogonal_and_leaves_the_rest(pair):
    u, v = pair
    part = vec.reject(u, v)
    rest = flat(u) - flat(part)
    along = (flat(u) @ flat(v)) / (flat(v) @ flat(v)) * flat(v)
    torch.testing.assert_close(rest, along, rtol=1e-4, atol=1e-4)
    assert torch.equal(flat(vec.reject(u, [torch.zeros_like(t) for t in v])), flat(u))


@quick
@given(vectors(count=1))
def test_split_is_the_inverse_of_join(one):
    [u] = one
    flat = vec.join(u)
    for t, like in zip(vec.split(flat > 0, u), u, strict=True):
        assert t.dtype == torch.bool
        assert torch.equal(t, like > 0)


@quick
@given(vectors(count=1))
def test_filters_are_the_slices_along_dimension_0(one):
    [u] = one
    for t, sizes in zip(u, vec.filter_norms(u), strict=True):
        filters = [t.double()] if t.ndim <= 1 else list(t.double())
        wanted = torch.stack([f.square().sum().sqrt() for f in filters])
        torch.testing.assert_close(sizes.reshape(-1).double(), wanted, rtol=1e-6, atol=1e-6)
        assert (sizes * t).shape == t.shape


def test_nothing_has_no_length():
    assert vec.norm([]) == vec.dot([], []) == 0
    for change in (vec.copy_, vec.add_, vec.mul_):
        change([], [])
    vec.scale_([], 2.0)
    vec.lerp_([], [], 2.0)
    assert vec.clone([]) == []
    empty = [torch.zeros(0, 3), torch.ones(2)]
    assert vec.norm(empty, math.inf) == 1


def test_a_norm_in_fp16_does_not_overflow():
    u = [torch.full((100,), 3e4, dtype=torch.float16), torch.full((4,), 2.0, dtype=torch.float16)]
    assert float(vec.norm(u)) == pytest.approx(299_929, rel=1e-3)
    assert float(vec.dot(u, u)) == pytest.approx(299_929**2, rel=1e-3)
    assert vec.norm(u, 3).isfinite()
    assert vec.filter_norms(u)[0].isfinite().all()


def test_many_small_entries_in_bf16_add_up():
    u = [torch.full((4096,), 2.0**-4, dtype=torch.bfloat16)]
    assert vec.norm(u) == 4
    assert vec.dot(u, u) == 16


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_factor_beyond_fp16_does_not_overflow(as_tensor):
    u, v = [torch.zeros(3, dtype=torch.float16)], [torch.full((3,), 1e-6, dtype=torch.float16)]
    c = torch.tensor(1e6) if as_tensor else 1e6
    vec.add_(u, v, c)
    assert u[0].float().sub(1).abs().max() < 0.02  # 1e-6 is 1.01e-6 in fp16
    vec.scale_(v, c)
    assert torch.equal(u[0], v[0])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_factor_is_not_rounded_to_bf16(as_tensor):
    exact = 1.00390625 + 2**-9  # between two bf16 numbers
    c = torch.tensor(exact) if as_tensor else exact
    u, v = [torch.full((3,), -1.0, dtype=torch.bfloat16)], [torch.ones(3, dtype=torch.bfloat16)]
    vec.add_(u, v, c)
    assert torch.equal(u[0], torch.full((3,), exact - 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("entry", [0.0, 1e-26])
def test_what_nearly_vanishes_moves_nothing_out_of_the_ball(entry):
    g = [torch.full((8,), entry)]
    at = Point(0, None, 0.1, 0.1, 0, 0, Memory({}, g), w=[torch.ones(8)], g0=g)
    for perturb in (Ascent(), Ascent(p=3), Adaptive()):
        vector, factor = perturb(at, 5.0)
        w = [torch.ones(8)]
        vec.add_(w, vector, factor)
        assert w[0].sub(1).abs().max() < 5.01


def test_what_is_not_a_number_stays_so():
    assert math.isnan(float(vec.over(1.0, torch.tensor(math.nan))))
    assert vec.over(1.0, torch.tensor(math.inf)) == 0


def test_arithmetic_works_where_torch_knows_no_ranks(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    u = [torch.tensor([3.0, 4.0])]
    assert vec.norm(u) == 5
    assert vec.local(u)[0] is u[0]
    assert vec.randn(u[0], torch.Generator()).shape == (2,)
    assert vec.split(vec.join(u), u)[0].equal(u[0])


@CUDA
def test_several_devices():
    u = [torch.ones(2, device="cuda"), torch.ones(3), torch.ones(4, dtype=torch.bfloat16, device="cuda")]
    assert vec.norm(u).device.type == "cuda"
    assert float(vec.norm(u)) == pytest.approx(3)
    assert float(vec.dot(u, u)) == pytest.approx(9)
    for c in (vec.norm(u) - 2.5, vec.norm(u).cpu() - 2.5, 0.5):
        a = vec.clone(u)
        vec.add_(a, u, c)
        vec.scale_(a, c)
        assert flat([t.cpu() for t in a]).eq(0.75).all()
    assert [t.device for t in vec.split(vec.join(u), u)] == [t.device for t in u]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A mesh of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(u, mesh):
    """The same vector on the mesh, but for its last tensor."""
    return [distribute_tensor(t, mesh, [Shard(0)]) for t in u[:-1]] + [u[-1].clone()]


def whole(u):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in u]


@torch.no_grad()
def test_a_vector_may_mix_shards_and_plain_tensors(mesh):
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(s, generator=generator) for s in [(5, 3), (3,), (4,)]] for _ in range(2))
    su, sv = sharded(u, mesh), sharded(v, mesh)
    assert type(vec.norm(su)) is torch.Tensor
    assert vec.norm(su) == vec.norm(u)
    assert vec.dot(su, sv) == vec.dot(u, v)
    for change in (vec.add_, vec.mul_, vec.copy_, lambda a, b: vec.lerp_(a, b, 0.3), lambda a, b: vec.scale_(a, 0.3)):
        a, sa = vec.clone(u), vec.clone(su)
        change(a, v)
        change(sa, sv)
        assert torch.equal(flat(whole(sa)), flat(a))
        assert [type(t) for t in sa] == [type(t) for t in su]


@torch.no_grad()
def test_a_copy_of_parameters_is_no_parameter(mesh):
    weights = [nn.Parameter(t) for t in sharded([torch.ones(4, 2), torch.ones(2)], mesh)]
    copies = vec.clone(weights)
    assert not any(t.requires_grad or isinstance(t, nn.Parameter) for t in copies)
    vec.scale_(copies, 2.0)
    assert flat(whole(weights)).eq(1).all()


def points(mesh):
    """The same point of a step twice: on whole tensors, and on shards."""
    generator = torch.Generator().manual_seed(1)
    w, g0, squares = ([torch.randn(s, generator=generator) for s in [(5, 3), (3,), (4, 2)]] for _ in range(3))
    for each in (lambda u: u, lambda u: sharded(u, mesh)):
        mine = each(w)
        yield Point(
            2,
            10,
            0.1,
            0.1,
            0,
            0,
            Memory({}, mine),
            w=mine,
            g0=each(g0),
            squares=each(squares),
            names=["weight", "b", "c"],
        )


@pytest.mark.parametrize(
    "perturb",
    [
        Ascent(),
        Ascent(p=3),
        Ascent(p=math.inf),
        Adaptive(),
        Adaptive(needs_names=True),
        FilterNoise(),
        FisherSparse(Adaptive(), s=0.5, n=4, refresh=2),
        DynamicSparse(Ascent(), s=0.5, drop=0.5, refresh=2),
    ],
    ids=repr,
)
@torch.no_grad()
def test_perturbations_of_shards_are_those_of_whole_tensors(mesh, perturb):
    results = []
    for at in points(mesh):
        before = flat(whole(at.g0))
        for _ in range(2):  # the second time, a mask has changed
            vector, factor = perturb(at, 0.05)
            assert [type(t) for t in vector] == [type(t) for t in at.w]
            at.memory.commit()
            at.memory.pending.clear()
        assert torch.equal(flat(whole(at.g0)), before)  # which is not spare
        results.append(flat(whole(vector)) * float(factor))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_mask_of_shards_outlives_the_step_as_shards(mesh):
    *_, at = points(mesh)
    FisherSparse(Ascent(), s=0.5, n=4, refresh=2)(at, 0.05)
    mask = at.memory.read("mask")
    for t, w in zip(mask, at.w, strict=True):
        assert type(t) is type(w)
        assert t.dtype == torch.bool
    assert [t.placements for t in mask[:-1]] == [w.placements for w in at.w[:-1]]
    assert int(vec.join(mask).sum()) == round(0.5 * sum(w.numel() for w in at.w))
