"""A child that does what it is told: ``python -m tests.runtime.talking_child FD``."""

import os
import signal
import sys
import time

from qdm_deploy.child_process import Parent, frame
from qdm_deploy.errors import EngineError

parent = Parent(sys.argv[-1])
while True:
    header, _ = parent.receive()
    match header["kind"]:
        case "echo":
            parent.tell("echo", said=header["said"], pid=os.getpid(), path=sys.path)
        case "print":
            print(header["said"], flush=True)
        case "fail":
            parent.tell_error(EngineError(header["said"]))
        case "work":
            parent.tell("working")
            time.sleep(600)
        case "leave":
            sys.exit(3)
        case "die in a word":
            parent.send(frame("echo", said="all of it") + frame("echo", said="half of it")[:-5])
            os.kill(os.getpid(), signal.SIGKILL)
