"""Run generated Python against its tests, in a process that can do little else.

    run_python("def double(x): return 2 * x", "assert double(2) == 4").status     "passed"
    python -m scores.sandbox                                                      which guards work on this machine

    run_python -> launcher (namespaces) -> supervisor (clock) -> worker (limits, no privileges): the program

Guards that work everywhere: a limit on wall-clock time; per process, limits on address space, CPU time, file size and
the number of open files; an empty environment; an empty working directory that is removed afterwards; no descriptors
except /dev/null, where the output goes too; only the standard library. A program that exits before the end of its
tests, even with status 0, has not passed.

Guards that work if Linux lets this process create namespaces (`Outcome.guards`):
    network     no interface at all, not even loopback
    processes   its own process namespace: it sees no other process, and all its processes die with the run
    files       the file system is read-only, except a working directory with limited bytes and files; home directories,
                /tmp, /run, /proc and /sys are empty

Started by root, the program runs as the user 65534 (nobody), because root is exempt from the limit on processes and may
write anywhere. Started by another user, without a user namespace, that limit counts all processes of this user.

What the sandbox does NOT prevent:
    - an exploit of the kernel or of the interpreter: for code from an attacker, use a virtual machine;
    - reading: all files outside the hidden directories that everybody (without root: this user) may read;
    - use of memory in total: the limit is per process, so the total is `processes` times as much; files in memory
      (memfd) do not count, but are limited to `open_files` times `file_bytes`; use of the CPU until the time is up;
    - use of sockets in the file system, outside the hidden directories, if the server accepts everybody; use of devices
      in /dev that everybody may open;
    - cheating: the tests run in the process that they test. An object that equals everything passes them, and code that
      searches the interpreter's frames for the secret of the verdict can forge it;
    - without `processes`: killing other processes of this user, this one included (as root: those of nobody), reading
      their environment, descendants that outlive the run if there is no /proc in which to find them, and System V
      shared memory, which remains;
    - without `files`: writing any number of files wherever this user (as root: nobody) may write;
    - without `network`: all use of it. On macOS none of the three works, nor does the limit on memory. Not for Windows.
"""

import ctypes
import glob
import json
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from contextlib import suppress
from dataclasses import asdict, dataclass

LINUX = sys.platform.startswith("linux")
NOBODY = 65534
GUARDS = {"network": "no network", "processes": "processes of its own", "files": "read-only files"}
HIDDEN = ("/home", "/root", "/tmp", "/var/tmp", "/dev/shm", "/run", "/sys", "/proc")  # /proc last: mounting needs it


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0  # wall clock, from the first line of the program
    memory: int = 512 << 20  # bytes of address space, per process
    processes: int = 32  # threads count too
    file_bytes: int = 16 << 20  # of one file
    disk_bytes: int = 64 << 20  # of all files together (guard `files`)
    files: int = 256  # files and directories (guard `files`)
    open_files: int = 64  # per process


@dataclass(frozen=True)
class Outcome:
    status: str  # "passed", "failed" or "timed out"
    reason: str  # why not passed, in one line
    guards: dict[str, bool]  # which of GUARDS held

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_python(code: str, tests: str = "", limits: Limits | None = None) -> Outcome:
    """Run `code`, then `tests` in the same namespace; passed if neither raises and the end is reached. Raises
    RuntimeError if the sandbox itself does not work here."""
    limits = limits or Limits()
    job = json.dumps({"code": code, "tests": tests, "limits": asdict(limits)}).encode()
    # -I would also ignore PYTHONHASHSEED, and then the order of a set of strings, and so the score, could change
    launcher = [sys.executable, "-s", "-S", "-B", "-X", "utf8", os.path.abspath(__file__), "launch"]
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        try:
            done = subprocess.run(
                launcher, input=job, capture_output=True, cwd=folder, env={"PYTHONHASHSEED": "0"},
                start_new_session=True, timeout=limits.seconds + 60,  # in case the supervisor, which keeps time, fails
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("the sandbox does not work here: the supervisor did not answer in time") from error
    answer = json.loads(done.stdout or "{}")
    if answer.get("status") not in ("passed", "failed", "timed out"):
        reason = answer.get("reason") or done.stderr.decode("utf-8", "replace").strip() or "no answer"
        raise RuntimeError(f"the sandbox does not work here: {reason}")
    return Outcome(**answer)


# ---------------------------------------------------------------------------------------------------------------------
# The launcher: everything from here on runs in the new process

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
SYS_MOUNT_SETATTR = 442  # the same on every architecture but Alpha
LIBC = ctypes.CDLL(None, use_errno=True)


def launch() -> None:
    """Read a job from standard input, run it, and print the result: the fields of Outcome, in JSON."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    job = json.load(sys.stdin)
    limits = job["limits"] = Limits(**job["limits"])
    guards = isolate(limits) if LINUX else dict.fromkeys(GUARDS, False)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if guards["processes"]:
        if child := os.fork():  # the first process of the namespace: when it dies, all others die too
            os.waitpid(child, 0)
            os._exit(0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become the supervisor's children
    answer = supervise(job)
    if not guards["processes"]:
        kill_descendants()
    os.write(1, json.dumps({**answer, "guards": guards}).encode())
    os._exit(0)


def isolate(limits: Limits) -> dict[str, bool]:
    """Enter as many new namespaces as are allowed; returns which of GUARDS work."""
    user, group = os.getuid(), os.getgid()
    if user != 0 and LIBC.unshare(CLONE_NEWUSER) == 0:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    LIBC.unshare(CLONE_NEWIPC)
    return {
        "network": LIBC.unshare(CLONE_NEWNET) == 0,
        "processes": LIBC.unshare(CLONE_NEWPID) == 0,
        "files": LIBC.unshare(CLONE_NEWNS) == 0 and restrict_files(limits),
    }


def restrict_files(limits: Limits) -> bool:
    """Hide HIDDEN and the home directory, make everything else read-only, and mount a new working directory."""
    folder, python = os.getcwd(), os.open(sys.base_prefix, os.O_RDONLY | os.O_DIRECTORY)

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> bool:
        texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
        return LIBC.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]) == 0

    def expose_python(hidden: str) -> bool:
        """Make the interpreter visible if it is in a hidden directory, perhaps by a link in its path."""
        for place in {sys.base_prefix, os.path.realpath(sys.base_prefix)}:
            if os.path.commonpath([place, hidden]) == hidden:
                os.makedirs(place, exist_ok=True)
                if not mount(f"/proc/self/fd/{python}", place, None, MS_BIND | MS_REC):
                    return False
        return True

    if not mount("none", "/", None, MS_REC | MS_PRIVATE):
        return False
    try:
        home = os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a user without an entry has no home
        home = "/"
    for place in ([home] if home != "/" else []) + list(HIDDEN):
        if os.path.isdir(place) and not os.path.islink(place):
            if not mount("none", place, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m") or not expose_python(place):
                return False
    os.close(python)
    os.makedirs(folder, exist_ok=True)
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY is set, nothing is cleared
    at_cwd, recursive = -100, 0x8000
    if LIBC.syscall(SYS_MOUNT_SETATTR, at_cwd, b"/", recursive, ctypes.byref(read_only), ctypes.c_size_t(32)) != 0:
        return False
    size = f"mode=777,size={limits.disk_bytes},nr_inodes={limits.files}"
    mounted = mount("none", folder, "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(folder)
    return mounted


def prctl(option: int, value: int) -> None:
    if LINUX:
        LIBC.prctl(option, value, 0, 0, 0)


def supervise(job: dict) -> dict:
    """Start the worker and wait for it, at most for the allowed time; returns {"status", "reason"}."""
    limits, secret = job["limits"], os.urandom(16).hex()
    verdict_end, verdict_fd = os.pipe()
    if os.getuid() == 0:
        os.chown(".", NOBODY, NOBODY)
    worker = os.fork()
    if worker == 0:
        work(job, secret, verdict_fd)
    deadline, ended = time.monotonic() + limits.seconds, None
    while ended is None and time.monotonic() < deadline:
        child, code = os.waitpid(-1, os.WNOHANG)  # any child: orphans end up here
        if child == worker:
            ended = code
        elif child == 0:
            time.sleep(0.002)
    if ended is None:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    with suppress(ProcessLookupError, PermissionError):  # if no process is left in its group
        os.killpg(worker, signal.SIGKILL)
    if ended is None:
        return {"status": "timed out", "reason": f"no end after {limits.seconds:g} seconds"}
    os.set_blocking(verdict_end, False)  # reading must not wait for whoever holds the other end
    with suppress(BlockingIOError):
        message = os.read(verdict_end, 65536).decode("utf-8", "replace")
        if message.startswith(secret):
            return json.loads(message[len(secret) :].split("\n")[0])
    if os.WIFSIGNALED(ended):
        number, names = os.WTERMSIG(ended), {known.value: known.name for known in signal.Signals}
        return {"status": "failed", "reason": f"killed by {names.get(number, f'signal {number}')}"}
    return {"status": "failed", "reason": f"exit status {os.WEXITSTATUS(ended)} before the end of the tests"}


def kill_descendants() -> None:
    """Kill what the worker left behind, if no namespace ends with it: its orphans are this process's children."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (children := find_children()):
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def find_children() -> list[int]:
    children = []
    for file in glob.glob("/proc/[0-9]*/stat"):  # process (name) state parent ...
        with suppress(OSError), open(file, encoding="utf-8", errors="replace") as stream:  # it may have just ended
            if stream.read().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                children.append(int(file.split("/")[2]))
    return children


# ---------------------------------------------------------------------------------------------------------------------
# The worker


def work(job: dict, secret: str, verdict_fd: int) -> None:
    """Give up everything, run the program, write the verdict; does not return."""
    write, leave, process_id, this = os.write, os._exit, os.getpid, os.getpid()  # the program may replace os.write
    dumps = json.dumps
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd, place in enumerate((null, null, null, verdict_fd)):
            os.dup2(place, fd)
        os.closerange(4, 256)
        set_limits(job["limits"])
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if LINUX and LIBC.capset(header, none) != 0:  # drop the capabilities that a user namespace gives
            raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if not os.access(os.__file__, os.R_OK):
            raise OSError(f"the user {os.getuid()} may not read Python's library in {os.path.dirname(os.__file__)}; do "
                          "not evaluate as root, or use a Python that everybody can read")  # fmt: skip
        os.environ.clear()
    except Exception as error:  # the program has not run yet: the sandbox itself failed
        write(3, (secret + dumps({"status": "broken", "reason": str(error)})).encode())
        leave(1)

    try:
        try:
            module = types.ModuleType("solution")  # registered, since dataclasses look their module up
            sys.modules["solution"] = module
            exec(compile(job["code"], "<solution>", "exec", dont_inherit=True), module.__dict__)
            exec(compile(job["tests"], "<tests>", "exec", dont_inherit=True), module.__dict__)
            verdict = {"status": "passed", "reason": ""}
        except BaseException as error:  # SystemExit too: the end of the tests was not reached
            verdict = {"status": "failed", "reason": describe(error, job["tests"])}
        if process_id() == this:  # else this is a forked copy of the program, whose verdict does not count
            write(3, (secret + dumps(verdict) + "\n").encode())
            leave(0)
    finally:  # exit here, whatever the program did to the exception's text or to sys.stdout
        leave(1)


def set_limits(limits: Limits) -> None:
    values = {
        "CPU": int(limits.seconds) + 2, "FSIZE": limits.file_bytes, "NOFILE": limits.open_files,
        "NPROC": limits.processes, "CORE": 0,
    }  # fmt: skip
    if sys.platform != "darwin":  # macOS has this limit only in name
        values["AS"] = limits.memory
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def describe(error: BaseException, tests: str) -> str:
    """One line: the exception, and the line of the tests that led to it."""
    text, where = f"{type(error).__name__}: {error}".removesuffix(": ")[:300], ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<tests>":
            [line] = tests.split("\n")[number - 1 : number] or [""]
            where = f" in tests, line {number}: {line.strip()}"
    text = " ".join((text + where)[:500].split())
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be written to a report


def check() -> dict[str, bool]:
    """Which of GUARDS work here. Raises RuntimeError unless a correct program passes and a wrong one fails."""
    good, bad = run_python("x = 1", "assert x == 1"), run_python("x = 1", "assert x == 2")
    if not good.passed or bad.passed:
        raise RuntimeError(f"the sandbox does not work here: {good.reason or 'a failing test has passed'}")
    return good.guards


def describe_guards(guards: dict[str, bool]) -> str:
    """One line: which guards work here, and which do not."""
    held = ", ".join(text for name, text in GUARDS.items() if guards[name]) or "none of the kernel's guards"
    lacking = ", ".join(text for name, text in GUARDS.items() if not guards[name])
    return f"sandbox: {held}" + (f"; NOT: {lacking} (scores/sandbox.py says what that means)" if lacking else "")


if __name__ == "__main__":
    if sys.argv[1:] == ["launch"]:
        launch()
    import argparse  # not for the launcher, which starts once for each program

    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("python -m scores.sandbox", description=__doc__, formatter_class=form).parse_args()
    try:
        print(describe_guards(check()))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
