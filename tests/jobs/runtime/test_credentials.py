"""Credentials from a file on every node, and secrets refused where they would be shown."""

import os
import re
import sys
from pathlib import Path

import pytest

from jobs import command, encode_latents
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.runtime.credentials import (
    CREDENTIAL_VARIABLES,
    CredentialsError,
    apply_storage,
    apply_storage_in_worker,
    read_credentials,
    worker_runtime_env,
)
from jobs.runtime.secrets import refuse_secrets, refuse_secrets_in_options
from jobs.runtime.settings import StorageSettings
from snapfusion.settings import SettingsError

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ANOTHER = "another-secret-of-nobody"
TOKEN = "tokenOfNobody0123456789abcdef"
KEY = "AWS_SECRET_ACCESS_KEY"
PUBLIC = ("SNAPFUSION_CREDENTIALS", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_DEFAULT_REGION", "AWS_REGION")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment without credentials, restored after the test."""
    for name in (*CREDENTIAL_VARIABLES, *PUBLIC):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def written(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    file = folder / "credentials"
    file.write_bytes(text.encode())
    file.chmod(mode)
    return file


def test_only_the_path_of_credentials_is_public(tmp_path):
    text = f"# of the teachers\n\nAWS_ACCESS_KEY_ID = AKIA\nAWS_SECRET_ACCESS_KEY={SECRET}\n"
    file = written(tmp_path, text)
    os.environ["AWS_SESSION_TOKEN"] = "of somebody else"
    os.environ["AZURE_STORAGE_ACCOUNT_NAME"] = "another store's"
    apply_storage(StorageSettings(endpoint="http://127.0.0.1:9/", region="eu-west-1", credentials=str(file)))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert os.environ["AWS_ALLOW_HTTP"] == "true"
    assert "AWS_SESSION_TOKEN" not in os.environ
    assert os.environ["AZURE_STORAGE_ACCOUNT_NAME"] == "another store's"
    shown = worker_runtime_env({"A": "b"})
    assert shown["env_vars"] == {
        "A": "b",
        "SNAPFUSION_CREDENTIALS": str(file),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_REGION": "eu-west-1",
    }
    assert shown["worker_process_setup_hook"] == "jobs.runtime.credentials.apply_storage_in_worker"


def test_without_a_file_the_environment_is_unchanged():
    before = dict(os.environ)
    apply_storage(StorageSettings())
    assert dict(os.environ) == before
    assert worker_runtime_env({"A": "b"}) == {"env_vars": {"A": "b"}}


def test_a_worker_reads_its_nodes_file(tmp_path, capfd):
    apply_storage_in_worker()
    os.environ["SNAPFUSION_CREDENTIALS"] = str(written(tmp_path, f"AWS_SECRET_ACCESS_KEY={SECRET}\n"))
    apply_storage_in_worker()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    os.environ["SNAPFUSION_CREDENTIALS"] = str(tmp_path / "none")
    apply_storage_in_worker()
    assert "none: No such file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"AWS_ACCESS_KEY_ID=AKIA\n{SECRET}\n", "line 2: is not of the form NAME=VALUE"),
        (f"{SECRET}=\n", "line 1: is not of the form NAME=VALUE"),
        (f"\n{SECRET}={ANOTHER}\n", "line 2: sets no variable that is read here; accepted are AWS_"),
        (f"AWS_PROFILE={SECRET}\n", "line 1: sets no variable"),
        (f"export {KEY}={SECRET}\n", "line 1: sets no variable"),
        (f'{KEY}="{SECRET}"\n', "line 1: has a value in quotes"),
        (f"{KEY}={SECRET}\0\n", "line 1: has a value in quotes, or one that is not plain"),
        (f"{KEY}={SECRET}\n{KEY}={ANOTHER}\n", "line 2: sets a variable for the second time"),
        ("# nothing\n", "sets no variable; accepted are"),
        ("#" * 70_000, "more than 65536 bytes"),
    ],
)
def test_an_unusable_file_is_named_not_repeated(text, line, tmp_path):
    with pytest.raises(CredentialsError) as raised:
        read_credentials(written(tmp_path, text))
    assert line in str(raised.value)
    for hidden in (SECRET, ANOTHER, "\n"):
        assert hidden not in str(raised.value)


def test_missing_or_world_readable_files_are_refused(tmp_path):
    with pytest.raises(CredentialsError, match="No such file"):
        read_credentials(tmp_path / "none")
    with pytest.raises(CredentialsError, match="directory"):
        read_credentials(tmp_path)
    with pytest.raises(CredentialsError, match="can be read by everybody on this machine: `chmod o-r` it"):
        read_credentials(written(tmp_path, f"AWS_SECRET_ACCESS_KEY={SECRET}\n", mode=0o644))
    assert read_credentials(written(tmp_path, f"AWS_SECRET_ACCESS_KEY={SECRET}\n", mode=0o440))


TOKEN_PARAMETERS = (
    *(
        "token",
        "private_token",
        "refresh_token",
        "access_token",
        "client_secret",
        "secret",
        "key",
        "auth",
        "pwd",
    ),
    *("password", "api-key", "api_key", "apikey"),
)


def error_line(capsys) -> str:
    """The one line on stderr; no secret is printed."""
    output = capsys.readouterr()
    for secret in (SECRET, ANOTHER, TOKEN):
        assert secret not in output.out + output.err
    assert output.err.count("\n") == 1, output.err
    return output.err


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/run",
        f"s3://AKIA:{ANOTHER}@bucket",
        f"https://{ANOTHER}@host/list.txt",
        f"https://host/list.txt?X-Amz-Credential=a&X-Amz-Signature={ANOTHER}",
        f"https://account.blob.core.windows.net/c/list.txt?sv=1&sig={ANOTHER}",
        f"abfs://c@a.dfs.core.windows.net/x;AccountKey={SECRET}",
        f"s3://{ANOTHER}@bucket/run",
        f"gs://{ANOTHER}@bucket/run",
        *(f"https://host/list.txt?a=1&{name}={ANOTHER}" for name in TOKEN_PARAMETERS),
        *(f"https://host/{prefix}{TOKEN}" for prefix in ("hf_", "ghp_", "gho_")),
        f"https://host/x#Bearer {ANOTHER}",
    ],
)
@pytest.mark.parametrize("option", ["out", "set", "out=", "set="])
def test_a_secret_in_an_option_is_refused(url, option, tmp_path, capsys):
    word = f"source.url={url}" if option.startswith("set") else url
    words = [f"--{option}{word}"] if option.endswith("=") else [f"--{option}", word]
    out = [] if option.startswith("out") else ["--out", str(tmp_path / "run")]
    assert encode_latents.main([*words, *out, "--dry-run"]) == 2
    line = error_line(capsys)
    assert line.startswith(f"encode_latents: --{option.strip('=')}")
    assert "is a secret, and is not repeated here" in line
    assert encode_latents.main([*words, *out]) == 2
    error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [*command.VERBS, "nothing-that-there-is"])
def test_every_command_refuses_secrets(verb, capsys):
    secret = f"s3://AKIA:{SECRET}@bucket/x"
    for words in ([secret], ["--out", secret], ["--set", f"model={secret}"]):
        assert command.main([verb, *words]) == 2
        assert "is a secret" in error_line(capsys)


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_command_reports_a_wrong_option(verb, capsys):
    assert command.main([verb, "--set"]) == 2
    assert re.fullmatch(
        r"[a-z_]+: (Option '--set' requires an argument\.|Missing [^\n]*|No such option[^\n]*--set[^\n]*)\n",
        error_line(capsys),
    )


def test_a_secret_in_a_recipe_is_refused(capsys, monkeypatch, tmp_path):
    careless = recipe_named("mini").with_values([f"captions.url=s3://AKIA:{SECRET}@bucket/list.txt"])
    monkeypatch.setitem(RECIPES, "mini", lambda: careless)
    assert encode_latents.main(["--out", str(tmp_path / "run")]) == 2
    assert "captions.url: a user and a password before the @ of a URL is a secret" in error_line(capsys)


@pytest.mark.parametrize(
    "setting",
    [
        f"storage.credentials={SECRET}",
        f"storage.region={SECRET}",
        f"storage.endpoint={SECRET}",
        f"storage={SECRET}",
        f"storage.secret_key={SECRET}",
        f'storage={{"secret_key":"{SECRET}"}}',
        f"storage.endpoint=https://{ANOTHER}@host",
    ],
)
def test_a_secret_as_a_public_value_is_hidden(setting, capsys, tmp_path):
    assert encode_latents.main(["--out", str(tmp_path / "run"), "--set", setting]) == 2
    assert error_line(capsys).startswith("encode_latents: --set storage")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/shards/*.tar",
        "s3://bucket/a?.tar",
        "s3://bucket/a:b@c.txt",
        "http://127.0.0.1:9000/a@b/list.txt",
        "https://host:443",
        "abfs://container@account.dfs.core.windows.net/run",
        "/data/a@b:c",
        "https://host/list.txt?key_frames=3&monkey=1&page=2",
        "s3://bucket/hf_models/list.txt",
    ],
)
def test_urls_without_secrets_are_accepted(url):
    refuse_secrets_in_options(["--out", url, "--set", f"captions.url={url}", f"--set=model={url}", url])
    refuse_secrets(recipe_named("mini").with_values([f"captions.url={url}"]))


def test_a_store_without_its_package_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert encode_latents.main(["--out", "gs://bucket/run"]) == 2
    assert "--out gs://bucket/run" in error_line(capsys)
    assert encode_latents.main(["--out", "runs/x", "--set", "source.url=gs://bucket/shards"]) == 2
    assert "source.url gs://bucket/shards" in error_line(capsys)
    assert not Path("runs/x").exists()


def test_every_recipe_leaves_credentials_to_the_environment():
    for name in RECIPES:
        assert recipe_named(name).storage == StorageSettings()
    with pytest.raises(SettingsError, match=r"storage\.credentials: .*the absolute path of a file"):
        recipe_named("mini").with_values(["storage.credentials=here"])
