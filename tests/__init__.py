"""All tests keep what libraries and runs cache in a folder of their own, which goes with them."""

import atexit
import os
import shutil
import tempfile

_NAME = "ows_ds-tests-"
if _NAME not in os.environ.get("HF_HOME", ""):  # the tests' own processes have it from the first one
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix=_NAME)
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
