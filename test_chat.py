"""Tests of the chatroom: the real scripts as processes, real sockets, a real terminal.

    python -m pytest                      all of it
    python -m pytest -s -k fan_out        how fast it is on this machine

A test starts a server of its own on a free port, and reads like the protocol:
`alice.says("MSG hi")`, `bob.hears("MSG alice hi")`. Waiting has a deadline, never a fixed length.
Where the system has no pseudo-terminals or signals (Windows), what needs them is skipped.
"""
import codecs
import collections
import concurrent.futures
import contextlib
import itertools
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
from pathlib import Path

import pytest

try:
    import fcntl
    import pty
    import resource
    import termios
except ImportError:                                  # Windows
    pty = resource = None

HERE = Path(__file__).parent
FOLDERS = tempfile.TemporaryDirectory()              # for edited scripts; removed in the end
PATIENCE = 10        # seconds until something that should have happened counts as missing
WINDOWS, GIL = os.name == "nt", getattr(sys, "_is_gil_enabled", lambda: True)()
os.environ.pop("PYTHONUNBUFFERED", None)             # it would hide that a flush is missing
os.environ["PYTHONIOENCODING"] = "utf-8"             # in pipes, where Windows has another one
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's & makes children ignore it
needs_unix = pytest.mark.skipif(not resource, reason="needs signals, preexec_fn or resource")

# ---- Helpers: processes, terminals, connections -------------------------------------------------

def eventually(condition, what="it", seconds=PATIENCE):
    """Wait until `condition()` is true, and return its value; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s for {what() if callable(what) else what}")
        time.sleep(0.005)
    return value

def at_once(function, *arguments):
    """Run function(*each) for each of the tuples at the same time; fail if one of them fails."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        for future in [pool.submit(function, *each) for each in arguments]:
            future.result()

def edited(script, *edits, folder=None):
    """Return the path of a copy of `script` with (old, new) edits; each old is in it once."""
    text = (HERE / script).read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{script} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    copy = Path(folder or tempfile.mkdtemp(dir=FOLDERS.name), script)
    copy.write_text(text, encoding="utf-8")
    return copy

def in_thread(function, *arguments):
    """Run function(*arguments) in a new thread, and return that."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread

def as_text(pieces):
    return b"".join(pieces[:]).decode(errors="ignore").replace("\r\n", "\n")

def launched(prologue, script):
    """Return a command that executes `prologue` (Python), then the script in the same process."""
    return "-c", (f"{prologue}\nimport runpy, sys; del sys.argv[0]\n"
                  "runpy.run_path(sys.argv[0], run_name='__main__')"), script

class Process:
    """A script, started as a person starts it; `out` and `err` are what it has printed so far."""

    def __init__(self, *command, **more):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        self.popen = subprocess.Popen([sys.executable, *map(str, command)],
                                      **{"stdin": subprocess.DEVNULL, "cwd": HERE, **pipes, **more})
        self.shown, self.printed = [], []
        self.readers = [
            in_thread(pieces.extend, iter(lambda pipe=pipe: os.read(pipe.fileno(), 65536), b""))
            for pipe, pieces in ((self.popen.stdout, self.shown), (self.popen.stderr, self.printed))
            if pipe]

    out = property(lambda self: as_text(self.shown))
    err = property(lambda self: as_text(self.printed))

    def types(self, text):
        self.popen.stdin.write(text.encode())
        self.popen.stdin.flush()

    def status(self, seconds=PATIENCE):
        """Wait for the end; return the exit status. No traceback is ever printed."""
        status = self.popen.wait(seconds)
        for reader in self.readers:
            reader.join(PATIENCE)
        assert not re.search("Traceback|Exception|rror ignored", self.out + self.err), self.err
        return status

    def stop(self):
        self.popen.kill()
        self.popen.wait()

    def measured(self, what):
        """Return "cpu" (s), "files" (how many), "VmRSS" or "VmHWM" (KiB); 0 without /proc."""
        proc = Path(f"/proc/{self.popen.pid}")
        if WINDOWS or not proc.exists():             # Wine has one, but with other numbers
            return 0
        if what == "files":
            return len(os.listdir(proc / "fd"))
        if what == "cpu":
            fields = (proc / "stat").read_text().split(")")[1].split()
            return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        return int(re.search(rf"{what}:\s+(\d+)", (proc / "status").read_text())[1])

class Screen:
    """What a terminal shows of what is written to it: rows, a cursor, what has scrolled away."""

    def __init__(self, columns, height):
        self.rows, self.scrolled, self.unfinished = [], [], ""
        self.row, self.column, self.saved = 0, 0, (0, 0)
        self.resize(columns, height)

    def resize(self, columns, height):
        """As xterm does it: rows below the cursor go first; lines are cut, not wrapped again."""
        del self.rows[max(height, self.row + 1):]
        self.row -= max(0, len(self.rows) - height)
        self.scrolled += self.rows[:-height]
        self.rows = [(row + [" "] * columns)[:columns] for row in self.rows[-height:]]
        self.rows += [[" "] * columns for _ in range(height - len(self.rows))]
        self.columns, self.top, self.bottom = columns, 0, height - 1

    def write(self, text):
        pattern = r"(.*?)(\033(?:\[[?>0-9;]*)?)?"    # the end of a code may be still to come
        text, self.unfinished = re.fullmatch(pattern, self.unfinished + text, re.S).groups("")
        for token in re.findall(r"\033\[[?>0-9;]*[@-~]|\033[^\[]|[^\033]", text):
            if token < " ":
                self.obey(token)
            elif unicodedata.combining(token):
                self.rows[self.row][self.column - 1] += token
            else:
                width = 2 if unicodedata.east_asian_width(token) in "WF" else 1
                if self.column + width > self.columns:
                    self.obey("\r")
                    self.obey("\n")
                self.rows[self.row][self.column:self.column + width] = [token, ""][:width]
                self.column += width

    def obey(self, code):
        kind, numbers = code[-1], [int(number) for number in re.findall(r"\d+", code)]
        first, last, blank = max([1, *numbers[:1]]), len(self.rows) - 1, [" "] * self.columns
        if code == "\n" and self.row == self.bottom:         # of all the rows, or of a region
            self.scrolled += [self.rows[self.top]] * (self.top == 0)
            self.rows[self.top:self.bottom + 1] = [*self.rows[self.top + 1:self.bottom + 1], blank]
        elif code == "\0337":
            self.saved = self.row, self.column
        elif code == "\0338":
            self.row, self.column = min(self.saved[0], last), min(self.saved[1], self.columns)
        elif kind == "r":
            self.top, self.bottom = [number - 1 for number in numbers] or (0, last)
            self.row = self.column = 0
        elif kind not in "mhl=>\a":                  # colours and modes
            column = min(self.column, self.columns - 1)
            row = {"A": self.row - first, "B": self.row + first, "\n": self.row + 1,
                   "H": first - 1}.get(kind, self.row)
            column = {"C": column + first, "D": column - first, "\b": column - 1, "\r": 0,
                      "G": first - 1, "H": max([1, *numbers[1:]]) - 1}.get(kind, column)
            self.row, column = max(0, min(last, row)), max(0, min(self.columns - 1, column))
            self.column, line, start = column, self.rows[self.row], column * (numbers != [2])
            if kind == "P":
                line[column:] = (line[column + first:] + blank)[:self.columns - column]
            elif kind == "@":
                line[column:] = (blank[:first] + line[column:])[:self.columns - column]
            elif kind in "JK":
                line[start:] = blank[start:]
            for other in self.rows[(self.row + 1) * (numbers != [2]):] * (kind == "J"):
                other[:] = blank

class Terminal(Process):
    """A command at a terminal, under a person's hands and eyes."""

    def __init__(self, *command, columns=40, height=24, environment=(), **more):
        if not pty:
            pytest.skip("needs a pseudo-terminal")
        self.keyboard, self.tty = pty.openpty()
        self.screen, self.shown, self.seen, self.closed = Screen(columns, height), [], 0, False
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.resize(columns, height)
        self.modes = termios.tcgetattr(self.tty)
        env = {**os.environ, "TERM": "xterm-256color", "INPUTRC": os.devnull, **dict(environment)}
        super().__init__(*command, stdin=self.tty, stdout=self.tty, env=env, **more,
                         start_new_session=True,
                         preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.eyes = in_thread(self.watch)

    def watch(self):
        while not self.closed:
            if select.select([self.keyboard], [], [], 0.05)[0]:
                self.shown.append(os.read(self.keyboard, 65536))

    def look(self, rows=0):
        """Return the lines on the screen, or in its last rows; the cursor's row there, column."""
        for piece in self.shown[self.seen:]:
            self.screen.write(self.decode(piece))
            self.seen += 1
        first = -rows % len(self.screen.rows)
        lines = "\n".join("".join(row).rstrip() for row in self.screen.rows[first:]).rstrip("\n")
        return lines.split("\n"), self.screen.row - first, self.screen.column

    def everything(self):
        """Return all lines that are not empty, those that have scrolled away, too."""
        self.look()
        rows = ["".join(row).rstrip() for row in self.screen.scrolled + self.screen.rows]
        return [row for row in rows if row]

    def resize(self, columns, height):
        self.look()
        self.screen.resize(columns, height)
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))

    def types(self, keys, *lines, cursor=None):
        """Press these keys; then these become the last lines, and the cursor's column."""
        os.write(self.keyboard, keys.encode())
        self.sees(*lines, cursor=cursor)

    def sees(self, *lines, cursor=None):
        def as_expected():
            shown, _, column = self.look()
            return shown[-len(lines):] == list(lines) and cursor in (None, column)
        if lines:
            eventually(as_expected, lambda: f"{lines}, {cursor}; but saw {self.look()}")

    def shows(self, line):
        """The line is shown, once, on the screen or above it."""
        eventually(lambda: self.everything().count(line) == 1, lambda: (line, self.everything()))

    def leaves_terminal_as_it_was(self, modes=True):
        """Return whether its modes are as before, and all its rows scroll."""
        self.look()
        scrolls = (self.screen.top, self.screen.bottom) == (0, len(self.screen.rows) - 1)
        return scrolls and (not modes or termios.tcgetattr(self.tty) == self.modes)

    def closes(self):
        """Close the window."""
        self.closed = True
        self.eyes.join()
        os.close(self.keyboard)

    def stop(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        super().stop()
        if not self.closed:
            self.closes()
        os.close(self.tty)

def settled(terminal, seconds=0.2):
    """Wait until nothing new has been shown for so long."""
    count = -1
    while count < len(terminal.shown):
        count = len(terminal.shown)
        time.sleep(seconds)

REMOTE = """import signal, sys, threading
threading.Thread(target=lambda: [signal.raise_signal(signal.SIGINT) for _ in sys.stdin],
                 daemon=True).start()"""

class Server(Process):
    """A server that listens."""

    def __init__(self, *arguments, edits=(), **more):
        script = edited("server.py", *edits) if edits else HERE / "server.py"
        command = launched(REMOTE, script) if WINDOWS else [script]
        more.update({"stdin": subprocess.PIPE} if WINDOWS else {})
        super().__init__(*command, 0, *arguments, **more)
        self.peers = []                              # which keeps their connections open
        self.port = int(self.logs(r" listening on \S+:(\d+) ")[1])

    def interrupt(self, signum=signal.SIGINT):
        """Close it, as Ctrl-C or another signal does."""
        if not WINDOWS:
            self.popen.send_signal(signum)
        elif signum == signal.SIGINT:                # nothing sends Ctrl-C to a pipe's other end
            self.types("\n")
        else:
            pytest.skip("needs signals")

    def connect(self, **options):
        self.peers.append(Peer(self.port, **options))
        return self.peers[-1]

    def join(self, name, room="", **options):
        """Return a Peer that has joined."""
        peer = self.connect(**options)
        peer.asks(f"JOIN {name} {room}".strip(), rf"WELCOME \S+ {name} .*")
        return peer

    def join_both(self, *names, **options):
        """Return two Peers in the lobby; the first has heard of the second (with these options)."""
        first, second = self.join(names[0]), self.join(names[1], **options)
        first.hears(f"JOINED {names[1]}")
        return first, second

    def logs(self, pattern, seconds=PATIENCE):
        """Wait for a line of the log that matches."""
        return eventually(lambda: re.search(pattern, self.err, re.M),
                          lambda: f"{pattern!r} in the log:\n{self.err}", seconds)

    def has_clients(self, count):
        """So many threads are left, says the log, and sockets (and 0, 1, 2 and the listener)."""
        eventually(lambda: self.err.count(" starts\n") - self.err.count("thread ends: ") == count
                   and self.measured("files") in (4 + count, 0),
                   lambda: f"{count} clients, not {self.measured('files')} files and\n{self.err}")

class ServerAtTerminal(Server, Terminal):
    err = Process.out

class Peer:
    """A raw connection to the server, line by line."""

    def __init__(self, port, receive_buffer=None):
        self.sock, self.buffer = socket.socket(), b""
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sends, self.hangs_up = self.sock.sendall, self.sock.close

    def says(self, *requests):
        self.sends("".join(f"{request}\n" for request in requests).encode())

    def line(self, seconds=PATIENCE):
        """Return the next line (str), or None at the end of the connection."""
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            self.sock.settimeout(max(0.001, end - time.monotonic()))
            data = self.sock.recv(65536)
            if not data:
                assert not self.buffer, f"cut line: {self.buffer!r}"
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def hears(self, *patterns):
        """The next lines match these regular expressions (None: the end); return the last one."""
        line = None
        for pattern in patterns:
            line = self.line()
            matches = re.fullmatch(pattern, line) if pattern and line else line is pattern
            assert matches, f"{line!r} is not {pattern!r}"
        return line

    def asks(self, request, *answers):
        """The answers to the request are the next lines; return the last one."""
        self.says(request)
        return self.hears(*answers)

    def hears_nothing_but(self, *patterns):
        """These lines are all that was sent so far. (Asks WHO, whose answer must come next.)"""
        self.hears(*patterns)
        self.asks("WHO", "WHO .*")

    def hears_sometime(self, pattern, seconds=PATIENCE):
        """One of the next lines matches; return it."""
        end, line = time.monotonic() + seconds, ""
        while not re.fullmatch(pattern, line):
            line = self.line(end - time.monotonic()) or pytest.fail(f"the end came, no {pattern!r}")
        return line

    def leaves(self):
        self.says("LEAVE")
        self.hears_sometime("BYE .*")
        self.hangs_up()

    def half_closes(self):
        self.sock.shutdown(socket.SHUT_WR)

    def resets(self):                                # instead of an orderly end
        linger = struct.pack("hh" if WINDOWS else "ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.hangs_up()

def starting():
    """Yield start(Class, ...), which makes a process that is stopped in the end."""
    def start(process, *arguments, **more):
        process = process(*arguments, **more)
        stack.callback(process.stop)
        return process
    with contextlib.ExitStack() as stack:
        yield start

start = pytest.fixture(starting, name="start")
server = pytest.fixture(lambda start: start(Server), name="server")
fast = pytest.fixture(lambda start: start(Server, "--rate", 0), name="fast")     # reads at any pace

def mostly_waits(*cases):
    """Return a decorator: scenario(start, *case) runs beside the other tests, for each case."""
    def decorate(scenario):
        @pytest.mark.parametrize("case", cases or [()], ids=repr)
        def test(request, scenarios, case):
            scenarios[request.node.name].result()
        test.scenario = scenario
        return test
    return decorate

@pytest.fixture(scope="module", autouse=True)
def scenarios(request):
    """Run all selected tests that mostly wait, beside the first others; return their futures."""
    def run(scenario, case):
        with contextlib.contextmanager(starting)() as start:
            scenario(start, *case)
    with concurrent.futures.ThreadPoolExecutor(1 if WINDOWS else 10) as pool:
        futures = {
            item.name: pool.submit(run, item.function.scenario, item.callspec.params["case"])
            for item in request.session.items if hasattr(item.function, "scenario")}
        yield futures
        for future in futures.values():              # after Ctrl-C or with -x
            future.cancel()

# ---- The protocol, rule by rule -----------------------------------------------------------------

def test_rule_1_rooms(server):
    alice, bob, carol = server.join("alice"), server.join("bob", "Den"), server.join("carol")
    alice.hears("JOINED carol")                      # no room given: the oldest
    alice.leaves()
    carol.asks("ROOMS\nWHO", "LEFT alice", "ROOMS lobby=1 Den=1", "WHO carol")
    carol.asks("JOIN cleo den\nROOMS", "WELCOME Den cleo .*", "ROOMS Den=2")     # deleted at once
    carol.asks("JOIN cora\nJOIN cora dEN", "WELCOME Den cora .*", "ERROR .*already.*")
    bob.hears("JOINED cleo", "LEFT cleo", "JOINED cora")
    bob.asks("JOIN bob tea\nJOIN ben", "WELCOME tea bob .*", "WELCOME tea ben .*")    # his room
    assert server.err.count("room lobby created") == server.err.count("room lobby deleted") == 1

NAMES = ["a", "x" * 20, "Ann_Lee-2", "Ünïcödé", "名前", "Имя", "١٢", "_", "-",
         "हिन्दी", "अनीता", "สุดา", "தமிழ்", "José", "ñ" * 20]
NOT_NAMES = ["x" * 21, "a.b", "a=b", "a ☃", "a/b", "a b c", "a\x1b[2J", "a\x00", "a b\u202e",
             "a " + "r" * 21, "\u0301a", "a \u093fb", "\u0bcd", "ñ" * 21]

@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_rule_2_names(fast, form):
    """Letters, marks and digits of any script, composed or not: 20 characters when composed."""
    for name in NAMES:
        fast.connect().asks(unicodedata.normalize(form, f"JOIN {name} {name}"),
                            f"WELCOME {name} {name} Welcome to Chatroom, {name}!")
    for words in NOT_NAMES:
        fast.connect().asks(unicodedata.normalize(form, f"JOIN {words}\nROOMS"), "ERROR .*20.*",
                            "ROOMS .*")

@pytest.mark.parametrize("name, others", [
    ("Alice", ["alice", "ALICE den"]), ("Straße", ["STRASSE"]),
    ("José", ["Jose\u0301", "JOSE\u0301 den"])])
def test_rule_2_unique(server, name, others):
    """Names compare without regard to case, and to how they are composed."""
    owner, other = server.join(name), server.join("other")
    for words in others:
        other.asks(f"JOIN {words}\nWHO", "ERROR .* taken", f"WHO {name} other")
        server.connect().asks(f"JOIN {words}", "ERROR .* taken")
    name = name.lower()                              # of its own it may change the case
    owner.asks(f"JOIN {name}", "JOINED other", f"WELCOME lobby {name} .*")

def test_rule_2_guests(server):
    """Whichever name it would pick next may be taken."""
    owners = [server.join(f"guest{n}", "den") for n in range(2, 20)]
    names = [server.connect().asks("JOIN", r"WELCOME den guest\d+ .*").split()[2] for _ in "123"]
    assert len({*names, *(f"guest{n}" for n in range(2, 20))}) == len(owners) + 3

def test_rule_3_refused_nothing_changes(server):
    bob, alice, carol = server.join("bob"), server.join("alice", "den"), server.join("carol", "den")
    alice.hears("JOINED carol")
    for words in ("carol lobby", "alice !", "x y z", "alice", "alice den"):
        alice.asks(f"JOIN {words}\nWHO\nROOMS",
                   "ERROR .*", "WHO alice carol", "ROOMS lobby=1 den=2")
    bob.hears_nothing_but()
    carol.hears_nothing_but()

def test_rule_4_before_joining(server):
    server.connect().asks("MSG hi\nWHO\nHELLO\n\nrooms\nleave",
                          *["ERROR join a room first.*JOIN.*"] * 2, "ERROR unknown request.*",
                          "ROOMS", "BYE .*", None)

def test_rule_5_same_order_for_everyone(fast):
    """Five talk at once; the sixth hears what they hear, each without its own, in one order."""
    peers = [fast.join(f"p{n}") for n in range(6)]
    for n, peer in enumerate(peers):
        peer.hears(*(f"JOINED p{later}" for later in range(n + 1, 6)))
    for i, peer in itertools.product(range(40), peers[:5]):
        peer.says(f"MSG {i}")
    everything = [peers[5].line() for _ in range(200)]
    for n in range(5):
        own = [line for line in everything if line.startswith(f"MSG p{n} ")]
        assert own == [f"MSG p{n} {i}" for i in range(40)]
        assert [peers[n].line() for _ in range(160)] == [x for x in everything if x not in own]

FULL, UNSAFE = "x" * 1020, "".join(map(chr, [
    *range(0x09), *range(0x0b, 0x20), *range(0x7f, 0xa0), *range(0x2028, 0x202f),
    *range(0x2066, 0x206a)]))
FINE = "👩\u200d🏫 e\u0301 עברית العربية \u200f\u061c\u00a0\ufeff 漢字 \U0001f1e9\U0001f1ea ~"
LINES = [
    ("msg hé€😀\r\n".encode(), "hé€😀"), (b"MsG   a  b \n", "  a  b "), (b"MSG a\tb\n", "a b"),
    (b"MSG a\xffb \xc3( \xe2\x82\n", "a\ufffdb \ufffd( \ufffd"),
    (b"\r\n\n   \nMSG\nMSG \nMSG  \t \nMSG x\nMSG never finished", "x"),
    (f"MSG {FULL}\r\n".encode(), FULL), (f"MSG {FULL}x\n".encode(), None),
    (f"MSG {FULL}x\r\n".encode(), None), (f"MSG {'é' * 511}\n".encode(), None),
    (f"MSG {UNSAFE}.\n".encode(), "\ufffd" * len(UNSAFE) + "."), (f"MSG {FINE}\n".encode(), FINE)]

@pytest.mark.parametrize("size", [1, 2000])
def test_rules_6_and_7_lines(fast, size):
    """A request is at most 1024 bytes; it comes in any pieces; no control character goes out."""
    bob = fast.join("bob")
    for sent, heard in LINES:
        alice = fast.join("alice")
        for start in range(0, len(sent), size):
            alice.sends(sent[start:start + size])
        alice.half_closes()
        alice.hears(*["ERROR .*1024.*"] * (heard is None), "BYE .*", None)
        relayed = [f"MSG alice {re.escape(heard)}"] if heard else []
        bob.hears("JOINED alice", *relayed, "LEFT alice")

def test_rule_6_without_end(fast):
    """A line of 8 MiB takes no memory and gets one ERROR; the others go on."""
    bob, alice = fast.join_both("bob", "alice")
    before = fast.measured("VmRSS")
    for n in range(8):
        alice.sends(b"MSG " + b"x" * (1 << 20))
        bob.says(f"MSG {n}")
    alice.sends(b"\nMSG ok\n")
    bob.hears("MSG alice ok")
    assert fast.measured("VmRSS") - before < 512
    heard = sorted(alice.line() for _ in range(9))
    assert heard[0].startswith("ERROR ") and heard[1:] == [f"MSG bob {n}" for n in range(8)]

def test_rule_9_max_clients(start):
    server = start(Server, "--max-clients", 2)
    alice, bob = server.join_both("alice", "bob")
    for more in (b"", b"JOIN carol\nMSG hi\n" * 2000):
        carol = server.connect()
        with contextlib.suppress(ConnectionError):
            carol.sends(more)
        carol.hears("BYE .*full.*2.*", None)         # and it stays: it takes no place
    for _ in range(10):                              # place and name are free again at once
        bob.leaves()
        bob = server.join("bob")
    alice.hears_nothing_but(*["LEFT bob", "JOINED bob"] * 10)

@mostly_waits()
def test_rule_9_join_deadline(start):
    """Of 300 seconds, here 0.3; trickling bytes stretches neither it nor the farewell."""
    server = start(Server, edits=[("JOIN_SECONDS = 300", "JOIN_SECONDS = 0.3"),
                                  ("FAREWELL_SECONDS = 1.5", "FAREWELL_SECONDS = 0.2")])
    alice, silent, trickling = server.join("alice"), server.connect(), server.connect()
    with pytest.raises(OSError):
        for _ in range(100):
            trickling.sends(b"x")
            time.sleep(0.02)
    silent.hears("BYE no JOIN within 0.3 seconds", None)
    silent.hangs_up()
    server.has_clients(1)
    alice.hears_nothing_but()                        # a client that has joined may stay
    server.logs("client-3 +thread ends: no JOIN within 0.3 seconds")

def test_rule_10_slow_readers(fast):
    """A client that stops reading is dropped after 256 KiB; nobody waits for it, all hear LEFT."""
    alice, slow = fast.join_both("alice", "slow", receive_buffer=4096)
    bob = fast.join("bob")
    before = fast.measured("VmRSS")
    for _ in range(64):                              # 1 MiB in all
        started = time.monotonic()
        alice.says(*[f"MSG {'x' * 1000}"] * 16)
        for _ in range(16):
            bob.hears_sometime("MSG alice x{1000}")
        assert time.monotonic() - started < 0.25
    assert fast.measured("VmRSS") - before < 1024
    alice.hears("JOINED bob")
    alice.hears_sometime("LEFT slow", 1)
    fast.logs("dropped: not reading")
    slow.hears("JOINED bob", "MSG alice x+")         # what did fit arrives, then the end
    fast.join("slow")

def test_rule_10_behind_is_not_dropped(fast):
    """A client that is merely behind gets it all, 200 KiB; then BYE, though it goes on sending."""
    alice, slow = fast.join_both("alice", "slow", receive_buffer=4096)
    alice.says(*(f"MSG {n} {'x' * 1000}" for n in range(200)))
    alice.hears_nothing_but()
    slow.says("LEAVE", *["MSG more"] * 5000)
    alice.hears("LEFT slow")
    slow.hears(*(f"MSG alice {n} x+" for n in range(200)), "BYE .*", None)

@mostly_waits((100, 5), (10, 1000))
def test_rule_11_pace(start, count, length):
    """Short lines count as 100 bytes each, long ones as their length; nothing is lost."""
    (alice, bob), started = start(Server).join_both("alice", "bob"), time.monotonic()
    bob.says(*(f"MSG {n:0{length}}" for n in range(count)))
    alice.hears(*(f"MSG bob {n:0{length}}" for n in range(count)))
    seconds = count * max(100, length) / 8192
    assert 0.7 * seconds < time.monotonic() - started < 2 * seconds + 0.5

@mostly_waits()
def test_rule_11_held_back(start):
    """What the server does not read yet waits in 64 KiB (on Linux, in twice as much)."""
    mallory, sent = start(Server, "--rate", 1000).connect(), 0
    mallory.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    mallory.sock.settimeout(0.3)
    with pytest.raises(socket.timeout):
        while sent < 1 << 20:
            sent += mallory.sock.send(b"MSG hi\n" * 100)
    assert 32 * 1024 < sent < 160 * 1024

@mostly_waits((8192, b"x\n", 5), (100, b"x\n", 5), (8192, b"\n", 1), (8192, b"\r\n", 1))
def test_rule_11_a_flooder_is_soon_forgotten(start, rate, line, seconds):
    """However slowly it is read, its name is free soon after it has gone; empty lines are free."""
    server = start(Server, "--rate", rate)
    mallory, alice = server.join("mallory"), server.connect()
    mallory.sends(line * 2040)
    if line.strip():
        mallory.hears("ERROR .*")
        time.sleep(0.3)                              # in which it could all be read
    mallory.hangs_up()
    eventually(lambda: alice.asks("JOIN mallory", ".*").startswith("WELCOME "), seconds=seconds)

# ---- Leaving and closing ------------------------------------------------------------------------

@pytest.mark.parametrize("end, reason", [
    (Peer.half_closes, "end of file"), (lambda peer: peer.hangs_up(), "end of file"),
    (Peer.resets, "" if WINDOWS else "connection lost")])
def test_rule_8_one_way_out(fast, end, reason):
    """What it has said is delivered, except after a reset; it leaves once; its name is free."""
    alice, bob = fast.join_both("alice", "bob")
    said = [f"MSG bob {n}" for n in range(50)]
    bob.says(*(f"MSG {n}" for n in range(50)))
    alice.hears(*said * (end is Peer.resets))
    end(bob)
    alice.hears_nothing_but(*said * (end is not Peer.resets), "LEFT bob")
    fast.join("bob")
    fast.has_clients(2)
    fast.logs(f"client-2 +thread ends: {reason}")
    assert re.findall("client-2 +(.*)", fast.err)[-1].startswith("thread ends")      # at last

def test_rule_8_leave_in_the_middle(fast):
    """Of many requests in one segment each is answered in its turn, and none after LEAVE."""
    alice, bob = fast.join_both("alice", "bob")
    bob.says(*["MSG 1", "WHO", "MSG 2", "MSG 3", "JOIN rob", "MSG 4", "nonsense", "JOIN rob den",
               "MSG 5", "JOIN bob lobby", "MSG 6"] * 8, "MSG end", "LEAVE", "MSG after", "WHO")
    bob.hears(*["WHO alice bob", "WELCOME lobby rob .*", "ERROR .*", "WELCOME den rob .*",
                "WELCOME lobby bob .*"] * 8, "BYE .*", None)
    alice.hears_nothing_but(*["MSG bob 1", "MSG bob 2", "MSG bob 3", "LEFT bob", "JOINED rob",
                              "MSG rob 4", "LEFT rob", "JOINED bob", "MSG bob 6"] * 8,
                            "MSG bob end", "LEFT bob")

def closes(server, *peers):
    """All hear BYE, and nothing before it; then the server ends, within three seconds."""
    end = time.monotonic() + 3
    for peer in peers:
        peer.hears("BYE the server is closing", None)
    assert server.status(end - time.monotonic()) == 0

@mostly_waits(("SIGINT",), ("SIGTERM",), ("SIGHUP",), ("SIGTERM", "stalled"), ("", "closed"))
def test_rule_12_closing_while_all_stay(start, name, terminal=None):
    """They do not even hang up after BYE; nobody hears LEFT; nor does a stalled terminal matter."""
    server = start(ServerAtTerminal, stderr=subprocess.STDOUT) if terminal else start(Server)
    peers = [server.join(f"p{n}", "den" * (n % 2)) for n in range(6)]
    for n, peer in enumerate(peers):
        peer.hears(*(f"JOINED p{other}" for other in range(n + 2, 6, 2)))
    if terminal == "stalled":
        server.types("\x13")                         # Ctrl-S
    if terminal == "closed":
        server.closes()
    else:
        server.interrupt(getattr(signal, name, None))
    closes(server, *peers)
    assert terminal or server.err.count("thread ends: the server is closing") == 6
    assert terminal or re.search(r"main +closing: .*\n(.*\n)*.*main +closed\n\Z", server.err)

@mostly_waits()
def test_rule_12_closing_in_the_middle_of_it(start):
    """Flooders, one that does not read, one that has not joined: all that read get BYE."""
    server = start(Server, "--rate", 30000)
    alice, silent, frozen = server.join("alice"), server.connect(), server.join("frozen")
    flooders = [server.join(f"flooder{n}") for n in range(5)]
    for peer in (frozen, *flooders):
        peer.sends(b"MSG more\n" * 3000)
    alice.hears_sometime("MSG flooder.*")
    server.interrupt()
    for peer in (alice, silent, *flooders):
        peer.hears_sometime("BYE the server is closing", 1.5)
        peer.hears(None)
    closes(server)

@mostly_waits(("SIGINT", "SIGINT", 1, 0.5), ("SIGTERM", "SIGINT", 0, 3), ("SIGINT", "SIGHUP", 0, 3))
def test_rule_12_a_second_signal(start, first, second, status, seconds):
    """A second Ctrl-C ends a server at once that would go on closing; another signal does not."""
    server = start(Server)
    busy = server.join("busy")
    server.interrupt(getattr(signal, first))
    busy.hears("BYE .*")
    server.interrupt(getattr(signal, second, None))
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):               # something to read off all the time
        while server.popen.poll() is None and time.monotonic() < end:
            busy.sends(b"x")
            time.sleep(0.01)
    assert server.status(0.2) == status

@mostly_waits(*itertools.product(["SIGINT", "SIGTERM"], repeat=2), *[("SIGINT", "SIGTERM")] * 6)
def test_rule_12_two_signals_at_once(start, first, second):
    """The second comes while the first is being handled: nothing looks like an accident."""
    server = start(Server)
    for number in range(5):
        server.join(f"p{number}").sends(b"MSG a flooder, whose thread rests\n" * 100)
    server.interrupt(getattr(signal, first))
    server.interrupt(getattr(signal, second))
    for peer in server.peers:
        peer.hangs_up()
    assert server.status(3) in (0, int(first == second == "SIGINT"))
    story = r"\d\d:\d\d:\d\d (main|client-\d) +(Chat|con|room|p\d|thread|clos).*"
    assert all(re.fullmatch(story, line) for line in server.err.splitlines()), server.err

def test_rule_13_keepalive(start):
    """TCP is asked to notice when a machine vanishes. (That it does takes half a minute.)"""
    number = "client, number = Client(sock), number + 1"
    names = ["SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_USER_TIMEOUT"]
    server = start(Server, edits=[(number, f"""{number}
        print(*(sock.getsockopt(socket.IPPROTO_TCP if "TCP" in it else socket.SOL_SOCKET,
                getattr(socket, it)) for it in {names} if hasattr(socket, it)), flush=True)""")])
    server.join("alice")
    shown = eventually(lambda: re.search(r"^([1-9]\d*)( .*)?\n", server.out))
    assert sys.platform != "linux" or shown[0] == "1 20 5 30000\n"

@mostly_waits(('verb == "ROOMS"', 'verb == "ROOMS" and 1 / 0', "ROOMS"), (
    "member.send(lines)", 'member.send(lines if b"!" not in lines else 1 / 0)', "MSG oh!"))
def test_rule_14_an_error_in_the_server(start, old, new, request):
    """Whoever made the request gets BYE; the traceback is logged at once; the others go on."""
    server = start(Server, edits=[(old, new)])
    alice, bob = server.join_both("alice", "bob")
    bob.says(request)
    server.logs("ZeroDivisionError", 0.5)
    bob.hears("BYE an error in the server", None)
    alice.hears("LEFT bob")
    server.join("bob").asks("WHO", "WHO alice bob")
    server.logs("thread ends: an error in the server")

# ---- Starting the server, and its log -----------------------------------------------------------

@pytest.mark.parametrize("host, hint", [
    ("127.0.0.1", r"\(this machine only; --host 0.0.0.0 .*"),
    ("0.0.0.0", r"(- on another machine: python client.py [1-9][\d.]+ \d+|.*not on a network\))")])
def test_first_line_of_the_log(start, host, hint):
    server = start(Server, "--host", host, "--name", "Room 12\x1b[2J")
    server.logs(rf"^\d\d:\d\d:\d\d main +Room 12\ufffd\[2J listening on {host}:\d+ {hint}\n")

@mostly_waits()
def test_log_that_nobody_reads(start):
    """While the log's terminal stands still nobody waits, and in the end nothing is missing."""
    server = start(ServerAtTerminal, "--rate", 0, stderr=subprocess.STDOUT)
    ann, ben = server.join_both("ann", "ben")
    server.logs("ben joined")
    server.types("\x13")                             # Ctrl-S
    ann.says(*["JOIN !"] * 1500)                     # more to log than a terminal or a pipe holds
    ann.hears(*["ERROR .*"] * 1500)
    for n in range(20):
        server.join(f"visitor{n}", "den").leaves()
        ann.says(f"MSG secret {n}")
    ben.hears(*(f"MSG ann secret {n}" for n in range(20)))
    server.types("\x11")                             # Ctrl-Q
    server.logs("client-22 +thread ends")
    assert server.err.count("refused: ") == 1500 and "secret" not in server.err
    for line in ("room den created", "joined den", "left den", "room den deleted"):
        assert server.err.count(line) == 20

def test_trace(start):
    server = start(Server, "--trace")
    alice, bob = server.join_both("alice", "bob")
    server.logs(r"client-2 +releases the lock\n\Z")
    before = len(server.err)
    alice.says("MSG hi")
    bob.hears("MSG alice hi")
    expected = re.escape(next(block for part in README.values() for block in part["trace"]))
    eventually(lambda: re.fullmatch(re.sub("..:..:..", "..:..:..", expected), server.err[before:]),
               lambda: f"{expected}, but saw {server.err[before:]}")
    assert not re.search("main .* the lock", server.err)

WRONG = {"server.py": ["", "x", "-1", "65536", "0 1", "0 --max-clients 0", "0 --max-clients x",
                       "0 --rate -1", "0 --name=\t", "0 --host=", "0 --host ä..x", "0 --no-such"],
         "client.py": ["127.0.0.1", "h 0", "h 65536", "h x", "h 1 --name=", "h 1 --name=\t",
                       "h 1 --room=", "h 1 --room=a,b", "h 1 --room=\u0301a", "h 1 --no-such"]}

@mostly_waits(*[(script, words) for script in WRONG for words in WRONG[script]])
def test_wrong_arguments(start, script, words):
    process = start(Process, script, *words.split(" ") * bool(words))
    assert process.status() == 2 and not process.out
    assert re.fullmatch(rf"usage: {script} (.*\n)+{script}: error: .+\n", process.err)

@mostly_waits(*itertools.product(["server.py"], ["192.0.2.1", "a..b", "x" * 70, "127.0.0.1"]),
              *itertools.product(["client.py"], ["no.such", "ä..x", "x" * 70, "127.0.0.1"]))
def test_cannot_listen_or_connect(start, script, host):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))                 # but not listening
        port = bound.getsockname()[1]
        words = ["--host", host, port] if script == "server.py" else [host, port]
        process = start(Process, script, *words)
        assert process.status() == 1
    what, why = (("listen on", "Address already in use") if script == "server.py" else
                 ("connect to", "Connection refused"))
    why = why if host == "127.0.0.1" and not WINDOWS else ".+"
    assert re.fullmatch(rf"{script}: cannot {what} {host}:{port}: {why}; .*(host|address).*\n",
                        process.err)

# ---- The client in pipes ------------------------------------------------------------------------

class Liar:
    """A server that sends whatever we like."""

    def __init__(self):
        self.listener = self.sock = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self.listener.getsockname()[1]

    def accepts(self):
        self.listener.settimeout(PATIENCE)
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(b"WELCOME r ann hi\n")

    def half_closes(self):
        self.sock.shutdown(socket.SHUT_WR)

    def stop(self):
        self.listener.close()
        self.sock.close()

def run(start, server, *arguments, typed=None, command=("client.py",), **more):
    """Start client.py with `typed` as its standard input, a pipe; without, it stays open."""
    process = start(Process, *command, "127.0.0.1", server.port, *arguments,
                    stdin=subprocess.PIPE, **more)
    if typed is not None:
        process.types(typed)
        process.popen.stdin.close()
    return process

def test_client_in_pipes(start, server):
    bob, robot = server.join("bob"), run(start, server, "--name", "robot")
    eventually(lambda: "You are robot" in robot.out)
    bob.says("MSG good morning")
    server.join("carol").leaves()
    eventually(lambda: "* carol left\n" in robot.out, "a line, flushed at once")
    robot.popen.stdin.write(b"hello\n  two  spaces\n//who?\n\nnot \xff UTF-8\n")
    robot.popen.stdin.close()
    bob.hears("JOINED robot", "JOINED carol", "LEFT carol", "MSG robot hello",
              "MSG robot   two  spaces", "MSG robot /who[?]", "MSG robot not \ufffd UTF-8",
              "LEFT robot")
    assert robot.status() == 0 and robot.err == ""
    assert robot.out == ("* Welcome to Chatroom, robot! You are robot in lobby.\n"
                         "bob: good morning\n* carol joined\n* carol left\n* you have left\n")

def test_client_commands(start, server):
    bob, wrong = server.join("bob"), ["/dance now", "/join", "/name a b"]
    commands = ["/who", "/rooms", "/name Anna", "/join LOBBY", "/who", "hello", "/help", *wrong,
                "/quit", "never"]
    ann = run(start, server, "--name", "ann", "--room", "tea", typed="\n".join(commands) + "\n")
    assert ann.status() == 0
    bob.hears_nothing_but("JOINED Anna", "MSG Anna hello", "LEFT Anna")
    pattern = r"^(?:\*.*: (.*); the commands:\n)?/who  .*\n(?:/.{1,60}\n){5}"
    assert re.findall(pattern, ann.out, re.M) == ["", *wrong]
    assert [line for line in ann.out.splitlines() if re.match("[*] [iry]", line)] == [
        "* in this room: ann", "* rooms: lobby with 1, tea with 1", "* in this room: bob, Anna",
        "* you have left"]
    assert re.findall(r"You are (.*)\.", ann.out) == ["ann in tea", "Anna in tea", "Anna in lobby"]

def test_client_loses_nothing(start, fast):
    """All that is typed is sent, in its order; a long line in pieces, cut between characters."""
    bob, long = fast.join("bob"), "".join(f"{number} é日😀 " for number in range(2000))
    lines = [f"line {number}" for number in range(1000)]
    robot = run(start, fast, "--name", "robot", typed="\n".join([*lines, long, *lines]))
    bob.hears("JOINED robot")
    heard = [line[len("MSG robot "):] for line in iter(bob.line, "LEFT robot")]
    assert heard[:1000] == lines == heard[-1000:] and "".join(heard[1000:-1000]) == long
    assert max(len(line.encode()) for line in heard) <= 1020
    assert robot.status() == 0

@mostly_waits(
    ([], "guest1", "lobby"), (["--room", "tea"], "guest1", "tea"),
    (["--room", "tea"], "guest1", "tea", "den"), (["--name", "a b"], "a_b", "lobby"),
    (["--name", "José", "--room", "ห้อง"], "José", "ห้อง"))
def test_client_joins(start, arguments, name, room, oldest=None):
    """Without --name as a guest; even the first line is a message then."""
    server = start(Server)
    bob = server.join("keeper", oldest or room) and server.join("bob", room)
    robot = run(start, server, *arguments, typed="hello\n")
    assert robot.status() == 0 and f"You are {name} in {room}.\n" in robot.out
    bob.hears_nothing_but(f"JOINED {name}", f"MSG {name} hello", f"LEFT {name}")

@mostly_waits(
    (2, ["--name", "bob"], "bob is taken"), (2, ["--name", "b!"], "20 letters"),
    *((1, arguments, r"the server is full \(at most 1 clients\)")
      for arguments in ([], ["--name", "ann"], ["--name", "ann", "--room", "tea"])))
def test_client_is_refused(start, clients, arguments, reason):
    """A script cannot be asked again: it ends, with the reason and status 1."""
    server = start(Server, "--max-clients", clients)
    bob, robot = server.join("bob"), run(start, server, *arguments, typed="hello\n")
    assert robot.status() == 1 and re.search(reason, robot.out + robot.err)
    bob.hears_nothing_but()

IDLE = """
import io, sys
class Stream(io.TextIOBase):
    encoding, errors = "utf-8", "strict"
    def __init__(self, stream):
        self.write, self.flush, self.readline = stream.write, stream.flush, stream.readline
    def isatty(self):
        return True
sys.stdin, sys.stdout, sys.stderr = map(Stream, (sys.stdin, sys.stdout, sys.stderr))
"""

def test_client_in_idle(start, server):
    """IDLE's streams claim to be a terminal, but have no file, and know no escape codes."""
    bob, ann = server.join("bob"), run(start, server, command=launched(IDLE, "client.py"))
    eventually(lambda: "Your name: " in ann.out)
    ann.types("ann\n")
    bob.hears("JOINED ann")
    bob.says("MSG hi")
    eventually(lambda: "bob: hi\n" in ann.out)
    ann.types("hello\n")
    bob.hears("MSG ann hello")
    server.interrupt()
    assert ann.status(2) == 0 and ann.err == ""
    assert "\033" not in ann.out and ann.out.endswith("* the server is closing\n")

@needs_unix
@pytest.mark.parametrize("closed", [[], [0, 1], [2], [0, 1, 2]])
def test_client_without_input_output_or_error(server, start, closed):
    """These are closed; or they are open, but nobody reads the output any more."""
    reading, writing = os.pipe()
    os.close(reading)
    bob = server.join("bob")
    ann = run(start, server, "--name", "ann", stdout=writing,
              preexec_fn=lambda: [*map(os.close, closed)])
    os.close(writing)
    bob.hears("JOINED ann", "LEFT ann")
    assert ann.status() == 0 and ann.err == ""

def test_client_and_a_line_without_end(start):
    liar = start(Liar)
    robot = run(start, liar, "--name", "robot")
    liar.accepts()
    for _ in range(32):
        liar.sock.sendall(b"MSG " + b"x" * 256 * 1024)
    liar.sock.sendall(b"\nMSG bob " + b"y" * 60000 + b"\nMSG bob short\nMSG bob cut o")
    eventually(lambda: "bob: short" in robot.out)
    assert robot.measured("VmHWM") < 24 * 1024
    liar.half_closes()
    assert robot.status() == 1 and robot.err.startswith("client.py: connection lost")
    assert robot.out.endswith("bob: " + "y" * 60000 + "\nbob: short\n") and "x" not in robot.out
    assert robot.out.count("overlong") == 1

# ---- The client at a terminal, and what a person sees of it -------------------------------------

def sit_down(start, server, name="ann", **more):
    """Start client.py at a terminal; with a name, wait for the prompt after the welcome."""
    words = ["--name", name] if name else []
    person = start(Terminal, "client.py", "127.0.0.1", server.port, *words, **more)
    if isinstance(server, Liar):
        server.accepts()
    person.sees(">" if name else "Your name:")
    assert ("You are" in person.out) == bool(name)
    return person

def pair(start, **more):
    """Return bob, a Peer, and ann, at a terminal; both have joined."""
    server = start(Server, "--rate", 0)
    bob, ann = server.join("bob"), sit_down(start, server, **more)
    bob.hears("JOINED ann")
    return bob, ann

def test_client_at_a_terminal(start, server):
    bob, ann = server.join("bob"), sit_down(start, server, None, columns=70)
    ann.types("bob\r", "! the name bob is taken", "Your name:")
    ann.types("b!\r")
    eventually(lambda: "20 letters" in ann.out)
    ann.types("ann\r", "* Welcome to Chatroom, ann! You are ann in lobby.", ">", cursor=2)
    bob.hears("JOINED ann")
    assert ann.look(3) == ([">"], 0, 2)
    ann.types("hallo\033[D\033[D\033[D\x7fe", "> hello", cursor=4)             # three to the left
    bob.says("MSG hi")
    ann.sees("bob: hi", "> hello", cursor=4)
    ann.types("\r//who\r", "bob: hi", "ann: hello", "ann: /who", ">")
    ann.types("\033[A\033[A\r", "ann: /who", "ann: hello", ">")                # from the history
    bob.hears("MSG ann hello", "MSG ann /who", "MSG ann hello")
    ann.types("/who\r", "ann: hello", "* in this room: bob, ann", ">", cursor=2)

@mostly_waits(*[(keys,) for keys in (
    "half a line", "the middle of it\033[D\033[D\033[D", "x" * 200, "x" * 100 + "\033[D" * 50,
    "x" * 100 + "\x01", "日本語" * 5, "日本語" * 5 + "\033[D\033[D", "😀" * 10, "é" * 30,
    "שלום " * 6, "a search\r\x12sear", "keep it where it was\x0c")],        # Ctrl-A, -R, -L
    *[("half a line", size) for size in ((30, 24), (80, 24), (60, 10), (60, 40), (25, 8))])
def test_client_keeps_what_is_being_typed(start, keys, window=None):
    """A message moves neither it nor the cursor, and all is sent, though the window changes."""
    bob, ann = pair(start, columns=60)
    bob.says(*(f"MSG before {number}" for number in range(20)))
    ann.sees("bob: before 19", ">")
    ann.types(keys)
    settled(ann)
    if window:
        ann.resize(*window)
        settled(ann)
    before = ann.look(3)
    assert window or "\r" in keys or before[0][0] not in (">", ""), before
    for text in ("one", "two", "three"):
        bob.says(f"MSG {text}")
        ann.shows(f"bob: {text}")
        assert window or ann.look(3) == before
    ann.types(", and all\r" if window else "\r")
    text = re.sub(r"\033\[D|\r.*|[\x01\x0c]", "", keys) + ", and all" * bool(window)
    bob.hears(*[f"MSG ann {re.escape(text)}"] * (1 + ("\r" in keys)))
    eventually(lambda: ann.look(3) == ([">"], 0, 2), ann.look)
    bob.says("MSG after")
    ann.sees("bob: after", ">", cursor=2)
    ann.shows("bob: three")

@mostly_waits((5,), (4,), (3,), (2,), (1,))
def test_client_in_a_low_window(start, height):
    bob, ann = pair(start, height=height, columns=60)
    bob.says("MSG hi")
    eventually(lambda: ": hi" in ann.out)
    ann.types("hello\r/quit\r")
    bob.hears("MSG ann hello", "LEFT ann")
    assert ann.status() == 0 and ann.leaves_terminal_as_it_was()

def test_client_many_messages_while_keys_come(start):
    """400 messages, while a key comes every 2 ms: all are shown, all that is typed is sent."""
    def slowly(act, things):
        for thing in things:
            act(thing)
            time.sleep(0.002)                        # as fast as somebody who leans on a key
    bob, ann = pair(start, columns=60)
    typed = [f"line {number}, which is longer than her window is wide: so" for number in range(3)]
    at_once(slowly, (bob.says, [f"MSG number {n}" for n in range(400)]),
            (ann.types, "\r".join([*typed, "half"])))
    bob.hears(*(f"MSG ann {line}" for line in typed))
    ann.sees("bob: number 399", "> half")
    shown = re.findall("^bob: number (.*)", "\n".join(ann.everything()), re.M)
    assert shown == [str(number) for number in range(400)]
    ann.types("\025" + "".join(f"pasted {number}\r" for number in range(50)))
    bob.hears(*(f"MSG ann pasted {number}" for number in range(50)))

def test_client_and_the_shell(start, server):
    """The shell's lines stay; Ctrl-Z gives its screen back, and fg goes on with the chat."""
    shell = start(Terminal, "-c", "import os; os.execvp('bash', ['bash', '--norc', '-i'])",
                  columns=80, stderr=subprocess.STDOUT,
                  environment={"PS1": "$ ", "HISTFILE": os.devnull})
    shell.types("echo one; echo two\r", "one", "two", "$")
    bob = server.join("bob")
    shell.types(f"{sys.executable} client.py 127.0.0.1 {server.port} --name ann\r", ">")
    shell.types("hal", "> hal")
    assert "two" in shell.look()[0]
    shell.types("\x1a")
    eventually(lambda: shell.everything()[-1] == "$", shell.look)
    assert shell.leaves_terminal_as_it_was(modes=False)
    bob.says("MSG hi")
    shell.types("fg\r")
    shell.shows("bob: hi")
    shell.types("lo\r")
    bob.hears("JOINED ann", "MSG ann hallo")
    shell.types("/quit\r")
    eventually(lambda: shell.everything()[-2:] == ["* you have left", "$"], shell.look)
    shell.types("echo three\r", "three", "$")

@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": ""}, {"TERM": "dumb"}], ids=str)
def test_client_colours(start, server, environment):
    """At a dumb terminal a message is a line; what was half typed is not lost."""
    bob, carol = server.join_both("bob", "carol")
    ann = sit_down(start, server, columns=80, environment=environment)
    ann.types("hel", "> hel")
    bob.says("MSG one")
    carol.says("MSG two")
    eventually(lambda: "one" in ann.out and "two" in ann.out)
    ann.types("lo\r")
    carol.hears("JOINED ann", "MSG bob one", "MSG ann hello")
    colours = dict(re.findall(r"\033\[38;5;(\d+)m(bob|carol)\033\[0m: ", ann.out))
    assert len(colours) == (0 if environment else 2)
    assert bool(re.search(r"\033\[[0-9;]*m", ann.out)) == (not environment)
    assert ("\033" in ann.out) == ("TERM" not in environment)

LIES = (b"\033[2J\033]0;owned\007 MSG\nMSG \033[31mred \r\033[Kboo\x9b1m\nMSG\nMSG \nMSG x\n\n \n"
        b"JOINED\nLEFT \nWHO\nROOMS\nROOMS = a==b\nWELCOME\nWELCOME x\nERROR\nMSG ESC7 \0337\033M\n"
        b"HELLO w\xc3\xb6rld\xff\xfe\xc3\n\0\0\nMSG a \xe2\x80\xaeb\xe2\x80\xa8\x7f\tc\r\n"
        b"WELCOME r ann hi\nBYE\033[2J\nBYE \033[3J\n")

def test_client_and_a_server_that_lies(start):
    liar = start(Liar)
    ann = sit_down(start, liar, columns=200)
    liar.sock.sendall(LIES)
    assert ann.status() == 0 and ann.leaves_terminal_as_it_was()
    ann.shows("? HELLO wörld\ufffd\ufffd\ufffd")
    ann.shows("a: \ufffdb\ufffd\ufffd c")
    for code in ("\033[2J", "\033[31m", "\033[3J", "\033]", "\033M", "\x9b", "\u202e", "\u2028"):
        assert code not in ann.out

def test_client_flooded_by_the_server(start):
    """As many lines as the terminal takes: what is typed goes out at once; memory is bounded."""
    def floods():
        while not over.is_set():
            liar.sock.sendall(b"MSG bob buy my book\n" * 100)
    liar, over = start(Liar), threading.Event()
    ann = sit_down(start, liar)
    liar.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    flooder = in_thread(floods)
    eventually(lambda: sum(map(len, ann.shown)) > 200000)
    for number in range(5):
        began, heard = time.monotonic(), b""
        ann.types(f"typed {number}\r")
        while f"MSG typed {number}\n".encode() not in heard:
            heard += liar.sock.recv(1000)
        assert time.monotonic() - began < 1
    assert ann.measured("VmHWM") < 24 * 1024
    over.set()
    flooder.join(PATIENCE)
    liar.stop()
    assert ann.status() == 1

DOING = {"at the prompt": "", "in half a line": "half a line", "waiting for an answer": "/name x\r",
         "in a search": "\x12ha",                    # a line cut, then pasted: more than is read
         "in a send": "x" * 1000 + "\25" + "\31\r" * 300}

@mostly_waits(*itertools.product(("half_closes", "stop"), DOING))
def test_client_ends_at_once(start, ending, doing):
    """Whatever it is doing, it shows messages, and ends within 0.3 s without a key."""
    liar = start(Liar)
    ann = sit_down(start, liar)
    ann.types(DOING[doing])
    settled(ann)
    before = ann.measured("cpu")
    liar.sock.sendall(b"MSG bob hi\n")
    ann.shows("bob: hi")
    assert ann.measured("cpu") - before < 0.1, "waiting costs nothing"
    began = time.monotonic()
    getattr(liar, ending)()
    assert ann.status(3) == 1 and time.monotonic() - began < 0.3, doing
    assert "client.py: connection lost; start again when" in ann.err
    assert ann.leaves_terminal_as_it_was(), doing

@mostly_waits(
    ("ann", "interrupt", "* the server is closing"), ("ann", "stop", None), (None, "stop", None),
    *itertools.product(("ann", None), ("\3", "\4"), ["* you have left"]),
    *itertools.product(["ann"], ("/quit\r", "half\3"), ["* you have left"]))
def test_client_ends(start, name, ending, reason):
    server = start(Server)
    bob, ann = server.join("bob"), sit_down(start, server, name)
    time.sleep(0.1)                                  # readline may miss a Ctrl-C that comes at once
    if hasattr(server, ending):
        getattr(server, ending)()
    else:
        ann.types(ending)
        bob.hears(*["JOINED ann", "LEFT ann"] * bool(name))
    assert ann.status(2) == (not reason) and ann.leaves_terminal_as_it_was()
    eventually(lambda: not reason or ann.everything()[-1] == reason, ann.look)
    assert ann.err.startswith("client.py: connection lost" * (not reason))

# ---- README: what it says is what happens -------------------------------------------------------

def parsed(text):
    """Return {heading: {language: [block, ...]}}; a `diff` is (script, old, new)."""
    parts, heading, script = {}, "", ""
    for match in re.finditer(r"^#+ ([^\n]*)|[Ii]n `(\w+\.py)`|^ *```(\w+)\n(.*?)^ *```$", text,
                             re.M | re.S):
        heading, script = match[1] or heading, match[2] or script
        blocks = parts.setdefault(heading, collections.defaultdict(list))
        block = textwrap.dedent(match[4] or "")
        if match[3] == "diff":
            block = script, *("\n" + re.sub(rf"^[{sign}].*\n|^.", "", block, flags=re.M)
                              for sign in "+-")
        if match[3]:
            blocks[match[3]].append(block)
    return parts

README_TEXT = (HERE / "README.md").read_text(encoding="utf-8")
README = parsed(README_TEXT)
COMMANDS = next(part["sh"] for part in README.values() if "client.py" in "".join(part["sh"]))
BY_HAND = [heading for heading in README if "wait for the reader" in heading]
PORTS = itertools.count(20000 + os.getpid() % 10000)         # no system gives these to clients

def free_port():
    return next(port for port in PORTS if socket.socket().connect_ex(("127.0.0.1", port)))

def test_forty_lines(start):
    """README's first server works, as long as everyone is nice and types slowly."""
    def connect():
        with contextlib.suppress(ConnectionRefusedError):
            return Peer(port)
    code, port = next(part["python"][0] for part in README.values() if part["python"]), free_port()
    assert code.count("\n") <= 40
    start(Process, "-c", code, port)
    ann, bob = eventually(connect), eventually(connect)
    ann.asks("ann", "Your name[?]", "ann joined")
    bob.asks("bob", "Your name[?]", "bob joined")
    ann.asks("hi bob", "bob joined")
    bob.hears("ann: hi bob")
    bob.asks("bye", "Goodbye!", None)
    ann.hears("bob left")

PROGRAMS = {"python": f'exec "{sys.executable}" "$@"', "nc": """
until exec 3<>/dev/tcp/$1/$2; do sleep 0.05; done 2> /dev/null
cat <&0 >&3 &
cat <&3"""}
for program in PROGRAMS:                 # now: what is written while others fork is 'busy' in exec
    Path(FOLDERS.name, program).write_text(f"#!/bin/bash\n{PROGRAMS[program]}\n", encoding="utf-8")
    Path(FOLDERS.name, program).chmod(0o755)

class Replay:
    """What README shows under a heading, to be played with the real scripts in real terminals.

    Each command of `sh` has a column of `transcript`: there `$` starts it; what follows `> ` or
    `Your name: ` is typed, and so is ^C; … is anything; what stands in brackets is a direction; all
    the rest is what is to be seen. A `diff` is an edit.
    """

    def __init__(self, start, heading, left_out):
        if not pty:
            pytest.skip("needs a pseudo-terminal")
        part, self.start, self.patience = README[heading], start, 1 if left_out else PATIENCE
        self.folder = tempfile.mkdtemp(dir=FOLDERS.name)
        commands = "".join(part["sh"] or COMMANDS).replace("12345", str(free_port()))
        self.commands = re.findall(r"^(\S.*(?:\n .*)*)", commands, re.M)
        Path(self.folder, "forty.py").write_text("".join(part["python"]), encoding="utf-8")
        edits = part["diff"][:len(part["diff"]) - left_out]
        for script in ("server.py", "client.py"):
            edited(script, *(it[1:] for it in edits if it[0] == script), folder=self.folder)
        self.rows = [[cell.rstrip() for cell in re.split(r"\| ?", line)]
                     for line in "".join(part["transcript"]).splitlines()[2:]]
        for index, row in enumerate(self.rows):
            for column, cell in enumerate(row):
                if cell.startswith("    "):          # the last cell of this column goes on
                    last = next(above for above in self.rows[index - 1::-1] if above[column])
                    last[column], row[column] = f"{last[column]} {cell.strip()}", ""

    def run(self, column):
        """Start a command beside the scripts; wait until it listens, or shows something."""
        command = self.commands[column]
        command = command if re.search(r"[|(]", command) else f"exec {command}"
        terminal = self.start(
            Terminal, "-c", f"import os; os.execvp('bash', ['bash', '-c', {command!r}])",
            columns=200, height=60, cwd=self.folder, stderr=subprocess.STDOUT,
            environment={"PATH": f"{FOLDERS.name}:{os.environ['PATH']}"})
        awaited = {"exec python server": " listening on ", "exec python client": "You are|Your n"}
        eventually(lambda: re.search(awaited.get(command[:18], ""), terminal.out), command)
        return terminal

    def play(self):
        """Play the transcript, row by row; fail if something else is seen."""
        running, expected = {}, collections.defaultdict(list)
        for row in self.rows:
            quiet = {}
            for column, cell in enumerate(row):
                if cell == "$":
                    running[column] = self.run(column)
                elif cell:
                    self.act(column, running[column], cell, expected[column])
            for column in running:                   # more may follow
                self.sees(running[column], expected[column] + ["…"])
                quiet.update({column: running[column].out} if row[column] == "(nothing)" else {})
            time.sleep(0.4 if quiet else 0)          # in all that time
            assert quiet == {column: running[column].out for column in quiet}
        for column in filter(expected.get, running):         # but not at the end
            self.sees(running[column], expected[column])

    def act(self, column, terminal, cell, expected):
        """Do what a cell says, or note what is then to be seen."""
        typed, command = re.match(r"> (.*)|Your name: (.*)", cell), self.commands[column]
        if typed:
            if command.startswith("python client"):
                eventually(lambda: terminal.look()[0][-1] in (">", "Your name:"), terminal.look)
            terminal.types((typed[1] or typed[2]) + "\r")
            expected += [typed[1]] * command.startswith("nc ")         # its echo
        elif cell == "^C":
            terminal.types("\3")
        elif cell == "(a processor is busy)":        # half of one, for half a second
            before = terminal.measured("cpu")
            eventually(lambda: not before or terminal.measured("cpu") - before > 0.25, cell,
                       self.patience)
        elif cell[0] != "(":
            expected.append(cell)

    def sees(self, terminal, expected):
        """The lines on its screen become the expected ones; prompts do not count."""
        def masked(line):
            line = re.sub(r"\^C|^> .*|^>$|^Your name:.*", "", line)
            return re.sub(r"127\.0\.0\.1:\d+|^\d\d:\d\d:\d\d", "N", line)
        def as_expected():
            seen = "".join(f"{line}\n" for line in map(masked, terminal.everything()) if line)
            return re.fullmatch(pattern, seen)
        pattern = "".join(r"(.*\n)*" if line == "…" else re.escape(masked(line)) + "\n"
                          for line in expected)
        eventually(as_expected, lambda: (expected, terminal.everything()), self.patience)

@mostly_waits(*[(heading, left_out) for heading, part in README.items() if part["transcript"]
                for left_out in (0, 1)[:1 + bool(part["diff"])]])
def test_lesson(start, heading, left_out):
    """One sees what README shows; without the last edit of an experiment one does not."""
    with pytest.raises(pytest.fail.Exception) if left_out else contextlib.nullcontext():
        Replay(start, heading, left_out).play()

@mostly_waits(*itertools.product(BY_HAND, (True, False)))
def test_lesson_by_hand(start, heading, is_edited):
    """Bob presses Ctrl-Z while zoe floods the room: only with the edit everybody waits for him."""
    replay = Replay(start, heading, 0 if is_edited else len(README[heading]["diff"]))
    server, bob, alice = map(replay.run, range(3))
    os.killpg(bob.popen.pid, signal.SIGSTOP)
    replay.run(3)
    if is_edited:
        eventually(lambda: alice.out.count("zoe") > 100, "a flood")
        settled(alice, 0.3)
        alice.types("/who\r")
        settled(alice, 0.3)
        assert "in this room" not in alice.out and "bob left" not in alice.out
        os.killpg(bob.popen.pid, signal.SIGCONT)     # fg
        eventually(lambda: "* in this room: bob, alice, zoe" in alice.out, "an answer")
    else:
        eventually(lambda: "* bob left" in alice.everything() and "not reading" in server.out)

@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_readme_options(start, script):
    described = start(Process, script, "--help")
    assert described.status() == 0
    commands = " ".join(re.findall(rf"python {script}([^`\n|&>)]*)", README_TEXT))
    assert {*re.findall(r"--[\w-]+", commands)} <= {*re.findall(r"--[\w-]+", described.out)}
    assert {*re.findall(r"\d{3,}", described.out)} <= {*re.findall(r"\d{3,}", README_TEXT)}

def test_readme_constants():
    code = (HERE / "server.py").read_text(encoding="utf-8")
    for constant, unit in (("MAX_REQUEST", "bytes"), ("JOIN_SECONDS", "seconds"), (
            "FAREWELL_SECONDS", "seconds"), ("SEND_BUFFER", "KiB"), ("RECEIVE_BUFFER", "KiB")):
        number = re.search(rf"^{constant} = ([\d.]+)", code, re.M)[1]
        assert f"{number} {unit}" in " ".join(README_TEXT.split()), constant

def test_readme_messages_and_links():
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("server.py", "client.py"))
    table = README_TEXT.partition("When it does not connect\n")[2].partition("\n#")[0]
    for message in re.findall(r"^\| `(.*?)` ?…?.* \|", table, re.M):
        assert re.sub(r"\bann\b", "{name}", message) in code, message
    anchors = ["#" + re.sub(r"[^\w\- ]", "", it.lower()).replace(" ", "-") for it in README]
    links = re.findall(r"\]\((#[^)]*)\)", README_TEXT)
    assert table and links and set(links) <= set(anchors), set(links) - set(anchors)
    assert len(anchors) == len(set(anchors))

# ---- What a room full of students tries ---------------------------------------------------------

@contextlib.contextmanager
def conversation(server, *names):
    """In the `with` block people in a room talk all the time, and check what they hear.

    Nothing is lost, doubled, cut, out of order or late, nor without meaning in the protocol; nobody
    comes or leaves twice; in the end nobody else is there. (Wine, which is slow, gets 2 seconds.)
    """
    late = 2 if WINDOWS else 0.25
    def talk(name, peer, present):
        """Say something every 20 ms, with its number and time; hear all that the others say."""
        def hear(line):
            assert re.fullmatch(r"(MSG|JOINED|LEFT) [\w-]{1,20}( .*)?", line), line
            verb, other, *text = line.split()
            assert (other in present) != (verb == "JOINED") and line.isprintable(), (line, present)
            (present.discard if verb == "LEFT" else present.add)(other)
            if verb == "MSG" and other in heard:
                assert text[0] == str(heard[other]), f"{name} heard {line}, not {heard[other]}"
                assert time.monotonic() - float(text[1]) < late, f"{name} heard {line} too late"
                heard[other] += 1
                ended.update([other] * (text[2:] == ["end"]))
        heard, ended, said = {other: 0 for other in names if other != name}, set(), 0
        while not over.is_set():
            peer.says(f"MSG {said} {time.monotonic()}")
            due, said = time.monotonic() + 0.02, said + 1
            with contextlib.suppress(socket.timeout):
                while time.monotonic() < due:
                    hear(peer.line(due - time.monotonic()))
        peer.says(f"MSG {said} {time.monotonic()} end")
        while ended < {*heard}:
            hear(peer.line())
    def alone():
        peers[0].says("ROOMS", "WHO")
        rooms, who = peers[0].hears_sometime("ROOMS .*"), peers[0].hears_sometime("WHO .*")
        return {*who.split()[1:]} == {*names} and len(rooms.split()) == 2
    peers, over = [server.join(name) for name in names], threading.Event()
    for peer in peers:
        peer.says("WHO")
    present = [{*peer.hears_sometime("WHO .*").split()[1:]} for peer in peers]
    with concurrent.futures.ThreadPoolExecutor(len(peers)) as pool:
        futures = [pool.submit(talk, *each) for each in zip(names, peers, present)]
        try:
            yield
        finally:
            over.set()
        for future in futures:
            future.result()
    eventually(alone, "nobody else to be there")
    server.has_clients(len(peers))
    assert "Traceback" not in server.err

def flood(peer, line):
    """Send as fast as possible, and read what comes, for a while."""
    end, block = time.monotonic() + 0.3, line * (8192 // len(line))
    peer.sock.setblocking(False)
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            peer.sock.send(block)
        with contextlib.suppress(BlockingIOError):
            assert peer.sock.recv(1 << 20), "a flooder was dropped"
        time.sleep(0.005)

MESSAGES = [b"MSG " + b"x" * 60 + b"\n"] * 30
OTHERS = [b"JOIN a%d\nJOIN b%d\n", b"JOIN c%d d\nJOIN c%d lobby\n", b"WHO\n", b"ROOMS\n",
          b"JOIN\n"] * 3

@pytest.mark.parametrize("lines", [MESSAGES, OTHERS], ids=["messages", "others"])
def test_many_flooders(server, lines):
    with conversation(server, "ann", "ben"):
        flooders = [server.join(f"flooder{n}") for n in range(len(lines))]
        at_once(flood, *((peer, line.replace(b"%d", b"%d" % n))
                         for n, (peer, line) in enumerate(zip(flooders, lines))))
        assert "dropped" not in server.err and "ends" not in server.err
        for peer in flooders:
            (peer.hangs_up if lines is MESSAGES else peer.resets)()
        eventually(lambda: server.err.count("thread ends") == len(lines), "all to leave")

def test_ninety_at_once_with_long_names(start):
    """What they say while they wait for the lock is more than a send buffer holds."""
    server = start(Server, "--rate", 0,
                   edits=[('verb == "ROOMS"', 'verb == "ROOMS" and not time.sleep(0.3)')])
    reader = server.join("reader")
    peers = [server.join(f"{'𠀀' * 18}{n}") for n in range(90)]
    reader.says("ROOMS")                             # all the others have to wait
    for peer in peers:
        peer.sends(b"MSG x\n" * 84 + b"LEAVE\n")
    heard = collections.Counter()
    while heard["LEFT"] < 90:                        # a client that reads is not dropped
        heard[reader.line().split()[0]] += 1
    assert heard["MSG"] > 20 * 84                    # not 90: these do not read

@needs_unix
@pytest.mark.parametrize("limit, value, message", ids=["files", "threads"], argvalues=[
    ("RLIMIT_NOFILE", 12, "cannot accept: "),
    pytest.param("RLIMIT_AS", 200 << 20, "thread ends: .*(start new thread|allocate)",
                 marks=pytest.mark.skipif(sys.platform != "linux" or not GIL,
                                          reason="only Linux has it, and Python with the GIL"))])
def test_few_files_or_threads(start, limit, value, message):
    """If there are none left a client waits, or its connection is closed; the server goes on."""
    limit = getattr(resource, limit)
    server = start(Server, preexec_fn=lambda: resource.setrlimit(limit, (value, value)))
    alice = server.join("alice")
    crowd = [server.connect() for _ in range(60)]
    server.logs(message)
    before, lines = server.measured("cpu"), server.err.count("cannot accept")
    time.sleep(0.3)                                  # the time in which it is measured
    assert server.measured("cpu") - before < 0.1
    assert server.err.count("cannot accept") - lines < 10
    for peer in crowd:
        peer.hangs_up()
    eventually(lambda: server.err.count("thread ends: ") == len(crowd), "all of them to have gone")
    server.join("bob").says("MSG hi")
    alice.hears("JOINED bob", "MSG bob hi")

GARBAGE = [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff\xfb\x1f\xff\xfd\x03hello\r\n",
           b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,      # TLS
           b"NICK x\r\nUSER x 0 * :x\r\nPRIVMSG #a :hi\r\n", b"\0" * 3000 + b"\n",
           b"\n\n\r\n" * 1000, "MSG \x1b[2J\x1b]0;x\x07\r\x9b31m\u202e\n".encode()]

def sabotage(server, first, seconds):
    """Connect, send something, and go at any moment, again and again."""
    over = time.monotonic() + seconds
    for n in itertools.takewhile(lambda _: time.monotonic() < over, itertools.count(first, 5)):
        peer = Peer(server.port)
        with contextlib.suppress(ConnectionError, socket.timeout):
            peer.sends(b"JOIN mallory\nMSG hi\nWHO\n"[:n % 24])
            if n % 3:
                peer.says(f"JOIN mallory{n % 7} cave{n % 4}")
                spam = b"MSG spam\nWHO\nROOMS\n" * (n % 50)
                peer.sends(spam if n % 4 else GARBAGE[n // 4 % len(GARBAGE)])
                for k in range(n % 9):
                    peer.says(f"JOIN m{n % 5} cave{k % 3}", "MSG hi", f"JOIN m{n % 5} lobby")
                peer.says(*["LEAVE"] * (n % 5 == 1))
                peer.line(0.2 if n % 5 == 2 else 0.001)
        (peer.resets if n % 2 else peer.hangs_up)()
        time.sleep(0.004)                            # or they come faster than they are accepted

def test_saboteurs(start):
    server = start(Server, "--rate", 200000, "--max-clients", 1000)
    with conversation(server, "ann", "ben", "cem"):
        at_once(sabotage, *((server, number, 0.4) for number in range(5)))
        server.has_clients(3)
        before = server.measured("VmRSS")
        at_once(sabotage, *((server, number, 0.7) for number in range(5)))
        limit = 1024 if GIL else 16384               # KiB, after 700 connections; without the GIL
        assert server.measured("VmRSS") - before < limit     # garbage is collected later

@pytest.mark.parametrize("arguments, clients, talkers, count, pause", [
    ("--rate 0", 50, 10, 30, 0), ("", 50, 10, 5, 0.005),
    ("--rate 0 --max-clients 300", 300, 5, 6, 0)], ids=["fast", "default", "many"])
def test_fan_out(start, arguments, clients, talkers, count, pause):
    """Members speak in turn, each when all have heard the last. Prints figures, judges nothing."""
    server = start(Server, *arguments.split())
    before, peers = server.measured("VmRSS"), [server.join(f"p{n}") for n in range(clients)]
    for peer in peers:
        peer.says("WHO")
        peer.hears_sometime("WHO .*")
        peer.sock.settimeout(None)                   # a deadline would be part of the delay
    memory, delays = (server.measured("VmRSS") - before) / clients, []
    for n, talker in itertools.product(range(count), peers[:talkers]):
        said = time.monotonic()
        talker.says(f"MSG {n}")
        for peer in peers:
            assert peer is talker or peer.sock.recv(4096).endswith(b" %d\n" % n)
        delays.append(time.monotonic() - said)
        time.sleep(pause)
    median, worst = (1000 * sorted(delays)[index] for index in (len(delays) // 2, -1))
    print(f"\n{clients} clients, {len(delays)} messages: "
          f"{len(delays) * (clients - 1) / sum(delays):,.0f} deliveries/s, delay until all have "
          f"it: median {median:.2f} ms, worst {worst:.2f} ms; lost: 0; {memory:.0f} KiB a client")
