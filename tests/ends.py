"""What ranks may do, for test_ranks.py: started without torch, which takes long to import."""

import os
import signal
import sys
import time

from finetune import signals
from finetune.ranks import End


def done(pipe):
    pass


def fails(pipe):
    pipe.send(End(0, "failed", said="no images", error="no images"))
    sys.exit(1)


def stops_alone(pipe):
    pipe.send(End(0, "stopped", signal.SIGUSR1))
    sys.exit(138)


def is_killed(pipe):
    os.kill(os.getpid(), signal.SIGKILL)


def stops_when_told(pipe):
    """A rank that waits for the others; its signals were blocked until here."""
    with signals.handled(signals.at_once):
        try:
            signals.unblock()
            time.sleep(60)
        except signals.Interrupted as stop:
            pipe.send(End(1, "stopped", stop.signum))
    sys.exit(138)


def is_deaf(pipe):
    signals.ignore()
    signals.unblock()
    time.sleep(60)
