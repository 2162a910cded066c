"""The Kubernetes manifests were validated against KubeRay's definitions and agree with the rest."""

import importlib.util
import json
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs import top_up
from jobs.recipes.registry import recipe_named

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra/kuberay"
AWS = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())

spec = importlib.util.spec_from_file_location("kuberay_check", KUBERAY / "check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

DEFINITION = """
spec:
  group: ray.io
  names: {kind: Toy}
  versions:
    - name: v1alpha1
      schema: {openAPIV3Schema: {type: object}}
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [size]
              properties:
                size: {type: integer, minimum: 0}
                mode: {type: string, enum: [token, none]}
                limits:
                  type: object
                  additionalProperties: {x-kubernetes-int-or-string: true, pattern: "^[0-9]+"}
                groups:
                  type: array
                  items: {type: object, properties: {name: {type: string}}}
                anything: {type: object, x-kubernetes-preserve-unknown-fields: true, properties: {}}
"""
LIMITS = {"cpu": "4", "nvidia.com/gpu": 1}
SPEC = {"size": 2, "mode": "token", "limits": LIMITS, "groups": [{"name": "a"}]}
TOY = {"apiVersion": "ray.io/v1", "kind": "Toy", "metadata": {"name": "toy"}, "spec": SPEC}


@pytest.fixture
def definitions(tmp_path):
    (tmp_path / "ray.io_toys.yaml").write_text(DEFINITION)
    return tmp_path


def test_manifests_are_validated_by_kind_and_version(definitions):
    # Each key but those that anybody may choose, and the size.
    assert check.check(TOY, definitions) == 10
    with pytest.raises(ValueError, match="does not define Other"):
        check.check({**TOY, "kind": "Other"}, definitions)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": 2, "sise": 2}, "'sise' was unexpected"),
        ({"size": "2"}, "is not of type 'integer'"),
        ({"size": -1}, "less than the minimum"),
        ({"mode": "token"}, "'size' is a required property"),
        ({"size": 2, "mode": "off"}, "is not one of"),
        ({"size": 2, "groups": [{"name": "a"}, {"nome": "b"}]}, "'nome' was unexpected"),
        ({"size": 2, "limits": {"cpu": 0.5}}, "is not valid under any"),
    ],
)
def test_invalid_manifests_are_refused(definitions, spec, message):
    with pytest.raises(jsonschema.ValidationError, match=message):
        check.check({**TOY, "spec": spec}, definitions)


def test_unnoticed_mistakes_are_an_error(definitions):
    with pytest.raises(ValueError, match="a mistake is not noticed"):
        check.check({**TOY, "spec": {"size": 1, "anything": {"free": "to say"}}}, definitions)


def test_the_manifests_are_the_validated_ones():
    checked = json.loads((KUBERAY / "checked.json").read_text())
    now = {path.name: check.sha256(path) for path in check.manifests()}
    assert now == checked["manifests"], "a manifest was changed: run infra/kuberay/check.py again"
    assert list(checked["releases"]) == ["v1.6.2", "v1.7.0"]


def manifest(name):
    return yaml.safe_load((KUBERAY / name).read_text())


def groups(cluster):
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


CLUSTER = manifest("cluster.yaml")["spec"]
NIGHTLY = manifest("cronjob.yaml")["spec"]["jobTemplate"]


def test_the_nightly_cluster_has_no_trainers():
    own = NIGHTLY["rayClusterSpec"]
    assert {**own, "workerGroupSpecs": None} == {**CLUSTER, "workerGroupSpecs": None}
    assert groups(own) == {name: group for name, group in groups(CLUSTER).items() if name != "trainer"}


def test_kubernetes_and_aws_have_the_same_roles():
    aws = {name: kind for name, kind in AWS["available_node_types"].items() if name != "head"}
    for name, group in groups(CLUSTER).items():
        assert group["labels"] == aws[name]["labels"] == {"role": name}
        assert group["minReplicas"] == aws[name]["min_workers"]
        assert group["maxReplicas"] == aws[name]["max_workers"]
        spot = group["template"]["spec"].get("nodeSelector", {}).get("karpenter.sh/capacity-type")
        assert spot != "on-demand" or "InstanceMarketOptions" not in aws[name]["node_config"]
    assert groups(CLUSTER).keys() == aws.keys()
    # Labels start nodes with the second autoscaler only.
    assert CLUSTER["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("job", [manifest("job.yaml")["spec"], NIGHTLY], ids=["job", "nightly"])
def test_manifests_run_jobs_with_existing_settings(job):
    python, dash_m, module, *options = shlex.split(job["entrypoint"])
    assert (python, dash_m) == ("python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    if module == "jobs.top_up":
        assert options.pop(0) in top_up.STEPS
    given = list(zip(options[::2], options[1::2], strict=True))
    recipe = recipe_named(dict(given)["--recipe"])
    recipe.with_values([value for option, value in given if option == "--set"])
    assert dict(given)["--out"].startswith("s3://BUCKET/")
    assert {option for option, _ in given} <= {"--recipe", "--set", "--out"}


def test_the_job_runs_on_the_cluster():
    name = manifest("cluster.yaml")["metadata"]["name"]
    assert manifest("job.yaml")["spec"]["clusterSelector"] == {"ray.io/cluster": name}


def test_only_the_nightly_job_is_retried():
    # It refuses retries of a job on a cluster that is not its own.
    assert "backoffLimit" not in manifest("job.yaml")["spec"]
    assert NIGHTLY["backoffLimit"] > 0
    assert NIGHTLY["shutdownAfterJobFinishes"]
    # Over before the next night.
    assert NIGHTLY["activeDeadlineSeconds"] < 86_400
