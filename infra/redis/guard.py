"""Sees to it that a process does not outlive the one that started it."""

from __future__ import annotations

import subprocess


class Guard:
    """Kills process `pid` when the process that made this guard is gone, however that ended.

    A shell waits at a pipe that closes by itself then. Not Linux's PR_SET_PDEATHSIG: it would also end the server with
    the *thread* that started it, and needs code between fork and exec. Dismiss the guard when the process is reaped:
    from then on its number may become another's.
    """

    def __init__(self, pid: int) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -KILL "$0"', str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for who started us; the guard acts when that one is gone
        )

    def dismiss(self) -> None:
        """Ends the watch; the process lives on."""
        self._shell.kill()
        self._shell.communicate()
