"""Compile and export in processes that lack the developers' tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The shape checks of the tests are opaque to the compiler, and a user has none.
NETWORKS = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None
import timm, torch, sovit

torch.set_num_threads(1)
from timm.models._features_fx import create_feature_extractor, get_graph_node_names

images = torch.randn(3, 3, 64, 64)
batch = torch.export.Dim("batch", min=1, max=64)
SHORT = {"layers": (1, 1, 1, 1)}
COVARIANCE = {**SHORT, "pooling": {"reduced_dim": 8}}
FAMILIES = {
    "mpncov_resnet50": COVARIANCE,
    "isqrt_resnet18": COVARIANCE,
    "gaussian_resnet50": COVARIANCE,
    "gsop_resnet50_2": {**COVARIANCE, "stages": (1,), "attention": "concat"},
    "eca_resnet18": SHORT,
    "eca_mobilenetv2": {"depth_multiplier": 0.1},
    "deit_tiny_so": {"depth": 1},
    "swin_tiny_so": {"depths": (1, 1), "num_heads": (1, 1), "embed_dim": 24},
}
# Poolings are compiled below, and whole steps of families by tests/fake_gpu.
COMPILED = ("isqrt_resnet18", "gsop_resnet50_2", "eca_mobilenetv2", "swin_tiny_so")
for name, settings in FAMILIES.items():
    model = timm.create_model(name, num_classes=3, img_size=64, **settings).eval()
    wanted = model(images)
    if name in COMPILED:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(got, wanted)
        got.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), name
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images[:2]), model(images[:2]))
        assert torch.equal(torch.fx.symbolic_trace(model)(images), wanted), name
        last = get_graph_node_names(model)[1][-1]
        (got,) = create_feature_extractor(model, [last])(images).values()
        assert torch.equal(got, wanted), name
    print(name)
"""
POOLINGS = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None
import timm, torch, sovit

images = torch.randn(4, 3, 32, 32)
for name, token_embed in (("so_vit_7", "resnet"), ("sot_tiny", "linear")):
    settings = {"img_size": 32, "num_classes": 5, "token_embed": token_embed}
    model = timm.create_model(name, depth=1, **settings).eval()
    wanted = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(images)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    wanted.square().sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images[:3]), model(images[:3]))
    assert torch.equal(torch.fx.symbolic_trace(model)(images), wanted)
    kwargs = {**settings, "depth": 1, "features_only": True, "out_indices": (0,)}
    model.set_grad_checkpointing(False)
    graph = timm.create_model(name, feature_cls="fx", **kwargs)
    graph.graph_module.load_state_dict(model.state_dict(), strict=False)
    tokens = graph.eval()(images)[0]
    assert torch.equal(model.norm(tokens), model.forward_features(images))
    try:
        torch.fx.symbolic_trace(model)(images[..., :16])
    except ValueError as error:
        assert "expected images of" in str(error)
    else:
        raise AssertionError("the check of images is not in the graph")

x, start = torch.randn(3, 4, 6, requires_grad=True), torch.randn(6)
for settings in ({}, {"num_iterations": 2, "num_singular_values": None}):
    compiled = torch.compile(sovit.svpn, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x, start, **settings), sovit.svpn(x, start, **settings)
    torch.testing.assert_close(got, wanted)
    (got_grad,) = torch.autograd.grad(got.square().sum(), x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(got_grad, wanted_grad)

from sovit.pooling import Pooling, build_pooling

SMALL = {"cov": 6, "mpn_cov": 6, "isqrt_cov": 6, "gaussian": 6, "svpn": (6, 4),
         "multi_head_svpn": 4, "drop_cov": 6, "drop_cov_tokens": 4, "moment": 8,
         "avg": 6}
poolings = [(name, Pooling.named(name, reduced_dim=dim)) for name, dim in SMALL.items()]
minimax = {"coefficients": "minimax", "num_iterations": 3, "pre_norm": "s4"}
poolings.append(("isqrt_cov", Pooling.named("isqrt_cov", reduced_dim=6, **minimax)))
for name in ("mpa", "mtp"):
    poolings.append((name, Pooling.named("mpn_cov", reduced_dim=6, normalizer=name)))
for name, settings in poolings:
    torch._dynamo.reset()  # each is compiled anew: their number is not what is tested
    pool = build_pooling(settings, embed_dim=8)
    pool.eval()
    # Fewer tokens than channels, and for one method more.
    for num_tokens in (5, 9) if name == "isqrt_cov" else (5,):
        x = torch.randn(3, num_tokens, 8, requires_grad=True)
        got = torch.compile(pool, fullgraph=True, backend="aot_eager")(x)
        wanted = pool(x)
        torch.testing.assert_close(got, wanted)
        (got_grad,) = torch.autograd.grad(got.square().sum(), x)
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
        torch.testing.assert_close(got_grad, wanted_grad)
        torch.compile(pool.train(), fullgraph=True, backend="aot_eager")(x)
        pool.eval()
        program = torch.export.export(pool, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x[:2]), pool(x[:2]))
outside = {"ray", "mlflow", "pyarrow", "nvidia", "tyro", "pipelines"}
print("loaded:", sorted(outside & set(sys.modules)))
"""


def printed(script: str) -> str:
    """Return what a script prints; raise AssertionError if it failed."""
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
