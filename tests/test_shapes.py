"""The package without the developers' tools, and under PyTorch's compilers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sovit

# The shape checks of the tests are opaque to the compiler, and a user has none.
BARE = """
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
         "multi_head_svpn": 4, "avg": 6}
for name, reduced_dim in SMALL.items():
    pool = build_pooling(Pooling.named(name, reduced_dim=reduced_dim), embed_dim=8)
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
        program = torch.export.export(pool, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x[:2]), pool(x[:2]))
outside = {"ray", "mlflow", "pyarrow", "nvidia", "tyro", "pipelines"}
print("loaded:", sorted(outside & set(sys.modules)))
"""


def test_works_compiles_and_exports_with_torch_and_timm_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        capture_output=True,
        text=True,
        cwd=Path(sovit.__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
