"""What the ranks of ``test_fsdp`` run; every function returns what the tests look at."""

from __future__ import annotations

import copy
import gc
import itertools
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import nets
import steppe
from recipes_list import wrap
from steppe import vec
from steppe.lab.memory import peak_memory
from steppe.point import Memory, Point

STEPS, TOTAL = 3, 12


def odd():
    """An MLP of odd sizes: no dimension divides by two, and one rank holds nothing of the layer with one row."""
    torch.manual_seed(1)
    sizes = [6, 7, 1, 5, nets.CLASSES]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def attention():
    """A block of attention, and what belongs to the root: embedding, positions, norm and head."""
    torch.manual_seed(2)
    return nets.Transformer(tokens=5, features=6, width=8, heads=2, depth=1).double()


NETS = {"odd": odd, "attention": attention}
NETS_AND_BASES = [("odd", "adamw"), ("attention", "sgd")]


def shard(model, mesh=None, **how):
    """Every block, then the root with what is left."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks if hasattr(model, "blocks") else model[2:-1]:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def batch_of(net, examples=12):
    torch.manual_seed(3)
    shape = (examples, 6) if net == "odd" else (examples, 5, 6)
    return torch.randn(shape, dtype=torch.float64), torch.randint(nets.CLASSES, (examples,))


def here(data):
    """This rank's part of the batch."""
    size = -(-len(data[1]) // dist.get_world_size())
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return tuple(t[rows] for t in data)


def whole(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def weights(model):
    return [t.detach().clone() for t in whole(model.parameters())]


def apart(a, b):
    """The largest difference between two lists of tensors."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def train(model, text, data, base="sgd", steps=STEPS, make=steppe.Batch, **how):
    """Some steps on one batch; the losses of the first passes, and the optimizer."""
    opt = wrap(model, text, base, total_steps=TOTAL, **how)
    return [float(opt.step(make(model, nets.losses, data))) for _ in range(steps)], opt


def micro(model, loss_fn, data):
    """The batch in micro-batches of 1, 3 and the rest."""
    parts = [tuple(t[rows] for t in data) for rows in (slice(0, 1), slice(1, 4), slice(4, None))]
    return steppe.Batch.from_micro_batches(model, loss_fn, parts)


def several(jobs):
    """Run ``(name of a function, arguments)`` one after the other; what one raises is its result, as a text."""
    found = {}
    for job, (function, args) in jobs.items():
        try:
            found[job] = globals()[function](*args)
        except Exception:
            found[job] = traceback.format_exc()
    return found


def difference(net, text, base, how):
    """How far the sharded training ends from the one of the whole batch on a single process."""
    return _difference(net, text, base, **how)


def _difference(net, text, base, *, mesh=None, accumulate=False, scale=None, **how):
    plain, data = NETS[net](), batch_of(net)
    model = copy.deepcopy(plain)
    if mesh is not None:
        mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    shard(model, mesh)
    losses, _ = train(plain, text, data, base, **how)
    if scale is not None:
        how["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
    mine, _ = train(model, text, here(data), base, make=micro if accumulate else steppe.Batch, **how)
    mean = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(p.grad.placements == p.placements for p in model.parameters())
    return max(apart(weights(plain), weights(model)), apart([torch.tensor(losses, dtype=torch.float64)], [mean]))


def low_precision(text):
    """The same under a mixed-precision policy; its reference casts the weights by hand, a rank's part at a time."""

    def by_hand(model, data):
        low = {name: p.bfloat16() for name, p in model.named_parameters()}
        logits = functional_call(model, low, (data[0].bfloat16(),))
        return nn.functional.cross_entropy(logits, data[1], reduction="none")

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain = attention().float()
    data = tuple(t.float() if t.is_floating_point() else t for t in batch_of("attention"))
    model = shard(copy.deepcopy(plain), mp_policy=policy)
    opt = wrap(plain, text, total_steps=TOTAL)
    halves = [tuple(t[rows] for t in data) for rows in (slice(0, 6), slice(6, None))]
    for _ in range(STEPS):
        opt.step(steppe.Batch.from_micro_batches(plain, by_hand, halves))
    train(model, text, here(data))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return apart(weights(plain), weights(model))


def refused(text, how):
    """The message of what cannot work on shards."""
    model = shard(odd())
    before = weights(model)
    try:
        train(model, text, here(batch_of("odd")), steps=1, **how)
    except ValueError as error:
        assert apart(before, weights(model)) == 0
        return str(error)
    return "accepted"


class Deep(nn.Sequential):
    """Twelve equal layers, each a shard of its own."""

    def __init__(self):
        super().__init__(*[nn.Linear(128, 128, bias=False) for _ in range(12)])


def peaks(texts):
    """Bytes of one layer and of the shard; and for each method those that the perturbation takes at its peak."""
    model = Deep()
    for layer in [*model, model]:
        fully_shard(layer)
    w = list(model.parameters())
    size = sum(p.to_local().nbytes for p in w)

    def move(at, perturb):
        home = vec.clone(w)
        vec.add_(w, *perturb(at, 0.05))
        vec.copy_(w, home)

    found = {}
    with torch.no_grad():
        for text in [*texts, *texts]:  # once to warm up
            at = Point(0, None, 0.1, 0.1, 0, 0, Memory({}, w), w=w, g0=vec.clone(w), spare=True)
            found[text] = peak_memory(partial(move, at, steppe.parse(text).perturb))
    return 128 * 128 * 4, size, found


def held(texts):
    """Bytes of the shard; and for each method those of all tensors alive when its last pass begins."""
    torch.manual_seed(0)
    data, found = (torch.randn(2, 128), torch.randint(128, (2,))), {}
    for text in texts:
        model, alive = Deep(), []
        for layer in [*model, model]:
            fully_shard(layer)
        opt = wrap(model, text)

        def loss_fn(model, batch, alive=alive, opt=opt):
            alive.append(0)
            if len(alive) == opt.method.cost():
                gc.collect()
                plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
                alive[-1] = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in plain}.values())
            return nets.losses(model, batch)

        opt.step(steppe.Batch(model, loss_fn, data))
        found[text] = alive[-1]
    return sum(p.to_local().nbytes for p in model.parameters()), found


def not_a_number(text):
    """A loss that is NaN on one rank alone: the message of this one, and how far the weights have moved."""
    model = shard(odd())
    before, opt = weights(model), wrap(model, text, total_steps=TOTAL)

    def loss_fn(model, batch):
        return nets.losses(model, batch) * (float("nan") if dist.get_rank() == 1 else 1.0)

    try:
        opt.step(steppe.Batch(model, loss_fn, here(batch_of("odd"))))
    except ValueError as error:
        return str(error), apart(before, weights(model))
    return "accepted", 0.0


def in_bf16():
    """Effective ρ of bf16 weights, along what was asked, and the message of what FSDP cannot hold."""
    torch.manual_seed(0)
    model, data = Deep().bfloat16(), (torch.randn(2, 128).bfloat16(), torch.randint(128, (2,)))
    for layer in [*model, model]:
        fully_shard(layer)
    opt = wrap(model, "sam(0.05)")
    opt.step(steppe.Batch(model, nets.losses, data))
    try:
        wrap(model, "sam(0.05)", rounding="float32").step(steppe.Batch(model, nets.losses, data))
    except ValueError as error:
        return opt.stats.projected, str(error)
    return opt.stats.projected, "accepted"


def fails(text, fail_in, micro=1):
    """A pass that raises: how far weights and outputs are from those before, and whether training goes on."""
    model, data = shard(attention()), here(batch_of("attention"))
    before, outputs = weights(model), model(data[0]).detach()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    calls = []

    def loss_fn(model, batch):
        calls.append(0)
        losses = nets.losses(model, batch)
        if len(calls) == fail_in:
            raise RuntimeError("as asked")
        return losses

    opt = wrap(model, text, total_steps=TOTAL)
    with pytest.raises(RuntimeError, match="as asked"):
        opt.step(steppe.Batch(model, loss_fn, data, micro=micro))
    after = model(data[0]).detach()
    changed = max(apart(before, weights(model)), apart([outputs], [after]))
    plain = attention()
    train(plain, text, batch_of("attention"), steps=1)
    opt.step(steppe.Batch(model, nets.losses, data))
    return changed, apart(weights(plain), weights(model))


def evaluated(text):
    """A step after an evaluation, which leaves the root's weights gathered, against one without."""
    plain, data = attention(), batch_of("attention")
    model = shard(copy.deepcopy(plain))
    opt = wrap(model, text, total_steps=TOTAL)
    with torch.no_grad():
        model.eval()(here(data)[0])
    train(plain, text, data, steps=1)
    opt.step(steppe.Batch(model.train(), nets.losses, here(data)))
    return apart(weights(plain), weights(model))


def resumed(text):
    """Training that goes on from a state_dict, against one that never stopped."""
    data = here(batch_of("odd"))
    straight, first, second = shard(odd()), shard(odd()), shard(odd())
    train(straight, text, data, "adamw", steps=4)
    _, opt = train(first, text, data, "adamw", steps=2)
    saved = copy.deepcopy(opt.state_dict())
    for p, q in zip(second.parameters(), first.parameters(), strict=True):
        vec.copy_([p.detach()], [q.detach()])
    again = wrap(second, text, "adamw", total_steps=TOTAL)
    again.load_state_dict(saved)
    for _ in range(2):
        again.step(steppe.Batch(second, nets.losses, data))
    return apart(weights(straight), weights(second))


def vectors():
    """Arithmetic on shards against the same on whole tensors, on a line of four ranks and on two by two."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cut = [
        ((5, 3), line, [Shard(0)]),
        ((3,), line, [Shard(0)]),
        ((1, 4), line, [Shard(0)]),
        ((2, 7), line, [Shard(1)]),
        ((3, 5, 2), line, [Shard(1)]),
        ((6,), line, [Replicate()]),
        ((5, 3), square, [Replicate(), Shard(0)]),
        ((3,), square, [Replicate(), Shard(0)]),
        ((3,), square, [Shard(0), Replicate()]),
        ((7, 2), square, [Shard(0), Shard(0)]),
        ((5, 5), square, [Shard(0), Shard(1)]),
        ((5, 5), square, [Shard(1), Shard(0)]),
        ((4, 2), None, None),
    ]
    torch.manual_seed(0)

    def draw():
        plain = [torch.randn(shape, dtype=torch.float64) for shape, _, _ in cut]
        pairs = zip(plain, cut, strict=True)
        return plain, [t if mesh is None else distribute_tensor(t, mesh, places) for t, (_, mesh, places) in pairs]

    found = {}
    with torch.no_grad():
        (u, su), (v, sv) = draw(), draw()
        for p in (1.5, 2.0, 3.0, float("inf")):
            found[f"norm {p}"] = apart([vec.norm(u, p)], [vec.norm(su, p)])
        found["dot"] = apart([vec.dot(u, v)], [vec.dot(su, sv)])
        c = torch.tensor(0.3)
        overwrite = {
            "copy_": vec.copy_,
            "add_": vec.add_,
            "add_ tensor": lambda a, b: vec.add_(a, b, c),
            "scale_": lambda a, _: vec.scale_(a, 0.3),
            "scale_ tensor": lambda a, _: vec.scale_(a, c),
            "mul_": vec.mul_,
            "mul_ filter_norms": lambda a, b: vec.mul_(a, vec.filter_norms(b)),
            "lerp_": lambda a, b: vec.lerp_(a, b, 1.3),
        }
        for name, change in overwrite.items():
            a, sa = vec.clone(u), vec.clone(su)
            change(a, v)
            change(sa, sv)
            found[name] = apart(a, whole(sa))
            assert all(type(x) is type(y) for x, y in zip(su, sa, strict=True))
        found["clone"] = apart(u, whole(su))
        found["reject"] = apart(vec.reject(u, v), whole(vec.reject(su, sv)))
        noise = [[vec.randn(t, g) for t in each] for each in (u, su) for g in [torch.Generator().manual_seed(5)]]
        found["randn"] = apart(noise[0], whole(noise[1]))
        found["join"] = apart([vec.join(u)], [vec.join(su)])
        mask = vec.split(vec.join(u) > 0, su)
        found["split"] = apart([t.double() for t in vec.split(vec.join(u) > 0, u)], [t.double() for t in whole(mask)])
        for made in (noise[1], mask):
            for t, like in zip(made, su, strict=True):
                assert type(t) is type(like)
                assert t.shape == like.shape
                if isinstance(t, DTensor):
                    assert t.placements == like.placements
                    assert t.to_local().shape == like.to_local().shape
        partial_sums = [DTensor.from_local(t / 4, line, [Partial()]) for t in u]
        found["norm of partial sums"] = apart([vec.norm(u)], [vec.norm(partial_sums)])
        found["dot with partial sums"] = apart(
            [vec.dot(u, u)], [vec.dot(su[:6], partial_sums[:6]) + vec.dot(u[6:], u[6:])]
        )
        moved = [t.redistribute(placements=[Replicate()] * t.device_mesh.ndim) for t in sv[:-1]] + sv[-1:]
        sa, a = vec.clone(su), vec.clone(u)
        vec.add_(sa, moved)
        vec.add_(a, v)
        found["add_ of other placements"] = apart(a, whole(sa))
    return found


def saved(text):
    """Floating-point operations of two steps over those of SAM, and propagations a step as counted."""
    model, data, found = shard(attention()), here(batch_of("attention")), []
    for each in ("sam()", text):
        opt = wrap(model, each, total_steps=TOTAL)
        with FlopCounterMode(display=False) as counter:
            for _ in range(2):
                opt.step(steppe.Batch(model, nets.losses, data))
        found.append(counter.get_total_flops())
    assert all(p.requires_grad for p in model.parameters())
    return found[1] / found[0], opt.stats.propagations


def cut_twice():
    """Noise, masks and filters of weights that tensor parallelism and FSDP both cut, along one dimension or two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    plain = weights(model)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    sharded = list(fully_shard(model, mesh=mesh["data"]).parameters())
    with torch.no_grad():
        noise = [[vec.randn(t, torch.Generator().manual_seed(4)) for t in u] for u in (plain, sharded)]
        filters = [vec.clone(plain), vec.clone(sharded)]
        for u in filters:
            vec.mul_(u, vec.filter_norms(u))
        return {
            "norm": apart([vec.norm(plain)], [vec.norm(sharded)]),
            "randn": apart(noise[0], whole(noise[1])),
            "filter_norms": apart(filters[0], whole(filters[1])),
            "split": apart(plain, whole(vec.split(vec.join(plain), sharded))),
        }


def messages():
    """Collectives of each function on thirty tensors that are cut alike."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    u = [distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]) for _ in range(15)]
    u += [distribute_tensor(torch.ones(5), mesh, [Shard(0)]) for _ in range(15)]
    functions = {
        "norm": lambda: vec.norm(u),
        "dot": lambda: vec.dot(u, u),
        "filter_norms": lambda: vec.filter_norms(u),
        "add_": lambda: vec.add_(u, u, 0.5),
        "copy_": lambda: vec.copy_(u, u),
        "clone": lambda: vec.clone(u),
        "randn": lambda: [vec.randn(t, torch.Generator()) for t in u],
    }
    found = {}
    with torch.no_grad():
        for name, function in functions.items():
            with CommDebugMode() as seen:
                function()
            found[name] = seen.get_total_counts()
    return found
