"""Samples of the ops in tools/op_table.py; every file of tests runs all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from dfkernels import ops
from tools.op_table import DATA_OPS, OPS, TABLE

ORDER = {name: TABLE[name].arguments for name in OPS}
REFERENCES = {name: TABLE[name].reference for name in OPS}


@dataclass
class Case:
    """One call: tensors in the order of the public signature, and what is not differentiated."""

    op: str
    name: str
    tensors: dict
    options: dict = field(default_factory=dict)
    masked: tuple = ()  # atoms whose log_prior is -inf
    unused: tuple = ()  # tensors that the result does not depend on

    def __str__(self):
        return f"{self.op}-{self.name}"

    def inputs(self, dtype=torch.float64):
        return {
            k: t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype == torch.float64 else t
            for k, t in self.tensors.items()
        }

    def run(self, tensors=None, *, reference=False):
        """-> tuple of outputs. `tensors` replaces some of the inputs, by name."""
        args = {**self.tensors, **(tensors or {})}
        if self.masked:
            prior = args["log_prior"]
            mask = torch.zeros(prior.shape[-1], dtype=torch.bool)
            mask[list(self.masked)] = True
            args["log_prior"] = torch.where(mask, -math.inf, prior)
        positional = {k: args[k] for k in ORDER[self.op] if k in args}
        out = (_reference if reference else _public)(self.op, positional, self.options)
        return tuple(out) if isinstance(out, tuple) else (out,)


def _public(op, args, options):
    if op == "matched_trace":
        return ops.matched_trace(
            args["m"], args["eps"], args["alpha"], args["sigma"], x=args.get("x"), **options
        )
    return getattr(ops, op)(*args.values(), **options)


def _reference(op, args, options):
    reference = REFERENCES[op]
    if op in DATA_OPS or "values" in ORDER[op] or "variance" in ORDER[op]:
        return (
            _by_query(op, reference, args, **options)
            if "atoms" in options
            else reference(*args.values(), **options)
        )
    like = args["x0" if op == "endpoint_matvec" else "eps"]
    B, d = like.shape[0], math.prod(like.shape[1:])
    args = dict(args)
    for k in ("alpha", "sigma"):
        args[k] = torch.as_tensor(args[k], dtype=like.dtype).expand(B)
    if op == "endpoint_matvec":
        v = args["v"]
        flat = v.reshape(B, v.shape[1] if v.dim() > like.dim() else 1, d)
        return reference(
            flat,
            args["x0"].reshape(B, d),
            args["mean"].reshape(B, d),
            args["alpha"],
            args["sigma"],
            **options,
        ).reshape(v.shape)
    x = args.get("x")
    return reference(
        args["m"],
        like.reshape(B, d),
        None if x is None else x.reshape(B, d),
        args["alpha"],
        args["sigma"],
        **options,
    )


def _by_query(op, reference, args, atoms, counts, **options):
    """Each query with its own atoms alone; log q is of all."""
    outs = []
    for b, rows in enumerate(atoms.split(counts.tolist())):
        one = {}
        for name, a in args.items():
            per_query = isinstance(a, torch.Tensor) and a.dim() > 0
            one[name] = (
                a[rows]
                if name in ("y", "log_prior", "values")
                else a[b : b + 1]
                if per_query
                else a
            )
        out = reference(*one.values(), **options)
        if "log_prior" in args:
            share = one["log_prior"].logsumexp(0) - args["log_prior"].logsumexp(0)
        else:
            share = math.log(len(rows) / len(args["y"]))
        if isinstance(out, tuple):
            out = (out[0] + share, *out[1:])
        outs.append(out + share if op == "log_prob" else out)
    if isinstance(outs[0], tuple):
        return tuple(map(torch.cat, zip(*outs, strict=True)))
    return torch.cat(outs)


def _normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def _data(seed, B, N, event):
    normal = _normal(seed)
    y = normal(N, *event)
    x = 0.7 * normal(B, *event) + 0.3
    alpha = 0.4 + 0.6 * torch.rand(
        B, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    sigma = 0.6 + 0.5 * torch.rand(
        B, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)
    )
    return {"x": x, "y": y, "alpha": alpha, "sigma": sigma}


def _clouds():
    """(name, tensors, options, masked) of the ops over a data set."""
    yield "plain", _data(1, 3, 5, (4,)), {}, ()
    prior = _data(2, 3, 6, (2,))
    prior["alpha"] = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    prior["log_prior"] = 2 * _normal(3)(6)
    yield "prior", prior, {}, (1, 5)
    image = _data(4, 2, 4, (2, 3))
    image |= {
        "y": image["y"].mT.contiguous().mT,
        "x": image["x"][:1].expand(2, 2, 3),
        "alpha": 0.8,
        "sigma": torch.tensor(0.7, dtype=torch.float64),
        "log_prior": torch.zeros(1, dtype=torch.float64).expand(4),
    }
    yield "strided", image, {}, ()
    yield "one atom", _data(5, 2, 1, (3,)), {}, ()
    yield "no query", _data(6, 0, 3, (2,)), {}, ()
    yield "scalar", _data(7, 3, 4, ()), {}, ()
    same = _data(8, 2, 3, (3,))
    yield "identical atoms", same | {"y": same["y"][:1].repeat(3, 1)}, {}, ()
    atoms, counts = torch.tensor([1, 2, 3, 0, 0, 2, 3, 4]), torch.tensor([3, 1, 4])
    lists = {"atoms": atoms, "counts": counts}
    yield "lists", _data(10, 3, 5, (4,)), lists, ()
    image = _data(19, 3, 5, (2, 2)) | {"alpha": 0.8, "log_prior": 2 * _normal(31)(5)}
    yield "lists prior", image, {**lists, "scale": 0.5, "offset": -0.25}, ()
    yield "affine", _data(9, 2, 5, (3,)), {"scale": 0.5, "offset": -0.25}, ()


def _variances(y, i):
    """Variances of the components in turn of every shape that there is."""
    N, event = y.shape[0], y.shape[1:]
    shape = [(N, *event), (N,), (1, *event), (), (1,)][i % 5]
    return 0.05 + 0.6 * _normal(60 + i)(1, *shape)[0].square()


def _vectors(tensors, many, seed):
    x = tensors["x"]
    shape = (x.shape[0], 2, *x.shape[1:]) if many else x.shape
    return tensors | {"v": _normal(seed)(*shape)}


def table(op):
    """The cases of one op."""
    if op == "endpoint_matvec":
        return [
            _endpoint(form, name)
            for form in ("paper", "centred")
            for name in ("plain", "image", "no query")
        ]
    if op == "matched_trace":
        return [
            _matched(form, name)
            for form in ("residual", "paper")
            for name in ("plain", "image", "no query")
        ]
    cases = []
    for i, (name, tensors, options, masked) in enumerate(_clouds()):
        if "variance" in ORDER[op]:
            if "atoms" in options:
                continue
            tensors = tensors | {"variance": _variances(tensors["y"], i)}
        if "v" in ORDER[op]:
            tensors = _vectors(tensors, i % 2 == 1, 20 + i)
        if "values" in ORDER[op]:
            tensors = tensors | {"values": _normal(50 + i)(len(tensors["y"]), *[2, 3][: i % 3])}
        cases.append(Case(op, name, tensors, options, masked))
    return cases


def _endpoint(form, name):
    data = _data(
        *{"plain": (11, 3, 3, (4,)), "image": (12, 2, 2, (2, 3)), "no query": (13, 0, 0, (3,))}[
            name
        ]
    )
    tensors = {"x0": data["y"], "mean": data["x"], "alpha": data["alpha"], "sigma": data["sigma"]}
    tensors["v"] = _vectors({"x": data["x"]}, name == "plain", 14)["v"]
    if name == "image":
        tensors |= {"alpha": 0.5, "x0": data["y"].mT.contiguous().mT}
    return Case("endpoint_matvec", f"{form} {name}", tensors, {"form": form})


def _matched(form, name):
    data = _data(
        *{"plain": (15, 3, 3, (4,)), "image": (16, 2, 2, (2, 3)), "no query": (17, 0, 0, (3,))}[
            name
        ]
    )
    tensors = {
        "m": _normal(18)(data["x"].shape[0]),
        "eps": data["y"],
        "alpha": data["alpha"],
        "sigma": data["sigma"],
    }
    if form == "paper":
        tensors["x"] = data["x"]
    if name == "image":
        tensors |= {
            "sigma": torch.tensor(0.5, dtype=torch.float64),
            "eps": data["y"].mT.contiguous().mT,
        }
    return Case(
        "matched_trace",
        f"{form} {name}",
        tensors,
        {"form": form},
        unused=("eps", "alpha") if form == "residual" else (),
    )


ALL = [case for op in OPS for case in table(op)]


def floats(case):
    """Names of the tensors that can be differentiated."""
    return [k for k in ORDER[case.op] if isinstance(case.tensors.get(k), torch.Tensor)]
