"""SIGTERM and SIGUSR1: a cluster takes the machine back, and says so shortly before.

Outside training they end the run at once, and what is finished rests in the store. While a stage trains they are noted
alone, and the callback of :mod:`dive.trainer.preemption` saves a checkpoint after the running optimiser step.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_CODE = 75
"""``EX_TEMPFAIL`` of sysexits.h: nothing is wrong, run the same command again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 15.0
"""Seconds that Python has to notice a signal. SLURM's KillWait is 30 by default, then comes SIGKILL."""


class Preempted(BaseException):
    """The run was asked to end; like KeyboardInterrupt no Exception, so that nothing on the way up swallows it."""


class _State:
    """Of this process: signals are its own."""

    name = ""
    """Of the first signal that came."""
    postponed = False
    listening = False


def listen() -> None:
    """Take the signals from here on; call it in the main thread, as often as you like."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _note)
    if _State.listening:
        return
    _State.listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_what_hangs, args=(reading,), daemon=True, name="preemption").start()
    if started_by_lightning():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="parent").start()


def asked() -> bool:
    """Whether a signal has come."""
    return bool(_State.name)


def postpone() -> None:
    """From now on a signal is noted alone."""
    _State.postponed = True


def heed() -> None:
    """From now on a signal ends the run at once, and one that was noted does so now.

    Raises:
        Preempted: a signal has come meanwhile.
    """
    _State.postponed = False
    if asked():
        raise Preempted(_State.name)


def started_by_lightning() -> bool:
    """Whether this process is one that Lightning started beside the first; torchrun and SLURM set a global rank."""
    ranks = os.environ
    return "RANK" not in ranks and "SLURM_PROCID" not in ranks and int(ranks.get("LOCAL_RANK", "0")) > 0


def let_the_first_speak() -> None:
    """Wait, in a process that Lightning started, for the first one to end: most errors stop all of them at once.

    This process then ends in silence. Ending before the first one would get that killed while it is still on its way out.
    """
    if started_by_lightning():
        time.sleep(2 * PATIENCE)


def exit_code() -> int:
    """Of a run that was asked to end: Lightning kills the first process with SIGKILL if another one ends with more than 0."""
    return 0 if started_by_lightning() else EXIT_CODE


def message() -> str:
    """What the user is told."""
    return (
        f"stopped by {_State.name or 'a signal'} (exit code {EXIT_CODE}). "
        "The same command goes on from the last finished stage, layer or checkpoint."
    )


def _note(number: int, frame: FrameType | None) -> None:
    first = not asked()
    _State.name = _State.name or signal.Signals(number).name
    if first and not _State.postponed:
        raise Preempted(_State.name)


def _end_what_hangs(reading: int) -> None:
    """Handlers run between Python's instructions, so never in a collective call that waits for a process that has gone."""
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:
            continue
        deadline = time.monotonic() + PATIENCE
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not asked():
            _State.name = signal.Signals(number).name
            if not started_by_lightning():
                print(f"\n{message()}", file=sys.stderr, flush=True)
            os._exit(exit_code())


def _end_with(parent: int) -> None:
    """A process of a run whose first process was killed would wait for it for hours, and hold its device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(EXIT_CODE)
