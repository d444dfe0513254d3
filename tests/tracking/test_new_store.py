"""How a new SQLite store comes to be: once, whole, and by one process at a time."""

import signal
import subprocess
import sys

from pipeline.config.study import TrackingSettings
from pipeline.tracking.tracker import Tracker

NEW_STORE = """
import sys, time
from pipeline.config.study import TrackingSettings
from pipeline.tracking import Tracker
settings = TrackingSettings(uri=f"sqlite:///{sys.argv[1]}/mlflow.db", artifacts=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(Tracker(settings).experiment_id)
"""


def test_two_processes_that_open_a_new_store_at_once_both_have_it(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", NEW_STORE, str(tmp_path)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""


KILLED_MAKER = """
import glob, os, signal, sqlite3, sys, threading, time

def tables():
    \"\"\"The most tables of any database in the folder, also of one with a name of its own.\"\"\"
    counts = [0]
    for path in glob.glob(sys.argv[1] + "/*.db") + glob.glob(sys.argv[1] + "/.*.db.new"):
        try:
            with sqlite3.connect(path, timeout=0) as database:
                counts += database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
        except sqlite3.Error:  # it is written now
            pass
    return max(counts)

def kill_while_tables_are_made():
    while tables() < 8:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill_while_tables_are_made, daemon=True).start()
from pipeline.config.study import TrackingSettings
from pipeline.tracking import Tracker
Tracker(TrackingSettings(uri=f"sqlite:///{sys.argv[1]}/mlflow.db", artifacts=sys.argv[1]))
time.sleep(60)
"""


def test_a_process_that_is_killed_while_it_makes_a_store_leaves_none_that_is_half_made(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_MAKER, str(tmp_path)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    opened = Tracker(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path)))
    assert opened.experiment_id
    assert {path.name for path in tmp_path.glob(".*")} == {".mlflow.db.lock"}


def test_options_of_a_store_are_no_part_of_its_file(tmp_path):
    """One gives them where the database is found locked."""
    uri = f"sqlite:///{tmp_path}/new/mlflow.db?timeout=60"
    assert Tracker(TrackingSettings(uri=uri, artifacts=str(tmp_path))).experiment_id
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".mlflow.db.lock", "mlflow.db"]
    with subprocess.Popen([sys.executable, "-c", SEE_EXPERIMENTS, uri], stdout=subprocess.PIPE, text=True) as process:
        assert "sparknorm" in process.communicate(timeout=120)[0]


SEE_EXPERIMENTS = """
import sys, mlflow
print([each.name for each in mlflow.MlflowClient(sys.argv[1]).search_experiments()])
"""
