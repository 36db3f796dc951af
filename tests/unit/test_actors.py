import signal
import subprocess
import sys

from processes import STUCK_S

HANGING = """
import ctypes
from pistoseg.actors import exit_in_time
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.pause, None, None)  # after Python has ended, as in the destructor of a core worker of Ray
{call}
"""


def test_a_process_whose_exit_hangs_is_ended():
    ended = subprocess.run([sys.executable, "-c", HANGING.format(call="exit_in_time(1)")], timeout=STUCK_S)
    assert ended.returncode == -signal.SIGALRM


def test_an_exit_in_time_is_left_alone():
    code = "from pistoseg.actors import exit_in_time; exit_in_time(); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=STUCK_S).returncode == 3
