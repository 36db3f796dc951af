"""What all tests share: an environment without servers, quiet tracking, and where real images are."""

import atexit
import os
import re
import shutil
from pathlib import Path

import pytest

from pistoseg.errors import PistoSegError
from pistoseg.local_cluster import weed

# Tests run more threads than there are cores; one that waits must not keep a core from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray's workers are nice and would get next to nothing beside the tests that need no Ray.
os.environ.setdefault("RAY_worker_niceness", "0")
# Tests talk to no server that the shell happens to name, and get no settings of its user.
_FOREIGN = re.compile(r"(AWS|MLFLOW|PISTOSEG(?!_TEST_DATA$))_.*|RAY_(API_SERVER_)?ADDRESS|\w+_(proxy|PROXY)")
for _name in filter(_FOREIGN.fullmatch, list(os.environ)):
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # without keys, AWS's SDK asks the machine's own service for them


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """No test's networks depend on what ran before it; this comes before the fixtures, also those of modules."""
    import torch  # not before the variables above are set

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_alarm():
    """Tests that call a worker's code in their own process must not be killed as that ends."""
    yield
    from pistoseg import actors

    atexit.unregister(actors._set_alarm)


@pytest.fixture(scope="session")
def put_database(tmp_path_factory):
    """A function that puts an empty database of MLflow into a folder: each that MLflow makes takes seconds."""
    from mlflow.tracking import MlflowClient

    made = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{made}")

    def put(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, folder)

    return put


@pytest.fixture(scope="session")
def seaweedfs():
    """A skip where SeaweedFS, the S3 server of the local cluster, is not installed."""
    try:
        weed()
    except PistoSegError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_data():
    """Folder with the published data sets, or a skip: it is in no repository."""
    folder = Path(os.environ.get("PISTOSEG_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set PISTOSEG_TEST_DATA to the folder of the data sets")
    return folder
