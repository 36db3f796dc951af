"""The files in cluster/: fit for the schemas that packages ship, and for each other, the lock and the command line."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from pistoseg.cli import build_parser
from pistoseg.config import load_config
from pistoseg.pipeline import check_weights
from pistoseg.stages.slide_images import DISK_GB

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
LOCK = (ROOT / "requirements.lock").read_text()
RAY = re.search(r"^ray==(\S+)$", LOCK, re.MULTILINE)[1]
IMAGE = "pistoseg:" + tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TARGETS = ("preliminary_evaluation", "evaluation")
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def load(name):
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_spec(name):
    spec = load(name)["spec"]
    return spec["rayClusterSpec"] if load(name)["kind"] == "RayJob" else spec


def pods(name):
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def amount(text):
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", text).groups()
    return float(number) * UNITS[unit]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
class TestKubeRay:
    def test_version_and_image_are_those_of_this_release(self, name):
        assert load(name)["apiVersion"] == "ray.io/v1"
        assert cluster_spec(name)["rayVersion"] == RAY == version("ray")
        assert {container["image"] for pod in pods(name) for container in pod["containers"]} == {IMAGE}

    def test_secrets_come_by_reference_and_the_cluster_asks_for_a_token(self, name):
        assert cluster_spec(name)["authOptions"] == {"mode": "token"}
        for pod in pods(name):
            for variable in pod["containers"][0]["env"]:
                secret = re.search("KEY|SECRET|PASSWORD|USERNAME|TOKEN", variable["name"])
                assert ("valueFrom" in variable) == (bool(secret) or variable["name"] == DISK_GB), variable["name"]
                source = "resourceFieldRef" if variable["name"] == DISK_GB else "secretKeyRef"
                assert set(variable.get("valueFrom", {source: 0})) == {source}

    def test_no_pod_asks_for_more_than_its_limits_or_runs_as_root(self, name):
        for pod in pods(name):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            resources = pod["containers"][0]["resources"]
            assert set(resources["requests"]) == set(resources["limits"]) >= {"cpu", "memory"}
            for key, asked in resources["requests"].items():
                assert amount(asked) <= amount(resources["limits"][key]), key

    def test_the_cache_of_slides_stays_below_the_disk_that_kubernetes_lets_a_worker_have(self, name):
        for pod in pods(name)[1:]:
            container = pod["containers"][0]
            (source,) = (item["valueFrom"] for item in container["env"] if item["name"] == DISK_GB)
            assert source == {"resourceFieldRef": {"resource": "limits.ephemeral-storage", "divisor": "1G"}}
            limit = amount(container["resources"]["limits"]["ephemeral-storage"])
            sizes = [volume["emptyDir"]["sizeLimit"] for volume in pod.get("volumes", []) if volume["name"] == "cache"]
            assert all(amount(size) > limit / 2 for size in sizes)

    def test_workers_scale_and_only_one_group_has_gpus(self, name):
        groups = {group["groupName"]: group for group in cluster_spec(name)["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"}
        assert cluster_spec(name)["enableInTreeAutoscaling"] is True
        for group in groups.values():
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        gpus = {
            key: "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for key, group in groups.items()
        }
        assert gpus == {"cpu": False, "gpu": True}

    def test_volumes_are_those_that_are_mounted(self, name):
        for pod in pods(name):
            mounted = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}

    def test_no_field_is_misspelt(self, name):
        assert set(keys(load(name)["spec"])) <= set(re.findall(r"\S+", FIELDS))


FIELDS = """
    entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished rayClusterSpec
    rayVersion authOptions mode enableInTreeAutoscaling autoscalerOptions idleTimeoutSeconds
    headGroupSpec workerGroupSpecs groupName replicas minReplicas maxReplicas rayStartParams num-cpus template
    spec containers serviceAccountName securityContext runAsNonRoot runAsUser fsGroup tolerations operator effect
    name image ports containerPort env value valueFrom secretKeyRef key optional resourceFieldRef resource divisor
    allowPrivilegeEscalation volumes volumeMounts mountPath emptyDir medium sizeLimit
    resources requests limits cpu memory ephemeral-storage nvidia.com/gpu
"""
"""Those of KubeRay and Kubernetes that the files use; another one is misspelt, or new: then it is looked up."""


def keys(value):
    """All keys of what was read from a file, however deep."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from keys(item)
    if isinstance(value, dict):
        yield from value


def test_a_job_and_the_cluster_that_stays_are_made_of_the_same_nodes():
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


def test_a_job_that_failed_does_not_start_more_clusters():
    assert load("rayjob.yaml")["spec"]["backoffLimit"] == 0


def commands(names="*"):
    """Every command line of pistoseg in files of the folder, those in comments included."""
    found = [load("rayjob.yaml")["spec"]["entrypoint"]]
    for file in sorted(FOLDER.glob(names)):
        lines = re.sub(r"\\\n#?\s*", " ", file.read_text()).splitlines()
        for line in lines:
            if match := re.search(r"^#.*(python -m pistoseg|sbatch .*cluster/slurm\.sh) ([a-z].*)", line):
                found.append(match[2])
    return [shlex.split(text.removeprefix("python -m pistoseg ")) for text in found]


def test_every_command_in_the_files_is_one_that_pistoseg_takes():
    assert len(commands()) >= 5
    for command in commands():
        options = build_parser().parse_args(command)
        assert callable(options.run), command
        if options.verb == "train":
            check_weights(load_config(options.preset, options.profile, options.config, options.overrides), TARGETS)


def test_commands_for_clusters_that_start_with_a_head_alone_wait_for_gpu_nodes():
    for name in ("raycluster.yaml", "rayjob.yaml"):
        assert cluster_spec(name)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert load("aws.yaml")["available_node_types"]["head"]["resources"] == {"CPU": 0}
    found = [build_parser().parse_args(command) for command in commands("*.yaml")]
    assert sorted(options.verb for options in found) == ["segment", "segment", "train"]
    for options in found:
        if options.verb == "train":
            compute = load_config(options.preset, options.profile, options.config, options.overrides).compute
            assert (compute.device, compute.wait_for_nodes) == ("cuda", 900)
        else:
            assert (options.device, options.workers, options.wait_for_nodes) == ("cuda", 8, 900)


def test_every_job_says_a_command_that_its_verb_takes():
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    for file in jobs:
        text = re.sub(r"\\\n\s*", " ", file.read_text())
        (command,) = re.findall(rf"python jobs/{file.name} (.*)", text)
        assert callable(build_parser().parse_args([file.stem, *shlex.split(command)]).run), command
    assert len(jobs) == 6


def test_the_aws_file_fits_the_schema_of_ray_up_and_ec2s_of_a_node():
    import botocore.session
    import jsonschema
    import ray
    from botocore.validate import ParamValidator

    config = load("aws.yaml")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    assert config["head_node_type"] in config["available_node_types"]
    assert config["docker"]["image"] == IMAGE
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    kinds = ec2.shape_for("InstanceType").enum
    for name, node in config["available_node_types"].items():
        request = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()
        assert node["node_config"]["InstanceType"] in kinds
        spot = node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot == (name != config["head_node_type"])
    assert sum(node.get("max_workers", 0) for node in config["available_node_types"].values()) == config["max_workers"]


def test_on_aws_the_head_may_start_workers_and_nobody_gets_rays_old_machine_image():
    text, nodes = (FOLDER / "aws.yaml").read_text(), load("aws.yaml")["available_node_types"]
    given = {name: node["node_config"] for name, node in nodes.items()}
    profiles = {name: config["IamInstanceProfile"]["Name"] for name, config in given.items()}
    assert profiles == {"head": "pistoseg-head", "cpu": "pistoseg-s3", "gpu": "pistoseg-s3"}
    assert "AmazonEC2FullAccess,\n#                    and iam:PassRole on the role pistoseg-s3" in text
    assert {config["ImageId"] for config in given.values()} == {"ami-SET-IT"}


def test_the_slurm_script_is_a_script(tmp_path):
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    usage = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert (usage.returncode, "usage: sbatch" in usage.stderr) == (2, True)


PROGRAMS = {
    "scontrol": "seq --format=node%g 99999",
    "hostname": "echo 10.0.0.1",
    "mktemp": 'set -o pipefail; command -p mktemp "$@" | tee "$MADE"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "python": 'if [ "$1" = -c ]; then echo token; else echo "ran $*"; exit "$CODE"; fi',
    "ray": 'if [ "$STARTS" = no ]; then exit 0; fi; while [ "$1" != -- ]; do shift; done; shift; "$@"',
}
"""What stands in for those that the SLURM script calls; Ray's exits as it does, also where it can't start."""


@pytest.mark.parametrize(("starts", "code", "expected"), [("yes", 0, 0), ("yes", 3, 3), ("no", 0, 1)])
def test_a_slurm_job_ends_with_its_commands_code_and_never_well_without_it(tmp_path, starts, code, expected):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    made = tmp_path / "made"
    environment = {"PATH": os.environ["PATH"], "PISTOSEG_VENV": str(tmp_path), "MADE": str(made)}
    environment["TMPDIR"] = str(tmp_path / "gone")  # that of a session elsewhere
    environment |= {"STARTS": starts, "CODE": str(code), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", FOLDER / "slurm.sh", "segment", "--slides", "a folder"]
    call = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert call.returncode == expected, call.stderr
    assert ("ran -m pistoseg segment --slides a folder" in call.stdout) == (starts == "yes")
    assert not Path(made.read_text().strip()).exists()


def test_the_image_is_made_from_the_lock_and_does_not_run_as_root():
    lines = (FOLDER / "Dockerfile").read_text()
    assert "--constraint requirements.lock" in lines
    assert re.findall(r"^USER (\S+)$", lines, re.MULTILINE) == ["1000"]
    copied = {name for found in re.findall(r"^COPY (.+) \S+$", lines, re.MULTILINE) for name in found.split()}
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_no_file_holds_a_key():
    for file in FOLDER.iterdir():
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", file.read_text())
