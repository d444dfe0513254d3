"""The MLflow UI on what a comparison left, as a person sees it: its pages, and pictures of them.

`make ui-test` looks at the store that `make run` left in `runs/` (SPARKNORM_UI_RUNS); without it, a small comparison
is made first. The pictures are left in `screenshots` in the same folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import pytest
from browser import Page, chromium
from mlflow_server import MlflowServer
from selenium import webdriver
from selenium.webdriver.common.by import By

from pipeline.config import load_settings
from pipeline.study import compare

pytestmark = [pytest.mark.ui, pytest.mark.long]

# What MLflow remembers of a person who trains models, has closed its assistant, and points at no chart.
MEMORY = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
HIDDEN = ".modebar-container, *:has(> .assistant-fab-label) { display: none !important }"
PREPARE = f"""
try {{ for (const [key, value] of Object.entries({json.dumps(MEMORY)})) localStorage.setItem(key, value) }} catch {{}}
addEventListener('DOMContentLoaded', () => {{
  if (!location.protocol.startsWith('http')) return
  document.head.append(Object.assign(document.createElement('style'), {{ textContent: {json.dumps(HIDDEN)} }}))
}})
"""


class Study:
    """The newest comparison of a store: its parent run and the runs of its arms, newest first."""

    def __init__(self, store: str):
        client = mlflow.MlflowClient(store)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        parents = client.search_runs(experiments, "tags.kind = 'comparison'", order_by=["start_time DESC"])
        if not parents:
            pytest.fail(f"{store} has no comparison: `make run` makes one")
        self.parent = parents[0]
        self.experiment = self.parent.info.experiment_id
        of_parent = f"tags.mlflow.parentRunId = '{self.parent.info.run_id}' AND tags.kind = 'arm'"
        self.children = list(client.search_runs([self.experiment], of_parent))
        tags = self.children[0].data.tags
        self.arm_tag = "arm" if "arm" in tags else "norm"  # `norm` before version 0.5
        self.arms = sorted({child.data.tags[self.arm_tag] for child in self.children})

    def differing(self) -> list[str]:
        """The params that are not the same for all its runs."""
        params = [child.data.params for child in self.children]
        return sorted(key for key in params[0] if len({values.get(key) for values in params}) > 1)

    def address(self, server: str, *, view: str = "", run_id: str = "", only: str = "") -> str:
        query = "&".join(part for part in (view, f"searchFilter={quote(only)}" if only else "") if part)
        return f"{server}/#/experiments/{self.experiment}/runs{'/' + run_id if run_id else ''}?{query}"


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The folder in which a comparison has left its report and its store."""
    chosen = os.environ.get("SPARKNORM_UI_RUNS")
    if chosen is None:
        folder = tmp_path_factory.mktemp("runs")
        small_study(request.getfixturevalue("spark"), request.getfixturevalue("dataset"), folder)
        return folder
    if not Path(chosen, "mlflow.db").exists():
        pytest.fail(f"SPARKNORM_UI_RUNS: {chosen} has no mlflow.db: `make run` makes one")
    return Path(chosen).absolute()


def small_study(spark, dataset, folder):
    """Of two arms with two seeds, each with the better of two learning rates."""
    settings = {
        "name": "small",
        "output": str(folder),
        "dataset": {"path": dataset},
        "model": {"depth": 3, "width": 4, "norm": ["none", "batch"]},
        "train": {"epochs": 2, "rank_batch_size": 32, "lanes": 4, "learning_rate": [0.02, 0.1]},
        "workers": {"count": 1},
        "compare": {"seeds": [0, 1], "search_budget": 1.5},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": f"{folder}/mlartifacts"},
    }
    config = folder / "small.yaml"
    config.write_text(json.dumps(settings))  # which is YAML too
    compare(spark, load_settings(str(config)))


@pytest.fixture(scope="module")
def screenshots(runs):
    return runs / "screenshots"


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory):
    """MLflow on a copy of the store: to look at it must not change it."""
    folder = tmp_path_factory.mktemp("ui")
    with (
        closing(sqlite3.connect(f"file:{runs / 'mlflow.db'}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(folder / "store.db")) as copy,
    ):
        source.backup(copy)
    server = MlflowServer(folder)
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def study(server):
    return Study(server)


@pytest.fixture(scope="module")
def page():
    with chromium() as page:
        page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PREPARE})
        yield page


@pytest.fixture(scope="module")
def columns(server, study, page):
    """The table's columns are chosen and the parent is unfolded, as MLflow remembers it in the browser."""
    page.open(study.address(server, view="compareRunsMode=CHART"))
    page.until_shown(study.parent.info.run_name)
    remember(
        page,
        runsExpanded={study.parent.info.run_id: True},
        selectedColumns=[
            *(f"params.`{key}`" for key in study.differing()[:4]),
            *(f"metrics.`{key}`" for key in ("best_accuracy", "final_accuracy")),
        ],
    )


def recall(page: Page) -> tuple[str, dict[str, Any]]:
    """What MLflow keeps of its page of runs in the browser: where, and what."""
    find = "return Object.entries(localStorage).find(entry => entry[0].includes('ExperimentPage'))"
    key, state = page.until("the state of MLflow's page of runs", lambda: page.driver.execute_script(find))
    return key, json.loads(state)


def remember(page: Page, **changes: Any) -> None:
    """Change that; it counts from the next time the page is opened."""
    key, state = recall(page)
    page.driver.execute_script("localStorage[arguments[0]] = arguments[1]", key, json.dumps({**state, **changes}))


def test_the_table_shows_the_parent_and_its_arms(server, study, page, columns, screenshots):
    page.open(study.address(server, only="tags.kind != 'search'"))
    names = [run.info.run_name for run in (study.parent, *study.children)]
    # The table shows the shortest text of a number as JavaScript does: 1.0 is 1, and of 0.99667 four digits, rounded,
    # are not in it.
    shown = [repr(run.data.metrics["best_accuracy"]).removesuffix(".0")[:6] for run in study.children]
    page.until_shown(*names, "best_accuracy", *shown)
    page.until_still()
    edge = page.driver.find_element(By.CSS_SELECTOR, ".ag-header-cell[col-id*='Run Name'] .ag-header-cell-resize")
    # Long names are seen whole, and the mouse is out of the way.
    webdriver.ActionChains(page.driver).drag_and_drop_by_offset(edge, 130, 0).move_by_offset(0, 400).perform()
    page.until_still()
    page.take(screenshots / "mlflow_runs.png")


def test_a_chart_shows_the_accuracy_of_each_arm(server, study, page, columns, screenshots):
    tag = {"mode": "tag", "groupByData": study.arm_tag}
    remember(page, groupBy={"aggregateFunction": "average", "groupByKeys": [tag]})
    address = study.address(server, view="compareRunsMode=CHART", only="tags.kind = 'arm'")
    page.open(address)
    page.until("charts of the test split", lambda: "test" in {section["name"] for section in sections(page)})
    lowest = min(child.data.metrics["final_accuracy"] for child in study.children)
    zoomed = {"range": {"yMin": lowest - 0.1, "yMax": 1.0}}  # MLflow begins at 0, where arms look the same
    charts = [
        {**chart, **zoomed} if chart.get("metricKey") == "test/accuracy" else chart
        for chart in recall(page)[1]["compareRunCharts"]
    ]
    wide = [{**section, "columns": 2, "cardHeight": 560} for section in sections(page)]
    remember(page, compareRunSections=wide, compareRunCharts=charts)
    try:
        page.open(address)
        search = page.until("the search for charts", lambda: field(page, "Search metric charts"))
        search.send_keys("test/")
        for arm in study.arms:
            page.until_shown(f"Group: {arm}", f"{arm} (test/accuracy)")
        lines = "return document.querySelectorAll('.scatterlayer .js-line').length"
        page.until("a line for each arm", lambda: page.driver.execute_script(lines) >= len(study.arms))
        page.driver.execute_script("document.activeElement.blur()")
        page.until_still()
        page.take(screenshots / "mlflow_chart.png")
    finally:
        remember(page, groupBy=None)


def sections(page: Page) -> list[dict[str, Any]]:
    return recall(page)[1].get("compareRunSections") or []


def field(page: Page, placeholder: str) -> Any:
    found = page.driver.find_elements(By.CSS_SELECTOR, f"input[placeholder='{placeholder}']")
    return found[0] if found else None


def test_the_compare_view_sets_an_arm_beside_the_other(server, study, page, screenshots):
    """What a person sees who ticks one run of each arm in the table and chooses Compare."""
    chosen = [next(run for run in study.children if run.data.tags[study.arm_tag] == arm) for arm in study.arms]
    ids, experiments = json.dumps([run.info.run_id for run in chosen]), json.dumps([study.experiment])
    page.open(f"{server}/#/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}")
    page.until_shown(f"Comparing {len(chosen)} Runs", *(run.info.run_name for run in chosen))
    page.until_shown(*study.differing()[:4], "best_accuracy")
    page.until_still()
    page.take(screenshots / "mlflow_compare.png")


def test_the_parents_page_names_its_children(server, study, page, screenshots):
    page.open(study.address(server, run_id=study.parent.info.run_id))
    page.until_shown("Finished", "Child runs", *(child.info.run_name for child in study.children), "comparison")
    page.until_still()
    page.take(screenshots / "mlflow_parent.png")


def test_the_report_is_shown_among_the_parents_artifacts(server, study, page, screenshots):
    run_id = f"{study.parent.info.run_id}/artifacts/report.html"
    page.open(study.address(server, run_id=run_id))
    frame = page.until("the report", lambda: page.driver.find_elements(By.TAG_NAME, "iframe"))[0]
    page.driver.switch_to.frame(frame)
    verdict(page)
    page.driver.switch_to.default_content()
    page.until_still()
    page.take(screenshots / "mlflow_report.png")


def verdict(page: Page) -> str:
    """The text of the report's verdict, and of the tables' arms."""
    shown = "return [...document.querySelectorAll('.verdict')].map(one => one.innerText).join()"
    text = page.until("the verdict", lambda: page.driver.execute_script(shown))
    page.until_shown("Arms", "best accuracy")
    return text


def test_the_page_of_a_child_draws_its_metrics(server, study, page, screenshots):
    child = study.children[0]
    page.open(study.address(server, run_id=f"{child.info.run_id}/model-metrics"))
    page.until_shown(child.info.run_name)
    page.until("the search for charts", lambda: field(page, "Search metric charts")).send_keys(
        "^(test/(accuracy|loss)$|train/)"
    )
    page.until_shown(f"{child.info.run_name} (test/accuracy)", f"{child.info.run_name} (train/loss)")
    page.driver.execute_script("document.activeElement.blur()")
    page.until_still()
    page.take(screenshots / "mlflow_child.png")


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"),
    [("light", "light", 1400, 900), ("dark", "dark", 1400, 900), ("phone", "light", 360, 740)],
)
def test_the_report_by_itself(runs, screenshots, page, name, scheme, width, height):
    report = runs / "report.html"
    page.colors(scheme)
    try:
        page.open(report.as_uri(), width=width, height=height)
        assert verdict(page)
        wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.driver.execute_script(wider) == 0  # nothing has to be moved sideways to be read
        ground = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in ground.strip("rgba()").split(",")[:3]) > 3 * 127
        assert light == (scheme == "light") or "0, 0, 0, 0" in ground
        page.until_still()
        page.take(screenshots / f"report_{name}.png")
        page.take(screenshots / f"report_{name}_whole.png", whole=True)
    finally:
        page.colors("light")


def test_the_report_on_paper(runs, screenshots, page):
    """Dark on white, also for a reader who prefers dark, nothing cut off at the right, and few pages."""
    page.colors("dark", media="print")
    try:
        page.open((runs / "report.html").as_uri(), width=794, height=1123)  # A4 at 96 dots per inch
        page.until("the verdict", lambda: page.driver.find_elements(By.CSS_SELECTOR, ".verdict"))
        wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.driver.execute_script(wider) == 0
        ground = page.driver.execute_script("return getComputedStyle(document.documentElement).colorScheme")
        assert "dark" not in ground
        page.until_still()
        page.take(screenshots / "report_paper_whole.png", whole=True)
        paper = base64.b64decode(
            page.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
        )
        (screenshots / "report.pdf").write_bytes(paper)
        assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 12
    finally:
        page.colors("light")
