"""The sandbox, attacked. What needs the kernel's namespaces is checked where they are allowed, and skipped else."""

import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scores import sandbox
from scores.sandbox import Limits, run_python

QUICK = Limits(seconds=0.5)


@pytest.fixture(scope="module")
def guards():
    try:
        return sandbox.check()
    except RuntimeError as error:  # root without namespaces, and a Python that only root can read
        pytest.skip(str(error))


@pytest.fixture
def of_files(guards):
    if not guards["files"]:
        pytest.skip("no mount namespace")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(guards, tmp_path, monkeypatch):
    """No file and no process of the sandbox outlives a run."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    yield
    assert os.listdir(tmp_path / "runs") == []
    assert sandbox_processes() == []


def sandbox_processes(folder=None):
    """The processes that work in the sandbox's folders."""
    folder = os.fsencode(str(folder or tempfile.tempdir))
    return [process.name for process in Path("/proc").glob("[0-9]*") if _folder(process).startswith(folder)]


def _folder(process):
    try:
        return os.fsencode(os.readlink(process / "cwd"))
    except OSError:
        return b""


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


def test_right_and_wrong_programs():
    assert run_python("def f(x):\n    return x + 1\n", "assert f(1) == 2").passed
    wrong = run_python("def f(x):\n    return x\n", "\nassert f(1) == 2, 'no'")
    assert (wrong.status, wrong.reason) == ("failed", "AssertionError: no in tests, line 2: assert f(1) == 2, 'no'")
    broken = run_python("def f(x) return x", "assert True")
    assert broken.status == "failed" and "SyntaxError" in broken.reason
    assert run_python("x = 1", "assert y").reason == "NameError: name 'y' is not defined in tests, line 1: assert y"
    half = run_python("raise ValueError('\\ud83d')")  # of a surrogate pair, which UTF-8 does not have
    assert half.reason == "ValueError: \\ud83d" and half.status == "failed"
    for text in ("\x00", "x = '\ud800'", "(" * 500, "\\", "def f(:\n"):
        assert run_python(text).status == "failed"


def test_what_ordinary_programs_use_works(guards):
    code = (
        "from __future__ import annotations\nimport collections, dataclasses, functools, hashlib, heapq, itertools, "
        "math, random, re, string, tempfile, threading, typing\n"
        "@dataclasses.dataclass\nclass P:\n    x: 'int' = 3\n"
        "def recurse(n):\n    return n and 1 + recurse(n - 1)\n"
    )
    tests = (
        "assert P().x == 3 and recurse(900) == 900\n"
        "open('here', 'w').write('text')\nassert open('here').read() == 'text'\n"
        "with tempfile.TemporaryFile() as stream:\n    stream.write(b'x')\n"
        "done = []\nthread = threading.Thread(target=done.append, args=(1,))\n"
        "thread.start()\nthread.join()\nassert done\n"
    )
    outcome = run_python(code, tests)
    assert outcome.passed, outcome.reason


def test_the_order_of_sets_is_the_same_every_time():
    code = "raise ValueError('é', [*{'one', 'two', 'three', 'four', 'five', 'six'}])"
    first, second = run_python(code), run_python(code)
    assert first.reason == second.reason and first.reason.startswith("ValueError: ('é', [")


LEAVING = {
    "sys.exit": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "exit in a function": ("import sys\ndef f():\n    sys.exit()", "SystemExit in tests, line 1: f()"),
    "os._exit": ("import os\nos._exit(0)", "exit status 0 before the end of the tests"),
    "os._exit in a function": ("import os\ndef f():\n    os._exit(0)", "exit status 0 before the end of the tests"),
    "exec of another program": ("import os, sys\nos.execv(sys.executable, ['python', '-S', '-c', ''])", None),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "killing itself": ("import os\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "a signal without a name": ("import os\nos.kill(os.getpid(), 40)", "killed by signal 40"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    "a marker on every descriptor": (
        "import os\nfor fd in range(64):\n"
        "    for text in (b'passed', b'{\"status\": \"passed\", \"reason\": \"\"}\\n'):\n"
        "        try:\n            os.write(fd, text)\n        except OSError:\n            pass\nos._exit(0)",
        "exit status 0 before the end of the tests",
    ),
    "a marker printed": ("print('passed')\nprint('{\"status\": \"passed\"}')\nraise SystemExit", "SystemExit"),
    "an exception without a text": (
        "class E(Exception):\n    def __str__(self):\n        raise self\nraise E",
        "exit status 1 before the end of the tests",
    ),
    "a child that goes on": ("import os\nif os.fork():\n    os.wait()\n    os._exit(0)\ndef f():\n    pass", None),
    "at the exit": ("import atexit, os\natexit.register(os._exit, 0)\nraise ValueError", "ValueError"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEAVING)
def test_leaving_before_the_end_of_the_tests_is_no_pass(case):
    code, reason = LEAVING[case]
    outcome = run_python(code, "f()")
    assert outcome.status == "failed" and reason in (None, outcome.reason), outcome.reason


# ---------------------------------------------------------------------------------------------------------------------
# Attacks


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(100)",
    "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except: pass\n"
    "while True: pass",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "import os\nos.kill(os.getpid(), 19)",  # SIGSTOP
    "import os\nos.killpg(0, 19)",
    "import os\nwhile True: os.write(3, b'x' * 65536)",  # where the verdict goes
]


def test_endless_programs():
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda code: run_python(code, limits=QUICK), ENDLESS))
    assert [outcome.status for outcome in outcomes] == ["timed out"] * len(ENDLESS)
    assert {outcome.reason for outcome in outcomes} == {"no end after 0.5 seconds"}
    assert time.monotonic() - start < 60


BOMBS = {
    "memory": ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", Limits(memory=256 << 20), "MemoryError"),
    "threads": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(100,)).start()",
        Limits(processes=20), "RuntimeError: can't start new thread",
    ),
    "a huge file": ("open('big', 'wb').write(bytes(1 << 20))", Limits(file_bytes=1 << 16), "File too large"),
    "open files": ("kept = []\nwhile True:\n    kept.append(open('x', 'w'))", Limits(), "Too many open files"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb):
    code, limits, reason = BOMBS[bomb]
    outcome = run_python(code, limits=limits)
    assert outcome.status == "failed" and reason in outcome.reason, outcome.reason


def test_fork_bomb(guards):
    """Bounded here by its depth as well, should the limit not hold."""
    code = (
        "import os, time\nmade = 0\n"
        "for n in range(200):\n"
        "    try:\n        child = os.fork()\n"
        "    except OSError:\n        break\n"
        "    if child == 0:\n        time.sleep(100)\n        os._exit(0)\n"
        "    made += 1\n"
        "assert made < 20, made\n"
    )
    start = time.monotonic()
    outcome = run_python(code, limits=Limits(processes=20))
    assert outcome.passed, outcome.reason
    assert time.monotonic() - start < 30  # it does not wait for the sleepers


def test_huge_output_is_dropped():
    code = "import os\nfor n in range(300):\n    print('é' * 100_000)\n    os.write(2, b'x' * 100_000)\n"
    assert run_python(code, "assert True").passed


def test_many_files_and_full_disk(of_files):
    limits = Limits(files=20, disk_bytes=1 << 20)
    for code in ("for n in range(40): open(f'{n}', 'w').close()", "import os\nfor n in range(40): os.mkdir(f'{n}')",
                 "for n in range(4):\n    open(f'{n}', 'wb').write(bytes(1 << 19))"):  # fmt: skip
        outcome = run_python(code, limits=limits)
        assert outcome.status == "failed" and "No space left" in outcome.reason


def test_descriptors_are_not_inherited(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    read_end, write_end = os.pipe()
    with open(secret) as stream:
        for fd in (stream.fileno(), read_end, write_end):
            os.set_inheritable(fd, True)
        code = (
            "import os\nfound = []\n"
            "for fd in range(256):\n"
            "    try:\n        found.append((fd, os.fstat(fd).st_mode >> 12))\n"
            "    except OSError:\n        pass\n"
        )
        character, pipe = stat.S_IFCHR >> 12, stat.S_IFIFO >> 12  # /dev/null three times, and the verdict
        expected = [(0, character), (1, character), (2, character), (3, pipe)]
        outcome = run_python(code, f"assert found == {expected}, found")
    os.close(read_end)
    os.close(write_end)
    assert outcome.passed, outcome.reason


def test_the_environment_is_empty(monkeypatch, guards):
    monkeypatch.setenv("SANDBOX_TEST_SECRET", "secret-of-the-environment")
    code = (
        "import os, glob\nassert dict(os.environ) == {} and os.listdir('.') == []\n"
        "seen = b''\n"
        "for name in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try:\n        seen += open(name, 'rb').read()\n"
        "    except OSError:\n        pass\n"
    )
    hidden = guards["processes"] or os.getuid() == 0
    tests = "assert b'secret-of-the-environment' not in seen" if hidden else ""
    outcome = run_python(code, tests)
    assert outcome.passed, outcome.reason


def test_only_the_standard_library():
    for name in ("torch", "numpy", "pytest", "sandbox", "model"):
        assert run_python(f"import {name}").reason.startswith(f"ModuleNotFoundError: No module named '{name}'")
    assert run_python("import sys\nassert not any('site-packages' in place for place in sys.path), sys.path").passed


TRY = """
import ctypes, os, resource, signal, socket, sys


def successes(*attempts):
    done = []
    for attempt in attempts:
        try:
            attempt()
            done.append(attempt)
        except (OSError, ValueError):
            pass
    return done
"""


def program(text):
    """The text as a program that may ask which of its attempts succeed."""
    return TRY + textwrap.dedent(text)


def test_writing_outside(guards, tmp_path):
    if not guards["files"] and os.getuid() != 0:
        pytest.skip("no mount namespace")
    ours = tmp_path / "ours"
    ours.write_text("ours")
    ours.chmod(0o666)
    places = [str(ours), str(tmp_path / "new"), sandbox.__file__, os.__file__, "/etc/passwd",
              "/tmp/sandbox-test-file", "/dev/shm/sandbox-test-file",
              os.path.expanduser("~/sandbox-test-file"), "/sandbox-test-file"]  # fmt: skip
    code = program(f"""
        written = [place for place in {places!r} if successes(
            lambda: open(place, "a").write("theirs"), lambda: os.remove(place), lambda: os.chmod(place, 0),
            lambda: os.symlink("/etc", place))]
    """)
    outcome = run_python(code, "assert written == [], written" if guards["files"] else "")
    assert outcome.passed, outcome.reason
    if guards["files"]:
        assert ours.read_text() == "ours" and stat.S_IMODE(ours.stat().st_mode) == 0o666
    assert not any(os.path.exists(place) for place in places if place.endswith("test-file"))
    assert os.path.getsize(sandbox.__file__) > 0 and os.access(sandbox.__file__, os.R_OK)


def test_guards_cannot_be_undone(of_files):
    code = program("""
        libc = ctypes.CDLL(None, use_errno=True)
        for where in ("outside", "inside"):
            assert libc.mount(b"none", b"/", None, ctypes.c_ulong(32 | 4096), None) != 0, "remounted " + where
            assert libc.umount2(b"/tmp", 2) != 0 and libc.umount2(b"/proc", 2) != 0, "unmounted " + where
            libc.unshare(1 << 28 | 1 << 17)  # a user namespace of its own, and with it capabilities
        assert not successes(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))), "limit raised"
        assert not successes(lambda: os.setuid(0)) or os.getuid() != 0
    """)
    outcome = run_python(code)
    assert outcome.passed, outcome.reason


def test_no_network(guards):
    if not guards["network"]:
        pytest.skip("no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = program(f"""
            reached = successes(lambda: socket.getaddrinfo("example.com", 80))
            for address in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53), ("::1", 80)):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    def connect():
                        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, kind) as s:
                            s.settimeout(1)
                            s.connect(address)
                    reached += successes(connect)
        """)
        outcome = run_python(code, "assert reached == [], reached")
        assert outcome.passed, outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_limits_cannot_be_raised():
    code = program("""
        kinds = [getattr(resource, "RLIMIT_" + name) for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE")]
        raised = [kind for kind in kinds for pid in (0, os.getpid())
                  if successes(lambda: resource.prlimit(pid, kind, (-1, -1)))]
    """)
    assert run_python(code, "assert raised == [], raised").passed


def test_other_processes_are_out_of_reach(guards):
    if os.getuid() != 0:
        pytest.skip("the supervisor is of the same user, and only protected from signals")
    code = program("""
        parent = os.getppid()
        reached = successes(
            lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (0, 0)), lambda: os.kill(parent, 19),
            lambda: os.sched_setaffinity(parent, {0}), lambda: os.setpriority(0, parent, 19))
        assert ctypes.CDLL(None).ptrace(16, parent, None, None) != 0, "traced"
        seen = os.listdir("/proc") if os.path.isdir("/proc") else []
    """)
    tests = "assert reached == [], reached\n" + "assert seen == [], seen\n" * guards["files"]
    outcome = run_python(code, tests)
    assert outcome.passed, outcome.reason


def test_reading_what_is_hidden_and_writing_through_links(of_files, tmp_path):
    ours = tmp_path / "ours"
    ours.write_text("ours")
    home = os.path.expanduser("~")
    hidden = [place for place in sandbox.HIDDEN if place != "/proc"] + [home] * (home != "/")
    code = program(f"""
        hidden = {hidden!r}
        known = [os.path.realpath(sys.base_prefix), sys.base_prefix, os.getcwd(), *hidden]
        paths = [os.path.join(place, name) for place in hidden if os.path.isdir(place) for name in os.listdir(place)]
        left = [path for path in paths if not any((place + "/").startswith(path + "/") for place in known)]
        os.symlink("/", "root")
        os.symlink({os.__file__!r}, "link")
        written = successes(
            lambda: open("root/etc/passwd", "a"), lambda: open("link", "a"), lambda: os.link({os.__file__!r}, "hard"),
            lambda: open("root" + {str(ours)!r}, "a"), lambda: os.mknod("device", 0o60600, os.makedev(8, 0)),
            lambda: os.chroot("."))
    """)
    outcome = run_python(code, "assert left == [], left\nassert written == [], written")
    assert outcome.passed and ours.read_text() == "ours", outcome.reason


def test_killing_the_parent(guards):
    if not guards["processes"] and os.getuid() != 0:
        pytest.skip("no process namespace")
    code = program(f"""
        signal.signal(15, signal.SIG_IGN)
        for target in (os.getppid(), {os.getpid()}, {os.getppid()}, 1, *([0, -1] if {guards["processes"]} else [])):
            for number in (15, 9):
                if target != os.getpid(): successes(lambda: os.kill(target, number))
    """)
    outcome = run_python(code, limits=Limits(seconds=5))
    # signal 9 to its own group ends the program, nobody else
    assert outcome.status == "failed" and outcome.reason == "killed by SIGKILL" or not guards["processes"]
    assert run_python("x = 1", "assert x == 1").passed


def test_grandchildren_that_hold_or_close_the_pipes():
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n        {}\n        time.sleep(100)\n"
        "    os._exit(0)\n"
    )
    for action in ("pass", "os.closerange(0, 10)", "import signal; signal.signal(15, signal.SIG_IGN)"):
        start = time.monotonic()
        outcome = run_python(daemon.format(action), "assert True")
        assert outcome.passed and time.monotonic() - start < 30
    assert run_python("import os\nos.closerange(0, 64)", "assert True").status == "failed"
    assert run_python(daemon.format("pass") + "while True: pass", limits=QUICK).status == "timed out"


def test_it_dies_with_the_evaluation(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    code = f"import sys\nsys.path.insert(0, {os.path.dirname(sandbox.__file__)!r})\nimport sandbox\n"
    code += "sandbox.run_python('import time\\ntime.sleep(100)', limits=sandbox.Limits(seconds=100))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    folder, until = tmp_path / "sandbox-", time.monotonic() + 30
    while len(sandbox_processes(folder)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(sandbox_processes(folder)) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while sandbox_processes(folder):
        assert time.monotonic() < until, "still there"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox itself


def test_a_sandbox_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not work here: no answer"):
        run_python("x = 1")


def test_without_namespaces_the_rest_holds(tmp_path, monkeypatch):
    """As in a container that forbids them: limits, verdicts and the end of all descendants."""
    source = Path(sandbox.__file__).read_text(encoding="utf-8")
    call = "guards = isolate(limits) if LINUX else dict.fromkeys(GUARDS, False)"
    assert source.count(call) == 1
    poor = tmp_path / "poor_sandbox.py"
    poor.write_text(source.replace(call, "guards = dict.fromkeys(GUARDS, False)"), encoding="utf-8")
    monkeypatch.setattr(sandbox, "__file__", str(poor))
    if os.getuid() == 0:
        (tmp_path / "runs").chmod(0o755)
    try:
        held = sandbox.check()
    except RuntimeError as error:
        assert "may not read Python's library" in str(error) and os.getuid() == 0
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")  # one that everybody can read, if it is there
        try:
            held = sandbox.check()
        except (RuntimeError, OSError):
            return
    assert not any(held.values()) and "NOT: no network" in sandbox.describe_guards(held)
    assert run_python("while True: pass", limits=QUICK).status == "timed out"
    assert run_python("x = bytearray(1 << 30)").reason.startswith("MemoryError")
    assert run_python("import os\nos._exit(0)").status == "failed"
    escape = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(100)\n"
        "    os._exit(0)\nos.wait()"
    )
    assert run_python(escape, "assert True", limits=Limits(processes=10_000)).passed
    if os.getuid() == 0:
        assert run_python("import os\nassert os.getuid() == 65534").passed


@pytest.mark.parametrize("words, code, said", [(["--help"], 0, "sandbox does NOT prevent"), (["x"], 2, "unrecognized")])
def test_the_command_line(monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(sys, "argv", ["sandbox", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sandbox.__file__, run_name="__main__")
    assert end.value.code == code and said in "".join(capsys.readouterr())


def test_a_sandbox_that_does_not_work_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sandbox"])
    monkeypatch.setattr(sys, "executable", "false")  # nothing starts
    with pytest.raises(SystemExit, match="error: the sandbox does not work here"):
        runpy.run_path(sandbox.__file__, run_name="__main__")
