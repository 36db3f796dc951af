"""What a training gets back from its C library instead of from the kernel."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
import numpy as np
from pistoseg.training.memory import keep_freed_memory

def steps(count):
    for _ in range(count):
        np.empty(50_000_000, np.uint8).fill(1)
        np.empty(90_000_000, np.uint8).fill(1)

def work():
    steps(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def page_faults(argument):
    command = [sys.executable, "-c", FAULTS, argument]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is not glibc's")
def test_freed_memory_is_used_again_by_a_thread():
    assert page_faults("keep") < page_faults("give back") / 4
