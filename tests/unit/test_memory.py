"""What a network on a CPU gets from its C library instead of from the kernel, and what the kernel gets after it."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is not glibc's")

PROCESS = """
import json, resource, sys, threading
from contextlib import nullcontext
import numpy as np
from pistoseg.memory import give_back, keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * resource.getpagesize()

def steps(count):
    for _ in range(count):
        np.empty(50_000_000, np.uint8).fill(1)
        np.empty(90_000_000, np.uint8).fill(1)

def work():
    before = resident()
    with keep_freed_memory() if sys.argv[1] == "keep" else nullcontext():
        steps(1)
        first = faults()
        steps(5)
        found["faults"] = faults() - first
        with keep_freed_memory():
            pass
        steps(5)
        found["faults_after_another"] = faults() - first
        found["held"] = resident() - before
        give_back()
        found["held_after_give_back"] = resident() - before
        steps(1)
    found["left"] = resident() - before

found = {}
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(found))
"""


def process(argument):
    command = [sys.executable, "-c", PROCESS, argument]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_by_a_thread_as_long_as_a_block_is_open():
    kept, given_back = process("keep"), process("give back")
    assert kept["faults"] < given_back["faults"] / 4
    assert kept["faults_after_another"] < given_back["faults"] / 4
    assert kept["held"] > 80e6
    assert kept["held_after_give_back"] < 20e6
    assert kept["left"] < 20e6
