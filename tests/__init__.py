"""Each test session keeps what libraries and runs cache in a folder of its own, which goes with it."""

import atexit
import os
import shutil
import tempfile

_NAME = f"ows_ds-tests-{os.environ.get('PYTEST_XDIST_WORKER', '')}-"
if _NAME not in os.environ.get("HF_HOME", ""):  # a session's own processes have it from the first one
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix=_NAME)
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
