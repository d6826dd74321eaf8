"""The last step into a service's restrictions: system calls and memory, which are of the process
itself.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys

import pyseccomp

PR_SET_MDWE = 65
PR_MDWE_REFUSE_EXEC_GAIN = 1

os.umask(0o077)
with open("/opt/relay/enter.json", encoding="ascii") as file:
    allowed = json.load(file)

if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    sys.stderr.write(f"MemoryDenyWriteExecute not exercised: {os.strerror(ctypes.get_errno())}\n")
seccomp = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
for name in allowed:
    try:
        seccomp.add_rule(pyseccomp.ALLOW, name)
    except (OSError, RuntimeError, ValueError):
        continue  # another architecture's
seccomp.load()
os.execv(sys.executable, [sys.executable, "-m", "relay", "serve", "-c", "/etc/relay/relay.yaml"])
