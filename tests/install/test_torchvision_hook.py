"""The hook in interpreters of their own: with a torch and a torchvision that behave like each combination met."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parents[2] / "tools" / "torchvision_hook.py"

# A torch with as much as the hook and the pretended torchvision touch.
TORCH = """
import types
defined = []
class Library:
    def __init__(self, name, kind): self.name = name
    def define(self, signature): defined.append(self.name + "::" + signature.split("(")[0])
library = types.SimpleNamespace(Library=Library)
version = types.SimpleNamespace(cuda={cuda!r})
def load_library(path):
    if {broken!r}: raise OSError("libcudart.so: cannot open shared object file")
    defined.append("extension")
ops = types.SimpleNamespace(torchvision=types.SimpleNamespace(), load_library=load_library)
"""
TORCHVISION = """
import torch
seen = list(torch.defined)
"""


def run(code: str, *paths: Path, start: str = "import _torchvision_hook") -> str:
    setup = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}; {start}\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", setup + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def site(tmp_path):
    (tmp_path / "_torchvision_hook.py").write_text(HOOK.read_text())
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(TORCHVISION)
    (tmp_path / "torchvision" / "_C.so").touch()
    (tmp_path / "torchvision" / "data.txt").write_text("resource")
    (tmp_path / "torch.py").write_text(TORCH.format(cuda=None, broken=True))
    return tmp_path


SEEN = "import torchvision; print(*torchvision.seen)"


def test_declares_both_operators_before_torchvision_executes(site):
    assert run(SEEN, site) == "torchvision::nms torchvision::qnms"


def test_does_nothing_when_the_extension_loads(site):
    (site / "torch.py").write_text(TORCH.format(cuda=None, broken=False))
    assert run(SEEN, site) == "extension"


def test_does_nothing_beside_a_cuda_torch(site):
    (site / "torch.py").write_text(TORCH.format(cuda="13.0", broken=True))
    assert run(SEEN, site) == ""


def test_imports_torch_neither_at_start_nor_when_torchvision_is_only_looked_for(site):
    code = "import importlib.util as u; print(u.find_spec('torchvision') is not None, 'torch' in sys.modules)"
    assert run(code, site) == "True False"


def test_torchvisions_resources_stay_readable(site):
    code = "import importlib.resources as r; print(r.files('torchvision').joinpath('data.txt').read_text())"
    assert run(code, site) == "resource"


def test_a_missing_torchvision_stays_missing(site):
    shutil.rmtree(site / "torchvision")
    assert run("import importlib.util as u; print(u.find_spec('torchvision'))", site) == "None"


def test_installing_twice_leaves_one_working_pth(site, tmp_path_factory):
    destination = tmp_path_factory.mktemp("site-packages")
    code = "import runpy, pathlib; h = runpy.run_path({!r}); [h['install'](pathlib.Path({!r})) for _ in '12']"
    run(code.format(str(HOOK), str(destination)), start="pass")
    assert sorted(p.name for p in destination.iterdir()) == ["_torchvision_hook.pth", "_torchvision_hook.py"]
    start = f"import site; site.addsitedir({str(destination)!r})"
    (site / "_torchvision_hook.py").unlink()
    assert run(SEEN, site, start=start) == "torchvision::nms torchvision::qnms"


def test_qwen3_vl_imports_in_this_environment():
    code = (
        "from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor; import torchvision; print('yes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "yes", done.stderr
