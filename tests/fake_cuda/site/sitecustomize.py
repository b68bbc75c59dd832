"""Gives every Python process of the environment the devices, if it has torch."""

import importlib.util
import os

if "FAKE_CUDA" in os.environ and importlib.util.find_spec("torch"):
    from tests.fake_cuda.install import install

    install(int(os.environ["FAKE_CUDA"]))
