"""Let `import torchvision` work beside a CPU build of torch. This docstring is the one place that explains it.

Why: package indexes carry only torchvision's CUDA build, whose compiled extension cannot be loaded beside a CPU build
of torch. torchvision shrugs at that, but then registers fake kernels for the operator `torchvision::nms`, which the
extension would have defined, and the import dies with "operator torchvision::nms does not exist". With it die
Qwen3-VL in transformers and in vLLM, which need torchvision's image transforms only, never these operators.
Declaring the two operators (without an implementation) before torchvision is imported is enough. It must happen in
EVERY process, including those that vLLM and Ray start, hence not in our package but in the interpreter's start-up:

* `python tools/torchvision_hook.py` copies this file into the running interpreter's site-packages, next to a one-line
  `.pth` file that imports it. The Makefile does that for the CPU stack and never for the GPU stack.
* At start-up the module only puts a finder on `sys.meta_path`; torch is not imported until torchvision is.
* When torchvision is about to execute, the hook acts only if torch has no CUDA and torchvision's extension does not
  load. With a torchvision that fits (for instance from PyTorch's own CPU index) it does nothing.

To undo it, delete the two files `_torchvision_hook.*` from site-packages, or the whole virtual environment.
"""

import sys
from importlib.machinery import PathFinder

MODULE = "_torchvision_hook"
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # a torch.library.Library; its operators live as long as it does


def declare_operators(package_folder):
    """Declare torchvision's operators if this torch has no CUDA and the extension in `package_folder` cannot load.

    Returns whether they were declared. Imports torch.
    """
    global _library
    from pathlib import Path

    import torch

    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return False
    for extension in sorted(Path(package_folder).glob("_C*")):
        try:
            torch.ops.load_library(str(extension))
            return False
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for signature in OPERATORS:
        _library.define(signature)
    return True


class TorchvisionFinder:
    """Finds torchvision as Python itself would, and has the operators declared just before it executes."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return spec
        folder, execute = spec.submodule_search_locations[0], spec.loader.exec_module

        def exec_module(module):
            declare_operators(folder)
            execute(module)

        # Set on the instance, so that everything else the loader can do (resources, source) stays available.
        spec.loader.exec_module = exec_module
        return spec


def install(site_packages):
    """Copy this file and its `.pth` line into `site_packages` (a Path); installing again changes nothing."""
    import shutil

    shutil.copyfile(__file__, site_packages / f"{MODULE}.py")
    (site_packages / f"{MODULE}.pth").write_text(f"import {MODULE}\n")


if __name__ == "__main__":
    import sysconfig
    from pathlib import Path

    if sys.prefix == sys.base_prefix:
        sys.exit("The torchvision hook is installed into virtual environments only; run it with .venv/bin/python.")
    destination = Path(sysconfig.get_path("purelib"))
    install(destination)
    print(f"torchvision hook installed into {destination}")
elif __name__ == MODULE:
    sys.meta_path.insert(0, TorchvisionFinder)
