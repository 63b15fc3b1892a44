"""Calls that are watched: time, memory and effects are bounded, and refusals are the product's own."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from searchspace import SpecError

# The promise is one second; the default run shares noisy machines, `make fuzz` holds it to the letter.
SECONDS, MIB = 1.0 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 4.0, 200
FORBIDDEN = ("exec", "import", "os.", "pty.", "shutil.", "socket.", "subprocess.", "tempfile.", "urllib.", "ctypes.")
STATM = Path("/proc/self/statm")
EFFECTS: list[str] = []
WATCHED = False


class TooSlowError(BaseException):
    """No `except Exception` holds it."""


def _audit(event, args):
    if not WATCHED:
        return
    forbidden = event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir")
    if event == "open":
        forbidden = set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if forbidden and sys._getframe(1).f_globals.get("__name__") != "typing":  # it evaluates the specs' annotations
        EFFECTS.append(f"{event} {args}")


def _interrupt(signum, frame):
    if WATCHED and "hypothesis" not in frame.f_code.co_filename:  # in its garbage collection hook it would be lost
        raise TooSlowError(frame.f_code.co_name)


sys.addaudithook(_audit)
signal.signal(signal.SIGPROF, _interrupt)  # for good: a late signal must not meet the default, which is to die


def bounded(call, *args):
    """What `call` gives, or None where it refuses; fails on any other error, on time, memory or an effect."""
    global WATCHED
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if STATM.exists():  # a cap besides the measurement: what runs away must stop before the machine does
        used = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MIB * 2**20, hard))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result, fault, WATCHED, start = None, "", True, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS, SECONDS / 10)
    try:
        result = call(*args)
    except SpecError as error:
        fault = "" if error.problem and str(error) else "a refusal without a reason"
    except (TooSlowError, MemoryError) as error:  # as a text: the trace can be too long to be shown
        fault = repr(error)
    finally:
        WATCHED = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        effects, EFFECTS[:] = EFFECTS[:], []
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / (2**10 if sys.platform == "linux" else 2**20)
    assert not effects, effects
    assert not fault, fault
    assert seconds < SECONDS, f"{seconds:.2f} s"
    assert grown < MIB, f"{grown:.0f} MiB more at the peak"
    return result
