import logging
import re

import pytest

from pipeline.config import Settings, SettingsError, load_settings
from pipeline.config.effective import effective_yaml
from pipeline.config.secrets import MASK, SPARK_REDACTION, MaskingFormatter, is_secret, mask, mask_logs, masked

S = "hunter2/x"  # with a slash, as keys of S3 have


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg2://me:hunter2@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("postgresql://me:hun/ter2@host/db", "postgresql://***@host/db"),
        ("http://me:hunt@er2@host/db?x=1", "http://***@host/db?x=1"),
        ("https://hunter2@host/x and http://a:hunter2@b", "https://***@host/x and http://***@b"),
        ("s3a://AKIA:hunter2@bucket/x", "s3a://***@bucket/x"),
        ("simplecache::ftp://me:hunter2@host/x", "simplecache::ftp://***@host/x"),
        ("https://a.blob.core.windows.net/c?sv=2020&sig=hunter2%2F&se=1", "https://a.blob.core.windows.net/c?sv=2020&sig=***&se=1"),
        ("https://b/x?X-Amz-Credential=hunter2%2Fx&X-Amz-Signature=hunter2&y=5", "https://b/x?X-Amz-Credential=***&X-Amz-Signature=***&y=5"),
        ("https://maps/x?key=hunter2&b=1", "https://maps/x?key=***&b=1"),
        ("AccountName=a;AccountKey=hunter2==;EndpointSuffix=x", "AccountName=a;AccountKey=***;EndpointSuffix=x"),
        ("sc://host:15002/;token=hunter2;user_id=me", "sc://host:15002/;token=***;user_id=me"),
        ("jdbc:postgresql://host/db?user=a&password=hunter2", "jdbc:postgresql://host/db?user=a&password=***"),
        ('{"spark.hadoop.fs.s3a.secret.key": "hunter2", "b": 1}', '{"spark.hadoop.fs.s3a.secret.key": "***", "b": 1}'),
        ("{'key': 'hunter2', 'a': 'y'}", "{'key': '***', 'a': 'y'}"),
        (r'{\"password\": \"hunter2\", \"b\": 1}', r'{\"password\": \"***\", \"b\": 1}'),
        ("f(password='it is hunter2', x=1)", "f(password='***', x=1)"),
        ('password="hunter2 is not closed', "password=*** is not closed"),
        ("  spark.hadoop.fs.s3a.access.key: hunter2", "  spark.hadoop.fs.s3a.access.key: ***"),
        ("Authorization: Bearer hunter2.x", "Authorization: ***"),
        ("unexpected token: password=hunter2", "unexpected token: password=***"),
        (f"aws_secret_access_key={S}+=", "aws_secret_access_key=***"),
    ],
)  # fmt: skip
def test_secrets_in_texts(text, shown):
    assert mask(text) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///runs/mlflow.db", "http://127.0.0.1:5000/api", "spark://h1:7077,h2:7077", "sftp://me@host/x",
        "abfss://container@account.dfs.core.windows.net/x", "KeyError: 'the seventh image'", "write to me@example.org",
        "botocore.exceptions.NoCredentialsError: Unable to locate credentials", "Unexpected token: }",
        "min(failures, key=lambda failure: failure.time)", "monkey=5", "keyboard=us", "workers.count is 4, key: value",
        "note: https://host/x mails me@example.org", "tracking.uri http://127.0.0.1:5000 cannot be used: refused",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays_readable(text):
    assert mask(text) == text


@pytest.mark.parametrize(
    "name",
    ["spark.hadoop.fs.s3a.secret.key", "spark.hadoop.fs.s3a.access.key", "spark.hadoop.fs.s3a.session.token",
     "spark.hadoop.fs.azure.account.key.me.dfs.core.windows.net", "spark.hadoop.fs.azure.sas.box.me",
     "spark.hadoop.fs.azure.account.oauth2.client.secret", "spark.ssl.keyPassword", "spark.authenticate.secret",
     "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "DATABRICKS_TOKEN", "key", "secretKey", "sig", "Signature"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret(name)
    assert masked({name: S, "b": [S]}) == {name: MASK, "b": [S]}
    assert masked({"a": {name: {"x": [S]}}}) == {"a": {name: {"x": [MASK]}}}
    assert re.search(SPARK_REDACTION, name)


def test_numbers_and_names_of_settings_are_no_secrets():
    assert masked({"key": 3, "token": None, "secret": True, "sig": 0.5}) == {
        "key": 3, "token": None, "secret": True, "sig": 0.5,
    }  # fmt: skip
    assert masked(Settings(name="x").model_dump()) == Settings(name="x").model_dump()


def test_what_spark_hides_of_its_properties():
    for name in ("spark.executor.memory", "spark.sql.shuffle.partitions", "spark.master", "spark://host:7077"):
        assert not re.search(SPARK_REDACTION, name)
    assert re.search(SPARK_REDACTION, "ftp://me:hunter2@host")  # Spark looks at values too
    assert not re.search(r"\(\?P|\(\?<[a-z]", SPARK_REDACTION)  # Java reads it as Python does


def test_tracebacks_in_logs_are_masked(capsys):
    handler = logging.StreamHandler()
    log = logging.getLogger("sparknorm-test-secrets")
    log.addHandler(handler)
    log.propagate = False
    try:
        mask_logs(log.name)
        mask_logs(log.name)  # once is enough
        assert isinstance(handler.formatter, MaskingFormatter)
        assert not isinstance(handler.formatter._inner, MaskingFormatter)
        try:
            raise OSError("cannot open s3://me:hunter2@bucket")
        except OSError:
            log.exception("at %s", "postgresql://me:hunter2@host")
    finally:
        log.removeHandler(handler)
        logging.lastResort.setFormatter(None)
    written = capsys.readouterr().err
    assert "at postgresql://***@host" in written
    assert "OSError: cannot open s3://***@bucket" in written
    assert "hunter2" not in written


SECRET_SETTINGS = (
    "tracking.uri=postgresql://me:hunter2@host/db", "spark.conf.spark.hadoop.fs.s3a.secret.key=hunter2",
    "output=ftp://me:hunter2@host/runs", "dataset.path=https://host/x?sig=hunter2",
)  # fmt: skip


def test_printed_settings_are_masked_and_not_read_back(tmp_path):
    settings = load_settings("conf/quickstart.yaml", SECRET_SETTINGS)
    printed = effective_yaml(settings)
    assert "hunter2" not in printed + repr(settings)
    assert "uri: postgresql://***@host/db" in printed
    assert "spark.hadoop.fs.s3a.secret.key: '***'" in printed
    assert "*** stands for a secret: write it in" in " ".join(printed.split()).replace("# ", "")
    assert MASK not in effective_yaml(Settings(name="x"))
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SettingsError, match=r"printed.yaml: output has \*\*\*, which stands where a secret was masked"):
        load_settings(tmp_path / "printed.yaml")
    real = [override.replace(MASK, "me:hunter2") for override in SECRET_SETTINGS]
    assert load_settings(tmp_path / "printed.yaml", real) == settings
    for override, name in (
        ("tracking.uri=postgresql://***@host", "tracking.uri"),
        ("spark.conf.spark.x='***'", "spark.conf.spark.x"),
        ("spark.py_files=[a.zip, '***/b.zip']", "spark.py_files"),
    ):
        with pytest.raises(SettingsError, match=rf"{name} has \*\*\*"):
            load_settings("conf/quickstart.yaml", [override])


@pytest.mark.parametrize(
    "override",
    ["spark.conf.spark.hadoop.fs.s3a.secret.key=[hunter2]", "spark.conf.spark.hadoop.fs.s3a.secret.key=[hunter2",
     "tracking.uri=[postgresql://me:hunter2@host]", "tracking.uri={postgresql://me:hunter2@host: 1",
     "tracking.url=hunter2", "tracking.uri.x=http://hunter2@host", "password=hunter2", "spark.conf=secret=hunter2",
     "compare.grid={a.token: hunter2}", "tracking.uri.password=hunter2"],
)  # fmt: skip
def test_errors_show_no_secret(override):
    with pytest.raises(SettingsError) as error:
        load_settings("conf/quickstart.yaml", [override])
    assert "hunter2" not in str(error.value)


def test_a_file_that_is_no_yaml_shows_no_secret(tmp_path):
    for text in (
        "tracking:\n  uri: postgresql://me:hunter2@host\n ]",
        "spark:\n  conf:\n    x.secret.key: hunter2 ] : [",
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(SettingsError, match="is not YAML") as error:
            load_settings(tmp_path / "broken.yaml")
        assert "hunter2" not in str(error.value)
        assert "\n" not in str(error.value)
