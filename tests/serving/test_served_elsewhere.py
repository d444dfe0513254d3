"""The same JPEG, sent to a registered model through each way that MLflow has, gives the same probabilities."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow_server import free_port
from small_models import photo, train_network
from small_scores import probabilities_of, rows_of, score_settings

from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.serving import Predictor, score
from pipeline.serving.packaging import package
from pipeline.serving.scoring.model import find_model
from pipeline.serving.served import ServedModelError
from pipeline.tracking.registry import Registry
from pipeline.tracking.served_model import log_served_model

pytestmark = [pytest.mark.spark, pytest.mark.long]

# Not of the model's size, with the side up that EXIF says, in colour; and one that is upright.
PHOTOS = [photo(31, 44, orientation=6, seed=3), photo(60, 25, seed=4)]
# A process that has neither sparknorm nor its other requirements: this package is blocked, and so is the repository.
STRANGER = "import sys\nfor name in ('pipeline', 'models', 'tenacity', 'typer'): sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def registered(empty_store, tmp_path_factory):
    """A registered version, the store and the photos' probabilities by `Predictor`."""
    folder = tmp_path_factory.mktemp("registered")
    uri = f"sqlite:///{folder}/mlflow.db"
    Path(folder, "mlflow.db").write_bytes(empty_store.read_bytes())
    tracking = TrackingSettings(uri=uri)
    registry = Registry(tracking, None, "pets")
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("served", artifact_location=(folder / "artifacts").as_uri())
    run = client.create_run(experiment)
    trained = train_network(folder, resize="letterbox")
    result = trained.result.model_copy(update={"run_id": run.info.run_id})
    trained = type(trained)(trained.name, trained.network, trained.job, trained.manifest, trained.checkpoint, result)
    packaged, _ = package(trained, Settings(name="small"), "one", folder)
    registry.create()
    version = registry.add(log_served_model(packaged, 5, registered=registry.model), {"sparknorm.training": "one"})
    registry.set_alias("champion", version.number)
    local = registry.download(version.number, folder / "downloaded")
    return uri, local, packaged


@pytest.fixture(scope="module")
def expected(registered):
    predictor = Predictor.load(registered[1])
    images = np.stack([predictor.decode(data) for data in PHOTOS])
    return images, predictor.probabilities(images)


def environment(uri: str) -> dict[str, str]:
    # MLflow starts uvicorn by its name, which lies beside the Python that has MLflow.
    places = [str(Path(sys.executable).parent), str(Path(mlflow.__file__).parents[4] / "bin"), os.environ["PATH"]]
    ours = {"PATH": os.pathsep.join(places), "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **ours, "PYTHONPATH": "", "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu"}


def as_json() -> dict:
    rows = [[base64.encodebytes(data).decode()] for data in PHOTOS]
    return {"dataframe_split": {"columns": ["image"], "data": rows}}


def same(found, expected, exact=True):
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected.astype(np.float64), atol=0 if exact else 1e-6, rtol=0)


def test_load_model_where_sparknorm_is_not_installed(registered, expected, tmp_path):
    script = STRANGER + (
        "import mlflow, numpy, pandas, base64, json\n"
        "rows = [base64.b64decode(text) for text in json.load(open(sys.argv[1]))]\n"
        "model = mlflow.pyfunc.load_model('models:/pets@champion')\n"
        "numpy.save(sys.argv[2], model.predict(pandas.DataFrame({'image': rows})))\n"
    )
    (tmp_path / "rows.json").write_text(json.dumps([base64.b64encode(data).decode() for data in PHOTOS]))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "rows.json"), str(tmp_path / "y.npy")],
        env=environment(registered[0]), cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(np.load(tmp_path / "y.npy"), expected[1])


def test_load_model_beside_this_package(registered, expected):
    mlflow.set_tracking_uri(registered[0])
    model = mlflow.pyfunc.load_model("models:/pets@champion")
    same(model.predict(pd.DataFrame({"image": PHOTOS})), expected[1])
    pixels = pd.DataFrame({"pixels": [image.ravel() for image in expected[0]]})
    same(model.predict(pixels), expected[1])
    nested = pd.DataFrame({"pixels": [image.tolist() for image in expected[0]]})
    same(model.predict(nested), expected[1])
    both = pd.DataFrame({"image": [PHOTOS[0], None], "pixels": [None, expected[0][1].ravel()]})
    same(model.predict(both), expected[1])
    bad = pd.DataFrame({"image": [PHOTOS[0], PHOTOS[1][:-100]]})
    with pytest.raises(ValueError, match="row 1: the image cannot be used: truncated"):
        model.predict(bad)
    found = model.predict(bad, params={"bad_images": "nan"})
    same(found[0], expected[1][0], exact=False)
    assert np.isnan(found[1]).all()
    turned = expected[0][0].transpose(1, 2, 0)
    for frame, words in (
        (pd.DataFrame({"pixels": [[1, 2, 3]]}), "row 0: pixels are 3 x 12 x 10 whole numbers from 0 to 255, row-major"),
        (pd.DataFrame({"pixels": [[[1, 2], [3]]]}), "row 0: pixels are 3 x 12 x 10 whole numbers"),
        (pd.DataFrame({"pixels": [turned.tolist()]}), "flat or nested so; these are 12 x 10 x 3"),
        (pd.DataFrame({"image": [turned]}), "flat or nested so; these are 12 x 10 x 3"),
        (pd.DataFrame({"pixels": [expected[0][0].ravel() / 255]}), "these are float64 from 0.02"),
        (pd.DataFrame({"pixels": [expected[0][0].astype(int) - 256]}), "these are int64 from -2"),
        (pd.DataFrame({"image": ["photo.png"]}), "row 0: a text: 'image' is the content of an image file"),
        (pd.DataFrame({"photo": PHOTOS}), "the input has neither a column 'image' .* nor a column 'pixels'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.predict(frame)
    with pytest.raises(ValueError, match="bad_images is 'x': use error or nan"):
        model.predict(bad, params={"bad_images": "x"})


def test_the_model_says_what_it_is(registered):
    info = mlflow.models.get_model_info(str(registered[1]))
    inputs = [(spec.name, str(spec.type), spec.required) for spec in info.signature.inputs]
    assert inputs[0] == ("image", "DataType.binary", False)
    assert inputs[1][0] == "pixels"
    assert info.metadata["classes"] == ["class 0", "class 1", "class 2"]
    assert info.metadata["dataset"]["digest"].startswith("sha256:")
    assert info.metadata["folded_norms"] == 3
    requirements = (registered[1] / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {
        "mlflow", "torch", "numpy", "pillow", "pyarrow", "pydantic", "pandas",
    }  # fmt: skip
    assert not list(registered[1].rglob("*.pkl"))
    example = mlflow.pyfunc.load_model(str(registered[1])).input_example
    assert Predictor.load(registered[1]).decode(example["image"][0]).shape == (3, 12, 10)


@pytest.mark.slow
def test_the_command_line(registered, expected, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(as_json()))
    command = ["predict", "-m", "models:/pets@champion", "-i", "in.json", "-o", "out.json", "-t", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "models", *command, "--env-manager", "local"],
        env=environment(registered[0]), cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(json.loads((tmp_path / "out.json").read_text())["predictions"], expected[1], exact=False)


@pytest.mark.parametrize("column", ["image", "pixels"])
def test_a_spark_udf(spark, registered, expected, column):
    mlflow.set_tracking_uri(registered[0])
    udf = mlflow.pyfunc.spark_udf(spark, "models:/pets@champion", env_manager="local")
    if column == "image":
        table = spark.createDataFrame([(0, PHOTOS[0]), (1, PHOTOS[1])], "id long, image binary")
    else:
        rows = [(number, image.ravel().tolist()) for number, image in enumerate(expected[0])]
        table = spark.createDataFrame(rows, "id long, pixels array<int>")
    found = table.select("id", udf(column).alias("probabilities")).orderBy("id").collect()
    same([row.probabilities for row in found], expected[1], exact=False)


def with_model(settings, uri):
    return settings.model_copy(update={"score": settings.score.model_copy(update={"model": uri})})


def test_score(spark, registered, expected, tmp_path):
    """Our own job, by the same alias: files in the order of their names."""
    for number, data in enumerate(PHOTOS):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
    store = Path(registered[0].removeprefix("sqlite:///"))
    source = {"kind": "folder", "path": str(tmp_path / "in")}
    settings = score_settings(tmp_path / "out", "models:/pets@champion", store, source=source)
    result = score(spark, settings)
    rows = sorted(rows_of(result.scores), key=lambda row: row["origin"])
    same(probabilities_of(rows), expected[1], exact=False)
    assert (result.model.name, result.model.version) == ("pets", "1")
    assert {row["model"] for row in rows} == {"pets/1"}
    run_id = result.model.run_id
    model = find_model(with_model(settings, f"runs:/{run_id}/served"))
    assert (model.facts.run_id, model.facts.digest) == (run_id, result.model.digest)
    mlflow.MlflowClient(settings.tracking.uri).log_text(run_id, "", "model/MLmodel")  # as a training logs its network
    with pytest.raises(
        ServedModelError, match=rf"^score\.model: runs:/{run_id}/model holds no model of sparknorm.*/served"
    ):
        find_model(with_model(settings, f"runs:/{run_id}/model"))


@pytest.mark.slow
def test_over_http(registered, expected, tmp_path):
    port = free_port()
    command = ["serve", "-m", "models:/pets@champion", "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", *command, "-w", "1"],
            env=environment(registered[0]), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/ping", server)
        same(invoke(port, as_json()), expected[1], exact=False)
        records = {"dataframe_records": [{"pixels": image.tolist()} for image in expected[0]]}
        same(invoke(port, records), expected[1], exact=False)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def wait_until_answers(address: str, server: subprocess.Popen) -> None:
    give_up_at = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.2)


def invoke(port: int, body: dict) -> list[list[float]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]
