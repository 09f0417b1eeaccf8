"""`deploy/rayjob.yaml` is what KubeRay's operator takes, and its entry point what moe-ray takes."""

import copy
import shlex

import jsonschema
import pytest
import yaml
from paths import ROOT

from moe_ray.config.io import load_config

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def closed(required=(), **properties):
    """An object with these fields and no others: the operator drops what it does not know without a word."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items):
    return {"type": "array", "items": items}


QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}}
CONTAINER = closed(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    env=listed(closed(("name", "value"), name=TEXT, value=TEXT)),
    envFrom=listed(closed(secretRef=closed(("name",), name=TEXT))),
    resources=closed(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=listed(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = closed(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=closed(("claimName",), claimName=TEXT, readOnly=FLAG),
    emptyDir=closed(medium=TEXT, sizeLimit=TEXT),
)
POD = closed(("spec",), spec=closed(("containers",), containers=listed(CONTAINER), volumes=listed(VOLUME)))
CLUSTER = closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=closed(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        idleTimeoutSeconds=NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=closed(("template",), rayStartParams=TEXTS, template=POD, serviceType=TEXT),
    workerGroupSpecs=listed(
        closed(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
    suspend=FLAG,
)
RAY_JOB = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(("name",), name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=closed(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        backoffLimit=NUMBER,
        activeDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        entrypointNumCpus={"type": "number"},
        rayClusterSpec=CLUSTER,
        suspend=FLAG,
    ),
)
"""The part of the custom resource definition `rayjobs.ray.io` that a run needs.

Source: ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go of ray-project/kuberay.
"""


@pytest.fixture
def job():
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def test_the_manifest_fits_the_resource_definition(job):
    jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "entryPoint"), "moe-ray"),
        (("spec", "submissionMode"), "JobMode"),
        (("spec", "rayClusterSpec", "authOptions"), {"mode": "tokens"}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_a_wrong_field_would_be_noticed(job, place, value):
    changed = copy.deepcopy(job)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, RAY_JOB)


def test_the_entry_point_is_a_command_that_moe_ray_takes(job):
    program, command, run_dir, *settings = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("moe-ray", "full")
    config = load_config(None, [f"run_dir={run_dir}", *settings])
    assert config.run_dir.startswith("s3://")
    gpus = next(g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    limits = gpus["template"]["spec"]["containers"][0]["resources"]["limits"]
    wanted = {
        config.capture.num_actors * config.capture.gpus_per_actor,
        config.evaluate.num_actors * config.evaluate.gpus_per_actor,
        config.finetune.num_workers * config.finetune.gpus_per_worker,
    }
    assert max(wanted) == gpus["maxReplicas"] * int(limits["nvidia.com/gpu"])


def test_the_head_takes_no_work_and_work_without_gpus_has_pods_of_its_own(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
