"""The files that make clusters, by Ray's own checks where it has some, and against each other."""

import copy
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

import prism_ray
from prism_ray.config.load import load_config
from prism_ray.config.run import RunSettings
from prism_ray.config.runtime import ClusterSettings
from prism_ray.runtime.submitted import HOME, STOP_WAIT

ROOT = Path(__file__).resolve().parents[2]
RAY_UP = ("cluster.yaml", "configs/cluster_gcp.yaml")
KUBERAY = sorted((ROOT / "configs" / "kuberay").glob("*.yaml"))
SERVED = ROOT / "configs" / "serve.yaml"
IMAGE = f"prism-ray:{prism_ray.__version__}"
SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)s?$")
LOCKED = dict(line.split("==") for line in (ROOT / "requirements" / "gpu.txt").read_text().splitlines() if "==" in line)


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def based_on() -> str:
    return re.findall(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts_the_file(name):
    prepared = prepare_config(read(name))
    validate_config(prepared)
    workers = prepared["available_node_types"]
    assert workers["head"]["max_workers"] == 0 and workers["h100"]["min_workers"] >= 1
    assert {t["node_config"].get("InstanceType", t["node_config"].get("machineType")) for t in workers.values()} >= {
        "cluster.yaml": {"p5.48xlarge"}, "configs/cluster_gcp.yaml": {"a3-highgpu-8g"}
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", RAY_UP)
def test_a_mistake_in_the_file_is_noticed(name):
    wrong = copy.deepcopy(read(name))
    wrong["available_node_types"]["h100"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", RAY_UP)
def test_nodes_have_the_pinned_image_the_locked_packages_and_a_lasting_folder(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read(name)
    assert config["docker"]["image"] == based_on()
    given = [option.removeprefix("--env=") for option in config["docker"]["run_options"] if option.startswith("--env=")]
    environment = dict(one.split("=", 1) for one in given)
    shared = [option for option in config["docker"]["run_options"] if option.startswith("--volume=")]
    assert shared == ["--volume=/shared:/shared"] and Path(environment[HOME]).is_relative_to("/shared")
    assert float(environment[STOP_WAIT]) > ClusterSettings().stop_grace_s
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] in config["file_mounts"]
    sent = {"/home/ray/requirements": "requirements"}
    assert sent.items() <= config["file_mounts"].items() and hash_runtime_conf(sent, None, config)
    (install,) = [command for command in config["setup_commands"] if "pip install" in command]
    (as_make_does,) = re.findall(
        r"^PIP_INSTALL := .*(-m pip install.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert install == f"~/venv/bin/python {as_make_does} -r ~/requirements/gpu.txt"


@pytest.mark.parametrize("name", RAY_UP)
def test_commands_are_shell_and_start_rays_autoscaler(name):
    config = read(name)
    kinds = [kind for kind in config if kind.endswith("_commands")]
    assert "worker_start_ray_commands" in kinds
    for command in (command for kind in kinds for command in config[kind]):
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]


def test_a_p5_has_an_interface_for_ip_and_efa_on_each_of_its_32_cards():
    types = read("cluster.yaml")["available_node_types"]
    for name in ("h100", "h100_spot"):
        first, *others = types[name]["node_config"]["NetworkInterfaces"]
        assert first["InterfaceType"] == "interface" and (first["NetworkCardIndex"], first["DeviceIndex"]) == (0, 0)
        assert [one["NetworkCardIndex"] for one in others] == list(range(32))
        assert all(one["InterfaceType"] == "efa-only" and one["DeviceIndex"] == (not i) for i, one in enumerate(others))
        assert all(one["SubnetId"] and one["Groups"] for one in (first, *others)), "Ray wants both in each"
    assert types["h100_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.parametrize("name", [*RAY_UP, *(str(path.relative_to(ROOT)) for path in KUBERAY), "Dockerfile"])
def test_no_secret_stands_in_a_file(name):
    code = [line.partition("#")[0] for line in (ROOT / name).read_text().splitlines()]
    given = [found for line in code for found in re.findall(r"(\w+)(?:[=:]|, value:)[ \t]*[^\s{}]", line)]
    assert not [variable for variable in given if SECRET.search(variable)]


def pods(resource: dict) -> list[dict]:
    spec = resource["spec"].get("rayClusterSpec") or resource["spec"]["rayClusterConfig"]
    assert spec["rayVersion"] == ray.__version__ == LOCKED["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    return [spec["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_pods_have_our_image_a_token_and_what_they_mount(name):
    resource = read(f"configs/kuberay/{name}.yaml")
    claim = read("configs/kuberay/storage.yaml")["metadata"]["name"]
    for pod in pods(resource):
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts the limits"
        assert all("secretRef" in source for source in container["envFrom"])


def test_the_rayjob_runs_our_job_on_a_lasting_folder():
    resource = read("configs/kuberay/rayjob.yaml")
    python, job, option, config, *overrides = resource["spec"]["entrypoint"].split()
    here = [Path(path).relative_to("/home/ray/prism_ray") for path in (job, config)]
    assert (python, option) == ("python", "--config") and here[0] == Path("jobs/align.py")
    settings = load_config(RunSettings, ROOT / here[1], overrides)
    *_, worker = pods(resource)
    gpus = int(worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.learner.ranks * settings.learner.gpus_per_rank < gpus, "more than the file's workers have"
    for pod in pods(resource):
        environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        assert environment[HOME] == "/shared/prism_ray"
        assert float(environment[STOP_WAIT]) > ClusterSettings().stop_grace_s


def applications(text: str) -> list[dict]:
    """The applications of a Serve config file, checked by Serve's own schema; without the checkpoint's folder."""
    config = yaml.safe_load(text)
    ServeDeploySchema.model_validate(config)
    for deployment in (d for application in config["applications"] for d in application.get("deployments", [])):
        deployment.get("user_config", {}).pop("checkpoint", None)
    return config["applications"]


def test_serve_accepts_what_the_rayservice_deploys():
    embedded = read("configs/kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    (application,) = applications(embedded)
    assert application["import_path"].startswith("prism_ray.serve.")
    assert "checkpoint: /shared/prism_ray/runs/" in embedded


def test_the_rayservice_deploys_what_serve_yaml_does():
    embedded = read("configs/kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    assert applications(embedded) == applications(SERVED.read_text())


def test_the_jobs_environment_is_one_of_rays_and_holds_the_grace():
    environment = read("configs/job.yaml")
    RuntimeEnv(**environment)
    assert set(environment) == {"env_vars"}
    assert float(environment["env_vars"][STOP_WAIT]) > ClusterSettings().stop_grace_s


def test_a_job_is_sent_without_environment_history_and_runs(tmp_path):
    """By Ray's own packing, which heeds .gitignore; a new kind of large file belongs into that."""
    kept = ["jobs/align.py", "prism_ray/records.py", "configs/recipes/dapo.yaml", "my_data/prompts.parquet"]
    left = [".venv/lib/torch.so", ".git/objects/pack", "runs/tiny/align/checkpoint/model.safetensors", "wandb/run/log"]
    for name in [*kept, *left]:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("x")
    shutil.copy2(ROOT / ".gitignore", tmp_path / "here")
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "here"), package, True, excludes=get_runtime_env_default_excludes())
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert names == {*kept, ".gitignore"}
