"""What a fresh process can do: without triton, and when the first call is a compiled one."""

import subprocess
import sys
import textwrap

BLOCK_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked")
sys.meta_path.insert(0, Blocked())
"""


def run(code: str, **environment: str) -> str:
    """Run `code` in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_resnet_runs_where_triton_is_absent() -> None:
    code = """
    import torch, vertebra
    model = vertebra.create_model("resnet18", num_classes=10)
    y = model(torch.randn(2, 3, 64, 64))
    y.sum().backward()
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    sites = vertebra.explain(model, torch.randn(2, 3, 64, 64))
    print(tuple(y.shape), {(s.path, s.reason) for s in sites}, "triton" in sys.modules)
    """
    # where kernels would be interpreted, CPU tensors are taken for what Triton serves
    out = run(BLOCK_TRITON + textwrap.dedent(code), TRITON_INTERPRET="1")
    assert out.strip() == "(2, 10) {('eager', 'triton is not installed')} False"


def test_import_loads_neither_triton_nor_a_peer() -> None:
    code = """
    import sys
    import torch
    before = set(sys.modules)
    import vertebra
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    print(sorted(new & {"triton", "torchvision", "timm", "transformers", "rich", "typer"}))
    """
    assert run(code).strip() == "[]"


def test_the_first_call_may_be_compiled() -> None:
    code = """
    import torch, vertebra
    model = vertebra.nn.ConvNormAct(3, 8, 3)
    x = torch.randn(2, 3, 8, 8)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    print(tuple(y.shape))
    """
    for interpret in ("0", "1"):
        assert run(code, TRITON_INTERPRET=interpret).strip() == "(2, 8, 8, 8)"
