"""The files for AWS on a simulated account that enforces permissions; never tried on a live one."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
import yaml
from botocore.exceptions import ClientError, ParamValidationError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config

from pipelines.tables.table import open_table

ROOT = Path(__file__).parents[2]
AWS = ROOT / "infra/aws"
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
REGION = CLUSTER["provider"]["region"]
ACCOUNT = "123456789012"


def document(name: str) -> str:
    """A policy for the simulated account and the bucket of the tests."""
    return (AWS / name).read_text().replace("BUCKET", "bucket").replace("ACCOUNT", ACCOUNT)


@pytest.fixture(scope="module")
def account(bucket: str) -> Iterator[str]:
    """The endpoint of a simulated account, set up as docs/cluster.md describes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        iam = client("iam")
        for name, policies in {"node": ["bucket.json"], "head": ["bucket.json", "head.json"]}.items():
            role = f"snapfusion-{name}"
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=document("trust.json"))
            for policy in policies:
                iam.put_role_policy(RoleName=role, PolicyName=policy[:-5], PolicyDocument=document(policy))
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        s3 = client("s3")
        s3.put_object(Bucket="bucket", Key="shards/00000.tar", Body=b"shard")
        s3.create_bucket(Bucket="other", CreateBucketConfiguration={"LocationConstraint": REGION})
        s3.put_object(Bucket="other", Key="secret", Body=b"secret")
        yield os.environ["AWS_ENDPOINT_URL"]


def client(service: str) -> Any:
    """A client with the current credentials of the environment."""
    return boto3.Session().client(service)


@contextmanager
def acting(endpoint: str, name: str, policies: dict[str, str]) -> Iterator[dict[str, str]]:
    """Within it the account enforces permissions, and the environment's key has these policies only."""
    iam = client("iam")
    iam.create_user(UserName=name)
    for policy, text in policies.items():
        iam.put_user_policy(UserName=name, PolicyName=policy, PolicyDocument=text)
    created = iam.create_access_key(UserName=name)["AccessKey"]
    key = {"AWS_ACCESS_KEY_ID": created["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": created["SecretAccessKey"]}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in key.items():
            patch.setenv(variable, value)
        s3fs.S3FileSystem.clear_instance_cache()
        _enforce_permissions(endpoint, after=0)
        try:
            yield key
        finally:
            _enforce_permissions(endpoint, after=10**9)
            s3fs.S3FileSystem.clear_instance_cache()


def _enforce_permissions(endpoint: str, *, after: int) -> None:
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", data=str(after).encode(), headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).read()


def refused(call: Any, **arguments: Any) -> bool:
    try:
        call(**arguments)
    except ClientError as error:
        return error.response["Error"]["Code"] in {"AccessDenied", "UnauthorizedOperation", "403"}
    return False


def test_a_node_may_only_fill_tables(account, bucket):
    with acting(account, "node", {"bucket": document("bucket.json")}):
        table = f"{bucket}/snapfusion/run/table"
        fill = "import sys, synthetic_units as units; units.run(sys.argv[1])"
        subprocess.run([sys.executable, "-c", fill, table], check=True)
        assert sum(account.rows_read for account in open_table(table).manifests().values()) == 22
        s3 = client("s3")
        assert s3.get_object(Bucket="bucket", Key="shards/00000.tar")["Body"].read() == b"shard"
        upload = {"Bucket": "bucket", "Key": "scratch/large"}
        upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
        s3.upload_part(**upload, PartNumber=1, Body=b"part")
        s3.abort_multipart_upload(**upload)
        s3.delete_object(Bucket="bucket", Key="snapfusion/run/table/none.parquet")
        assert refused(s3.put_object, Bucket="bucket", Key="shards/00001.tar", Body=b"")
        assert refused(s3.delete_object, Bucket="bucket", Key="shards/00000.tar")
        rules = {"Bucket": "bucket", "LifecycleConfiguration": lifecycle()}
        assert refused(s3.put_bucket_lifecycle_configuration, **rules)
        assert refused(s3.get_object, Bucket="other", Key="secret")
        assert refused(s3.list_objects_v2, Bucket="other")
        assert refused(client("ec2").run_instances, ImageId="ami-1", MinCount=1, MaxCount=1)


def lifecycle() -> dict[str, Any]:
    return json.loads((AWS / "lifecycle.json").read_text())


def test_the_store_accepts_the_lifecycle_rules(account):
    s3 = client("s3")
    s3.put_bucket_lifecycle_configuration(Bucket="bucket", LifecycleConfiguration=lifecycle())
    kept = s3.get_bucket_lifecycle_configuration(Bucket="bucket")["Rules"]
    assert {rule["ID"]: rule for rule in kept} == {rule["ID"]: rule for rule in lifecycle()["Rules"]}
    # What ends a table or a training would lose rows: only what was never finished, replaced or tried.
    ending = {rule["Filter"]["Prefix"] for rule in kept if "Days" in rule.get("Expiration", {})}
    assert ending == {"scratch/"}
    for wrong in ({"Prefix": "scratch/"}, {"NoncurentVersionExpiration": {"NoncurrentDays": 30}}):
        rules = lifecycle()
        rules["Rules"][0] |= wrong
        with pytest.raises((ClientError, ParamValidationError)):
            s3.put_bucket_lifecycle_configuration(Bucket="bucket", LifecycleConfiguration=rules)


@pytest.fixture(scope="module")
def launched(account, tmp_path_factory) -> dict[str, Any]:
    """ray_cluster.yaml after Ray's own AWS bootstrap, which makes keys and groups and looks everything up."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    config = json.loads(json.dumps(CLUSTER))
    image = client("ec2").describe_images()["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["ImageId"] == "ami-00000000000000000"
        kind["node_config"]["ImageId"] = image
    config["file_mounts"] = {}  # the token is the user's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        return _bootstrap_config(config, no_config_cache=True)


def test_rays_bootstrap_accepts_the_cluster_file(launched):
    types = launched["available_node_types"]
    assert {name: kind["labels"] for name, kind in types.items()} == {name: {"role": name} for name in types}
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["decode"]["resources"]["CPU"] == 16
    assert types["teacher"]["resources"]["GPU"] == 1
    assert types["trainer"]["resources"]["GPU"] == 8
    for name, kind in types.items():
        assert kind["node_config"]["IamInstanceProfile"]["Name"].startswith("snapfusion-"), name
        assert kind["node_config"]["SecurityGroupIds"]


def test_the_head_may_start_and_end_nodes(account, launched):
    policy = json.loads(document("head.json"))
    for statement in policy["Statement"]:
        # The simulation knows no resources and no conditions of EC2: what narrows these rights is not tried.
        statement["Resource"] = "*"
    with acting(account, "head", {"head": json.dumps(policy)}) as key:
        credentials = {variable.lower(): value for variable, value in key.items()}
        provider = AWSNodeProvider({**launched["provider"], "aws_credentials": credentials}, "snapfusion")
        for name in ("teacher", "trainer"):
            config = launched["available_node_types"][name]["node_config"]
            provider.create_node(config, {"ray-user-node-type": name}, 1)
        nodes = provider.non_terminated_nodes({})
        assert len(nodes) == 2
        provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
        assert refused(client("iam").list_users)
        assert refused(client("ec2").create_vpc, CidrBlock="10.0.0.0/16")
        pages = client("ec2").get_paginator("describe_instances").paginate()
        instances = pages.search("Reservations[].Instances[]")
        markets = {one["InstanceType"]: one.get("InstanceLifecycle", "on demand") for one in instances}
        provider.terminate_nodes(nodes)
        assert provider.non_terminated_nodes({}) == []
    assert markets == {"g6e.2xlarge": "spot", "p4d.24xlarge": "on demand"}


def test_the_heads_rights_are_limited_to_its_cluster():
    head = {statement["Sid"]: statement for statement in json.loads(document("head.json"))["Statement"]}
    region = head["StartNodes"]["Condition"]["StringEquals"]["aws:RequestedRegion"]
    cluster = head["EndAndNameNodesOfThisClusterOnly"]["Condition"]["StringEquals"]
    assert region == REGION
    assert cluster == {"aws:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}
    assert head["GiveWorkersTheirProfile"]["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/snapfusion-node"
