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
PATIENCE = 10        # seconds until something that should have happened counts as missing
WINDOWS = os.name == "nt"
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

def edited(folder, script, *edits):
    """Return the path of a copy of `script` with (old, new) edits; each old is in it once."""
    text = (HERE / script).read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{script} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    (folder / script).write_text(text, encoding="utf-8")
    return folder / script

def launched(prologue, script):
    """Return a command that executes `prologue` (Python), then the script in the same process."""
    return "-c", (f"{prologue}\nimport runpy, sys; del sys.argv[0]\n"
                  "runpy.run_path(sys.argv[0], run_name='__main__')"), script

class Process:
    """A script, started as a person starts it; `out` and `err` are what it has printed so far."""

    def __init__(self, *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                 stderr=subprocess.PIPE, cwd=HERE, **more):
        self.popen = subprocess.Popen([sys.executable, *map(str, command)], stdin=stdin,
                                      stdout=stdout, stderr=stderr, cwd=cwd, **more)
        self.shown, self.printed, self.readers = [], [], []
        for pipe, pieces in ((self.popen.stdout, self.shown), (self.popen.stderr, self.printed)):
            if pipe:
                self.readers.append(threading.Thread(target=self.read, args=(pipe, pieces),
                                                     daemon=True))
                self.readers[-1].start()

    def read(self, pipe, pieces):
        with pipe:
            pieces.extend(iter(lambda: os.read(pipe.fileno(), 65536), b""))

    def text(self, pieces):
        return b"".join(pieces[:]).decode(errors="ignore").replace("\r\n", "\n")

    out = property(lambda self: self.text(self.shown))
    err = property(lambda self: self.text(self.printed))

    def types(self, text):
        """Write to the standard input, a pipe."""
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
        for reader in self.readers:
            reader.join(PATIENCE)

    def measured(self, what):
        """Return "cpu" (s), "files" (how many), "VmRSS" or "VmHWM" (KiB); 0 without /proc."""
        proc = Path(f"/proc/{self.popen.pid}")
        if not proc.exists():
            return 0
        if what == "cpu":
            fields = (proc / "stat").read_text().split(")")[1].split()
            return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        if what == "files":
            return len(os.listdir(proc / "fd"))
        return int(re.search(rf"{what}:\s+(\d+)", (proc / "status").read_text())[1])

class Screen:
    """What a terminal shows of what is written to it: rows, a cursor, what has scrolled away."""

    TOKENS = re.compile(r"\033\[[?>0-9;]*[@-~]|\033[^\[]|[^\033]")

    def __init__(self, columns, height):
        self.columns, self.rows, self.scrolled = columns, [[] for _ in range(height)], []
        self.row = self.column = self.top = 0
        self.bottom, self.saved, self.unfinished = height - 1, (0, 0), ""

    def resize(self, columns, height):
        """As xterm does it: rows below the cursor go first; lines are cut, not wrapped again."""
        while len(self.rows) > height:
            if self.row < len(self.rows) - 1:
                self.rows.pop()
            else:
                self.scrolled.append(self.rows.pop(0))
                self.row -= 1
        self.rows = [row[:columns] for row in self.rows] + [[]] * (height - len(self.rows))
        self.rows = [[*row] for row in self.rows]
        self.columns, self.top, self.bottom = columns, 0, height - 1

    def lines(self, first=0):
        """Return the rows from that one on (str), up to the last that is not empty."""
        rows = ["".join(row).rstrip() for row in self.rows[first:]]
        return "\n".join(rows).rstrip("\n").split("\n")

    def write(self, text):
        text = self.unfinished + text
        whole = re.sub(r"\033(\[[?>0-9;]*)?\Z", "", text)        # the end of a code is to come
        self.unfinished = text[len(whole):]
        for token in self.TOKENS.findall(whole):
            if token[0] == "\033":
                self.obey(token)
            elif token == "\n":
                self.newline()
            elif token == "\r":
                self.column = 0
            elif token == "\b":
                self.column = max(0, min(self.column, self.columns - 1) - 1)
            elif unicodedata.combining(token):
                self.rows[self.row][self.column - 1] += token
            elif token >= " ":
                self.put(token)

    def put(self, character):
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + width > self.columns:
            self.column = 0
            self.newline()
        self.fill()[self.column:self.column + width] = [character, ""][:width]
        self.column += width

    def fill(self):
        """Return the row of the cursor, with blanks up to there."""
        row = self.rows[self.row]
        row += " " * (self.column - len(row))
        return row

    def newline(self):
        if self.row == self.bottom:                  # of what scrolls: the whole, or a region
            gone = self.rows.pop(self.top)
            self.rows.insert(self.bottom, [])
            self.scrolled += [gone] * (self.top == 0)
        elif self.row < len(self.rows) - 1:
            self.row += 1

    def obey(self, code):
        kind, last = code[-1], len(self.rows) - 1
        first, *others = [int(number) for number in re.findall(r"\d+", code)] or [0]
        count = max(1, first)
        if code == "\0337":
            self.saved = self.row, self.column
        elif code == "\0338":
            self.row, self.column = min(self.saved[0], last), min(self.saved[1], self.columns)
        elif kind == "r":
            self.top, self.bottom = (first - 1, others[0] - 1) if others else (0, last)
            self.row = self.column = 0
        elif kind == "H":
            self.row, self.column = min(count - 1, last), max(1, *others, 0) - 1
        elif kind not in "mhl=>":                    # colours and modes
            self.column = min(self.column, self.columns - 1)
            row = self.fill()
            if kind in "AB":
                self.row = max(0, min(last, self.row + (count if kind == "B" else -count)))
            elif kind in "CDG":
                to = {"C": self.column + count, "D": self.column - count, "G": count - 1}[kind]
                self.column = max(0, min(self.columns - 1, to))
            elif kind == "P":
                del row[self.column:self.column + count]
            elif kind == "@":
                row[self.column:self.column] = " " * count
            elif kind in "JK":
                del row[0 if first == 2 else self.column:]
                for other in self.rows[0 if first == 2 else self.row + 1:] if kind == "J" else ():
                    other.clear()

class Terminal(Process):
    """A command at a terminal, under a person's hands and eyes."""

    def __init__(self, *command, columns=40, height=24, stderr=subprocess.PIPE, cwd=HERE, **more):
        if not pty:
            pytest.skip("needs a pseudo-terminal")
        self.keyboard, self.tty = pty.openpty()
        self.screen, self.lock, self.closed = Screen(columns, height), threading.Lock(), False
        self.resize(columns, height)
        self.modes = termios.tcgetattr(self.tty)
        more = {"TERM": "xterm-256color", "INPUTRC": os.devnull, **more}
        super().__init__(*command, stdin=self.tty, stdout=self.tty, stderr=stderr, cwd=cwd,
                         env={**os.environ, **more}, start_new_session=True,
                         preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.eyes = threading.Thread(target=self.watch, daemon=True)
        self.eyes.start()

    def watch(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while not self.closed:
            if select.select([self.keyboard], [], [], 0.02)[0]:
                self.shown.append(os.read(self.keyboard, 65536))
                with self.lock:
                    self.screen.write(decoder.decode(self.shown[-1]))

    def resize(self, columns, height):
        with self.lock:
            self.screen.resize(columns, height)
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))

    def look(self):
        """Return the lines on the screen, and the cursor's column."""
        with self.lock:
            return self.screen.lines(), self.screen.column

    def everything(self):
        """Return all lines that are not empty, those that have scrolled away, too."""
        with self.lock:
            rows = ["".join(row).rstrip() for row in self.screen.scrolled + self.screen.rows]
            return [row for row in rows if row]

    def types(self, keys, *lines, cursor=None):
        """Press these keys; then see these lines, if any."""
        os.write(self.keyboard, keys.encode())
        if lines:
            self.sees(*lines, cursor=cursor)

    def sees(self, *lines, cursor=None):
        """These become the last lines on the screen; the cursor stands in that column."""
        def as_expected():
            shown, column = self.look()
            return shown[-len(lines):] == list(lines) and cursor in (None, column)
        eventually(as_expected, lambda: f"{lines}, cursor {cursor}; but saw {self.look()}")

    def scrolls_as_a_whole(self):
        return (self.screen.top, self.screen.bottom) == (0, len(self.screen.rows) - 1)

    def leaves_terminal_as_it_was(self):
        return self.scrolls_as_a_whole() and termios.tcgetattr(self.tty) == self.modes

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

REMOTE = """
import gc, os, signal, socket, threading
def obey():
    for code in iter(lambda: os.read(0, 1000), b""):
        exec(code, globals())
threading.Thread(target=obey, daemon=True).start()
"""

class Server(Process):
    """A server that listens. If it is `remote` a thread in it executes what `types` writes."""

    def __init__(self, *arguments, script=HERE / "server.py", remote=WINDOWS, **more):
        if remote:
            more["stdin"] = subprocess.PIPE
        command = launched(REMOTE, script) if remote else [script]
        super().__init__(*command, 0, *arguments, **more)
        self.peers = []                              # which keeps their connections open
        self.port = int(self.logs(r" listening on \S+:(\d+) ")[1])

    def interrupt(self, signum=signal.SIGINT):
        """Close it, as Ctrl-C or another signal does."""
        if not WINDOWS:
            self.popen.send_signal(signum)
        elif signum == signal.SIGINT:                # nothing sends Ctrl-C to a pipe's other end
            self.types("signal.raise_signal(signal.SIGINT)")
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

    def join_all(self, names):
        """Return a Peer for each name; they join at once, and may have heard JOINED of others."""
        peers = {name: self.connect() for name in names}
        for name, peer in peers.items():
            peer.says(f"JOIN {name}")
        return [it for name, it in peers.items() if it.hears_sometime(f"WELCOME .* {name} .*")]

    def logs(self, pattern, seconds=PATIENCE):
        """Wait for a line of the log that matches."""
        return eventually(lambda: re.search(pattern, self.err, re.M),
                          lambda: f"{pattern!r} in the log:\n{self.err}", seconds)

    def has_clients(self, count):
        """So many threads are left, says the log, and sockets (and 0, 1, 2 and the listener)."""
        eventually(lambda: self.err.count(" starts\n") - self.err.count("thread ends: ") == count,
                   lambda: f"{count} clients in the log:\n{self.err}")
        eventually(lambda: self.measured("files") in (4 + count, 0), "the sockets to be closed")

class ServerAtTerminal(Server, Terminal):
    """A server whose log is shown at a terminal."""
    err = Process.out

class Peer:
    """A raw connection to the server, line by line."""

    def __init__(self, port, receive_buffer=None):
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sends, self.buffer = self.sock.sendall, b""

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
        end = time.monotonic() + seconds
        for line in iter(lambda: self.line(end - time.monotonic()), None):
            if re.fullmatch(pattern, line):
                return line
        pytest.fail(f"the end came before {pattern!r}")

    def reads(self, what, count):
        """Read until `what` (bytes) has come so often; return all of it."""
        data = b""
        while data.count(what) < count:
            data += self.sock.recv(1 << 20) or pytest.fail(f"the end came before {what}")
        return data

    def leaves(self):
        self.says("LEAVE")
        self.hears_sometime("BYE .*")
        self.hears(None)
        self.hangs_up()

    def half_closes(self):
        self.sock.shutdown(socket.SHUT_WR)

    def hangs_up(self):
        self.sock.close()

    def resets(self):                                # instead of an orderly end
        linger = struct.pack("hh" if WINDOWS else "ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()

def starting():
    """Yield start(Class, ...), which makes a process that is stopped in the end."""
    def start(process, *arguments, **more):
        process = process(*arguments, **more)
        stack.callback(process.stop)
        return process
    with contextlib.ExitStack() as stack:
        yield start

start = pytest.fixture(starting, name="start")
start_all = pytest.fixture(starting, scope="module", name="start_all")

@pytest.fixture
def server(start):
    return start(Server)

@pytest.fixture
def fast(start):
    return start(Server, "--rate", 0)                # it reads as fast as anyone sends

SCENARIOS = []

def mostly_waits(scenario):
    """Return a test of a scenario that mostly waits: all of these run at the same time."""
    def test(scenarios):
        scenarios[scenario].result()
    SCENARIOS.append(scenario)
    return test

@pytest.fixture(scope="module")
def scenarios(start_all, tmp_path_factory):
    with concurrent.futures.ThreadPoolExecutor(1 if WINDOWS else len(SCENARIOS)) as pool:
        yield {scenario: pool.submit(scenario, start_all, tmp_path_factory.mktemp("scenario"))
               for scenario in SCENARIOS}

# ---- The protocol, rule by rule -----------------------------------------------------------------

def test_rule_1_rooms(server):
    alice, bob, carol = server.join("alice"), server.join("bob", "Den"), server.join("carol")
    alice.hears("JOINED carol")                      # no room given: the oldest
    carol.asks("ROOMS\nWHO", "ROOMS lobby=2 Den=1", "WHO alice carol")
    alice.leaves()
    carol.hears("LEFT alice")
    carol.asks("JOIN cleo den\nROOMS", "WELCOME Den cleo .*", "ROOMS Den=2")     # deleted at once
    bob.hears("JOINED cleo")
    carol.asks("JOIN cora\nJOIN cora dEN", "WELCOME Den cora .*", "ERROR .*already.*")
    bob.hears("LEFT cleo", "JOINED cora")            # the room one is in, if not the oldest
    bob.asks("JOIN bob tea\nJOIN ben", "WELCOME tea bob .*", "WELCOME tea ben .*")
    assert server.err.count("room lobby created") == server.err.count("room lobby deleted") == 1

NAMES = ["a", "x" * 20, "Ann_Lee-2", "Ünïcödé", "名前", "Имя", "١٢", "_", "-",
         "हिन्दी", "अनीता", "สุดา", "தமிழ்", "José", "ñ" * 20]
NOT_NAMES = ["x" * 21, "a.b", "a=b", "a ☃", "a/b", "a b c", "a\x1b[2J", "a\x00", "a b\u202e",
             "a " + "r" * 21, "\u0301a", "a \u093fb", "\u0bcd", "ñ" * 21]

@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_rule_2_names(fast, form):
    """Letters, marks and digits of any script, composed or not: 20 characters when composed."""
    for name in NAMES:
        joins = unicodedata.normalize(form, f"JOIN {name} {name}")
        fast.connect().asks(joins, f"WELCOME {name} {name} Welcome to Chatroom, {name}!")
    for words in NOT_NAMES:
        joins = unicodedata.normalize(form, f"JOIN {words}")
        fast.connect().asks(f"{joins}\nROOMS", "ERROR .*20.*", "ROOMS .*")

@pytest.mark.parametrize("name, others", [
    ("Alice", ["alice", "ALICE den"]), ("Straße", ["STRASSE"]),
    ("José", ["Jose\u0301", "JOSE\u0301 den"])])
def test_rule_2_unique(server, name, others):
    """Names compare without regard to case, and to how they are composed."""
    owner, other = server.join(name), server.connect()
    for words in others:
        other.asks(f"JOIN {words}", "ERROR .* taken")
    other.asks(f"JOIN other\nJOIN {others[0]}\nWHO", "WELCOME lobby other .*", "ERROR .* taken",
               f"WHO {name} other")
    name = name.lower()                              # of its own it may change the case
    owner.asks(f"JOIN {name}", "JOINED other", f"WELCOME lobby {name} .*")

def test_rule_2_guests(server):
    first, second, last = server.connect(), server.connect(), server.connect()
    names = [guest.asks("JOIN", r"WELCOME lobby guest\d+ .*").split()[2]
             for guest in (first, second)]
    taken = [f"guest{n}" for n in range(1, 20) if f"guest{n}" not in names]
    for guest in taken:                              # whichever it would pick next is taken now
        server.join(guest, "den")
    names.append(last.asks("JOIN", r"WELCOME lobby guest\d+ .*").split()[2])
    assert len({*names, *taken}) == len(taken) + 3

def test_rule_3_moving(server):
    (alice, bob), carol = server.join_both("alice", "bob"), server.join("carol", "den")
    alice.asks("JOIN anna den\nWHO", "WELCOME den anna .*", "WHO carol anna")
    bob.hears("LEFT alice")
    carol.hears("JOINED anna")
    carol.asks("JOIN carol lobby\nROOMS", "WELCOME lobby carol .*", "ROOMS lobby=2 den=1")
    alice.hears_nothing_but("LEFT carol")

@pytest.mark.parametrize("words", ["carol lobby", "alice !", "x y z", "alice", "alice den"])
def test_rule_3_refused_nothing_changes(server, words):
    bob, alice, carol = server.join("bob"), server.join("alice", "den"), server.join("carol", "den")
    alice.asks(f"JOIN {words}\nWHO\nROOMS", "JOINED carol", "ERROR .*", "WHO alice carol",
               "ROOMS lobby=1 den=2")
    bob.hears_nothing_but()
    carol.hears_nothing_but()

def test_rule_4_before_joining(server):
    peer = server.connect()
    peer.says("MSG hi", "WHO", "HELLO", "", "rooms", "leave")
    peer.hears(*["ERROR join a room first.*JOIN.*"] * 2, "ERROR unknown request.*", "ROOMS",
               "BYE .*", None)

def test_rule_5_entering_in_the_middle(server):
    """A client that enters hears what is said, and who enters, from then on; nothing before."""
    (alice, bob), carol = server.join_both("alice", "bob"), server.connect()
    bob.says("MSG before")
    alice.hears("MSG bob before")
    carol.asks("JOIN carol\nWHO", "WELCOME lobby carol .*", "WHO alice bob carol")
    dave = server.join("dave")
    bob.says("MSG after")
    alice.hears_nothing_but("JOINED carol", "JOINED dave", "MSG bob after")
    bob.hears_nothing_but("JOINED carol", "JOINED dave")
    carol.hears_nothing_but("JOINED dave", "MSG bob after")
    dave.hears_nothing_but("MSG bob after")

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

PIECES = [("msg hé€😀\r\n".encode(), "hé€😀"), (b"MsG   a  b \n", "  a  b "),
          (b"MSG a\xffb \xc3( \xe2\x82\n", "a\ufffdb \ufffd( \ufffd"), (b"MSG a\tb\n", "a b"),
          (b"\r\n\n   \nMSG\nMSG \nMSG  \t \nMSG x\nMSG never finished", "x")]

@pytest.mark.parametrize("size", [1, 1000])
def test_rule_6_pieces(server, size):
    bob = server.join("bob")
    for sent, heard in PIECES:
        alice = server.join("alice")
        for start in range(0, len(sent), size):
            alice.sends(sent[start:start + size])
        alice.half_closes()
        bob.hears("JOINED alice", f"MSG alice {re.escape(heard)}", "LEFT alice")
        alice.hears("BYE .*", None)

def test_rule_6_too_long(fast):
    bob, alice = fast.join_both("bob", "alice")
    full, accents = "x" * 1020, "é" * 510
    for text in (full, f"{full}\r", accents):        # the \r belongs to the line ending
        alice.says(f"MSG {text}")
        bob.hears(f"MSG alice {text.rstrip()}")
    for text in (f"{full}x", f"{full}x\r", f"{accents}é"):
        alice.asks(f"MSG {text}\nWHO", "ERROR .*1024.*", "WHO bob alice")
    bob.hears_nothing_but()

def test_rule_6_without_end(fast):
    """A line of 8 MiB takes no memory and gets one ERROR; the others go on."""
    bob, alice = fast.join_both("bob", "alice")
    before = fast.measured("VmRSS")
    alice.sends(b"MSG ")
    for n in range(8):
        alice.sends(b"x" * (1 << 20))
        bob.says(f"MSG {n}")
    alice.sends(b"\nMSG ok\n")
    bob.hears("MSG alice ok")
    assert fast.measured("VmRSS") - before < 512
    heard = sorted(alice.line() for _ in range(9))
    assert heard[0].startswith("ERROR ")
    assert heard[1:] == [f"MSG bob {n}" for n in range(8)]

def test_rule_7_safe_text(server):
    bob, alice = server.join_both("bob", "alice")
    unsafe = [*range(0x20), *range(0x7f, 0xa0), *range(0x2028, 0x202f), *range(0x2066, 0x206a)]
    codes = "".join(chr(code) for code in unsafe if chr(code) not in "\t\n")
    alice.says(f"MSG {codes}.")
    bob.hears("MSG alice " + "\ufffd" * len(codes) + r"\.")
    fine = "👩\u200d🏫 e\u0301 עברית العربية \u200f\u061c\u00a0\ufeff 漢字 \U0001f1e9\U0001f1ea ~"
    alice.says(f"MSG {fine}")
    bob.hears(f"MSG alice {fine}")

def test_rule_9_max_clients(start):
    server = start(Server, "--max-clients", 2)
    alice, bob = server.join("alice"), server.connect()
    for more in (b"", b"JOIN carol\nMSG hi\n" * 2000):
        carol = server.connect()
        with contextlib.suppress(ConnectionError):
            carol.sends(more)
        carol.hears("BYE .*full.*2.*", None)         # and it stays: it takes no place
    bob.asks("JOIN bob", "WELCOME lobby bob .*")
    for _ in range(10):                              # place and name are free again at once
        bob.leaves()
        bob = server.join("bob")
    alice.hears_nothing_but("JOINED bob", *["LEFT bob", "JOINED bob"] * 10)

@mostly_waits
def test_rule_9_join_deadline(start, tmp_path):
    """Of 300 seconds, here 0.3; trickling bytes stretches neither it nor the farewell."""
    script = edited(tmp_path, "server.py", ("JOIN_SECONDS = 300", "JOIN_SECONDS = 0.3"),
                    ("FAREWELL_SECONDS = 1.5", "FAREWELL_SECONDS = 0.2"))
    server = start(Server, script=script)
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
        bob.reads(b"x\n", 16)
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

@mostly_waits
def test_rule_11_pace(start, tmp_path):
    """Short lines count as 100 bytes each, long ones as their length; nothing is lost."""
    def says(count, length):
        alice, bob = start(Server).join_both("alice", "bob")
        started = time.monotonic()
        bob.says(*(f"MSG {n:0{length}}" for n in range(count)))
        alice.hears(*(f"MSG bob {n:0{length}}" for n in range(count)))
        seconds = count * max(100, length) / 8192
        assert 0.7 * seconds < time.monotonic() - started < 2 * seconds + 0.5
    at_once(says, (100, 5), (10, 1000))

@mostly_waits
def test_rule_11_held_back(start, tmp_path):
    """What the server does not read yet waits in 64 KiB (on Linux, in twice as much)."""
    mallory, sent = start(Server, "--rate", 1000).connect(), 0
    mallory.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    mallory.sock.settimeout(0.3)
    with pytest.raises(socket.timeout):
        while sent < 1 << 20:
            sent += mallory.sock.send(b"MSG hi\n" * 100)
    assert 32 * 1024 < sent < 160 * 1024

@mostly_waits
def test_rule_11_a_flooder_is_soon_forgotten(start, tmp_path):
    """However slowly it is read, its name is free within 5 s after it has gone."""
    def floods(rate):
        server = start(Server, "--rate", rate)
        mallory = server.join("mallory")
        mallory.sends(b"x\n" * 2040)
        mallory.hears("ERROR .*")
        time.sleep(0.3)                              # in which it could all be read
        mallory.hangs_up()
        alice = server.connect()
        eventually(lambda: alice.asks("JOIN mallory", ".*").startswith("WELCOME "), seconds=5)
    at_once(floods, (8192,), (100,))

# ---- Leaving and closing ------------------------------------------------------------------------

@pytest.mark.parametrize("end", [Peer.half_closes, Peer.hangs_up, Peer.resets])
def test_rule_8_one_way_out(fast, end):
    """What it has said is delivered, except after a reset; it leaves once; its name is free."""
    alice, bob = fast.join_both("alice", "bob")
    said = [f"MSG bob {n}" for n in range(50)]
    bob.says(*(f"MSG {n}" for n in range(50)))
    alice.hears(*said * (end is Peer.resets))
    end(bob)
    alice.hears_nothing_but(*said * (end is not Peer.resets), "LEFT bob")
    fast.join("bob")
    fast.has_clients(2)

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

def closes(server, *peers, status=0):
    """All hear BYE, and nothing before it; then the server ends, within three seconds."""
    end = time.monotonic() + 3
    for peer in peers:
        peer.hears("BYE the server is closing", None)
    assert server.status(end - time.monotonic()) == status

@mostly_waits
def test_rule_12_closing_while_all_stay(start, tmp_path):
    """They do not even hang up after their BYE; nobody hears LEFT of the others."""
    def stay(name):
        server = start(Server)
        peers = [server.join(f"p{n}", "den" * (n % 2)) for n in range(6)]
        for n, peer in enumerate(peers):
            peer.hears(*(f"JOINED p{other}" for other in range(n + 2, 6, 2)))
        server.interrupt(getattr(signal, name))
        closes(server, *peers)
        assert server.err.count("thread ends: the server is closing") == 6
        assert re.search(r"main +closing: .*\n(.*\n)*.*main +closed\n\Z", server.err)
    at_once(stay, ("SIGINT",), *[("SIGTERM",), ("SIGHUP",)] * (not WINDOWS))

@mostly_waits
def test_rule_12_closing_the_window(start, tmp_path):
    server = start(ServerAtTerminal, stderr=subprocess.STDOUT)
    alice, bob = server.join_both("alice", "bob")
    server.closes()
    closes(server, alice, bob, status=120)           # Python's own: it cannot write any more

@mostly_waits
def test_rule_12_closing_in_the_middle_of_it(start, tmp_path):
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

@needs_unix
@mostly_waits
def test_rule_12_a_second_signal(start, tmp_path):
    """A second Ctrl-C ends a server at once that would go on closing; another signal does not."""
    def signals(second, status, seconds):
        server = start(Server)
        busy = server.join("busy")
        server.interrupt(signal.SIGTERM)
        busy.hears("BYE .*")
        server.interrupt(second)
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):           # something to read off for all of 2 s
            while server.popen.poll() is None and time.monotonic() < end:
                busy.sends(b"x")
                time.sleep(0.01)
        assert server.status(0.2) == status
    at_once(signals, (signal.SIGINT, 1, 0.5), (signal.SIGTERM, 0, 3), (signal.SIGHUP, 0, 3))

@needs_unix
@mostly_waits
def test_rule_12_two_signals_at_once(start, tmp_path):
    """The second comes while the first is being handled: nothing looks like an accident."""
    def closes_twice(first, second):
        server = start(Server)
        for peer in server.join_all([f"p{number}" for number in range(5)]):
            peer.sends(b"MSG a flooder, whose thread rests\n" * 100)
        server.popen.send_signal(first)
        server.popen.send_signal(second)
        for peer in server.peers:
            peer.hangs_up()
        assert server.status(3) in (0, int(second == signal.SIGINT))
        story = r"\d\d:\d\d:\d\d (main|client-\d) +(Chat|con|room|p\d|thread|clos).*"
        assert all(re.fullmatch(story, line) for line in server.err.splitlines()), server.err
    at_once(closes_twice, *itertools.product([signal.SIGINT, signal.SIGTERM], repeat=2),
            *[(signal.SIGINT, signal.SIGTERM)] * 6)

PRINT_OPTIONS = """
for sock in gc.get_objects():
    if isinstance(sock, socket.socket) and sock.fileno() >= 0:
        for name in "SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_USER_TIMEOUT":
            level = socket.SOL_SOCKET if name[0] == "S" else socket.IPPROTO_TCP
            if hasattr(socket, name):
                print(name, sock.getsockopt(level, getattr(socket, name)))
print("done", flush=True)"""

def test_rule_13_keepalive(start):
    """TCP is asked to notice when a machine vanishes. (That it does takes half a minute.)"""
    server = start(Server, remote=True)
    server.join("alice")
    server.types(PRINT_OPTIONS)
    eventually(lambda: "done\n" in server.out)
    assert re.search(r"SO_KEEPALIVE [1-9]", server.out), server.out
    if sys.platform == "linux":
        for value in ("KEEPIDLE 20", "KEEPINTVL 5", "USER_TIMEOUT 30000"):
            assert f"TCP_{value}\n" in server.out, server.out

@pytest.mark.parametrize("old, new, request_", ids=["answer", "broadcast"], argvalues=[
    ('verb == "ROOMS"', 'verb == "ROOMS" and 1 / 0', "ROOMS"),
    ("member.send(lines)", 'member.send(lines if b"!" not in lines else 1 / 0)', "MSG oh!")])
def test_rule_14_an_error_in_the_server(start, tmp_path, old, new, request_):
    """Whoever made the request gets BYE; the traceback is logged at once; the others go on."""
    server = start(Server, script=edited(tmp_path, "server.py", (old, new)))
    alice, bob = server.join_both("alice", "bob")
    bob.says(request_)
    server.logs("ZeroDivisionError", 0.5)
    bob.hears("BYE an error in the server", None)
    alice.hears("LEFT bob")
    server.join("bob").asks("WHO", "WHO alice bob")
    server.logs("thread ends: an error in the server")

# ---- Starting the server, and its log -----------------------------------------------------------

@pytest.mark.parametrize("host, hint", [("127.0.0.1", r"\(this machine only; --host 0.0.0.0 .*"), (
    "0.0.0.0", r"(- on another machine: python client.py [1-9][\d.]+ \d+|.*not on a network\))")])
def test_first_line_of_the_log(start, host, hint):
    """It ends with what is typed on another machine."""
    server = start(Server, "--host", host, "--name", "Room 12\x1b[2J")
    server.logs(rf"^\d\d:\d\d:\d\d main +Room 12\ufffd\[2J listening on {host}:\d+ {hint}\n")

def test_log_that_nobody_reads(start):
    """While the log's terminal stands still nobody waits, and in the end nothing is missing."""
    server = start(ServerAtTerminal, "--rate", 0, stderr=subprocess.STDOUT)
    alice = server.join("alice")
    server.logs("alice joined")
    server.types("\x13")                             # Ctrl-S
    alice.says(*["JOIN !"] * 3000)                   # more to log than a terminal or a pipe holds
    alice.hears(*["ERROR .*"] * 3000)
    ann, ben = server.join_both("ann", "ben")
    for n in range(20):
        server.join(f"visitor{n}", "den").leaves()
        ann.says(f"MSG secret {n}")
    ben.hears(*(f"MSG ann secret {n}" for n in range(20)))
    server.interrupt(signal.SIGTERM)
    alice.hears_sometime("BYE the server is closing")
    server.types("\x11")                             # Ctrl-Q
    assert server.status() == 0
    assert server.err.count("refused: ") == 3000 and "secret" not in server.err
    for line in ("room den created", "joined den", "left den", "room den deleted"):
        assert server.err.count(line) == 20
    assert server.err.endswith("closed\n")

def test_trace(start):
    """It shows the bytes, and who has the lock; one message as in README."""
    server = start(Server, "--trace")
    alice, bob = server.join_both("alice", "bob")
    server.logs(r"client-2 +releases the lock\n\Z")
    before = len(server.err)
    alice.says("MSG hi")
    bob.hears("MSG alice hi")
    expected = next(block for part in README.values() for block in part["trace"])
    eventually(lambda: server.err.count("\n", before) == expected.count("\n"),
               lambda: f"{expected}\nbut saw\n{server.err[before:]}")
    assert re.sub("..:..:..", "", server.err[before:]) == re.sub("..:..:..", "", expected)
    assert not re.search("main .* the lock", server.err)

WRONG = {"server.py": ["", "x", "-1", "65536", "0 1", "0 --max-clients 0", "0 --max-clients x",
                       "0 --rate -1", "0 --name=\t", "0 --host=", "0 --host ä..x", "0 --no-such"],
         "client.py": ["127.0.0.1", "h 0", "h 65536", "h x", "h 1 --name=", "h 1 --name=\t",
                       "h 1 --room=", "h 1 --room=a,b", "h 1 --room=\u0301a", "h 1 --no-such"]}

@pytest.mark.parametrize("script", WRONG)
def test_wrong_arguments(start, script):
    processes = [start(Process, script, *words.split(" ") * bool(words)) for words in WRONG[script]]
    for words, process in zip(WRONG[script], processes):
        assert process.status() == 2 and not process.out, words
        assert process.err.startswith(f"usage: {script} "), words
        assert re.search(rf"^{script}: error: .+$", process.err, re.M), words

@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 70, "127.0.0.1"])
def test_cannot_listen(server, start, host):
    second = start(Process, "server.py", server.port, "--host", host)
    assert second.status() == 1
    message = rf"server.py: cannot listen on {host}:{server.port}: (.+); .+host\n"
    why = re.fullmatch(message, second.err)[1]
    assert WINDOWS or host != "127.0.0.1" or why == "Address already in use"

@pytest.mark.parametrize("host", ["no.such.invalid", "x" * 70, "ä..x", "127.0.0.1"])
def test_cannot_connect(start, host):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))                 # but not listening
        ann = start(Process, "client.py", host, bound.getsockname()[1])
        assert ann.status() == 1
    message = rf"client\.py: cannot connect to {host}:\d+: (.+); .*address.*\n"
    why = re.fullmatch(message, ann.err)[1]
    assert WINDOWS or host != "127.0.0.1" or why == "Connection refused"

# ---- The client in pipes ------------------------------------------------------------------------

class Liar:
    """A server that sends whatever we like."""

    def __init__(self):
        self.listener = self.sock = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port = self.listener.getsockname()[1]

    def accepts(self, data=b"WELCOME r ann hi\n"):
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(data)
        return self.sock

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
    bob = server.join("bob")
    robot = run(start, server, "--name", "robot")
    bob.hears("JOINED robot")
    bob.says("MSG good morning")
    eventually(lambda: "bob: good morning\n" in robot.out, "a line, flushed at once")
    server.join("carol").leaves()
    eventually(lambda: "* carol joined\n* carol left\n" in robot.out)
    robot.types("hello\n  two  spaces\n//who?\n\n")
    robot.popen.stdin.write(b"not \xff UTF-8\n")
    robot.popen.stdin.close()
    bob.hears("JOINED carol", "LEFT carol", "MSG robot hello", "MSG robot   two  spaces",
              "MSG robot /who[?]", "MSG robot not \ufffd UTF-8", "LEFT robot")
    assert robot.status() == 0 and robot.err == ""
    assert robot.out == ("* Welcome to Chatroom, robot! You are robot in lobby.\n"
                         "bob: good morning\n* carol joined\n* carol left\n* you have left\n")

def test_client_commands(start, server):
    bob = server.join("bob")
    commands = ["/who", "/rooms", "/name Anna", "/join LOBBY", "/who", "hello", "/quit", "never"]
    ann = run(start, server, "--name", "ann", "--room", "tea", typed="\n".join(commands) + "\n")
    assert ann.status() == 0
    bob.hears_nothing_but("JOINED Anna", "MSG Anna hello", "LEFT Anna")
    assert [line for line in ann.out.splitlines() if "Welcome" not in line] == [
        "* in this room: ann", "* rooms: lobby with 1, tea with 1", "* in this room: bob, Anna",
        "* you have left"]
    assert re.findall(r"You are (.*)\.", ann.out) == ["ann in tea", "Anna in tea", "Anna in lobby"]

@pytest.mark.parametrize("typed", ["/help", "/dance now", "/join", "/name a b"])
def test_client_help(start, server, typed):
    ann = run(start, server, "--name", "ann", typed=typed + "\n")
    commands = eventually(lambda: re.search(r"^/who  .*\n(/.*\n)+", ann.out, re.M))[0]
    assert commands.count("\n") == 6 and max(map(len, commands.splitlines())) <= 60
    assert (typed in ann.out.replace(commands, "")) == (typed != "/help")

def test_client_loses_nothing(start, fast):
    """All that is typed is sent, in its order; a long line in pieces, cut between characters."""
    bob, long = fast.join("bob"), "".join(f"{number} é日😀 " for number in range(2000))
    lines = [f"line {number}" for number in range(1000)]
    robot = run(start, fast, "--name", "robot", typed="\n".join([*lines, long, *lines]))
    bob.hears("JOINED robot", *(f"MSG robot {line}" for line in lines))
    heard = ""
    while len(heard) < len(long):
        line = bob.line()
        assert len(line.encode()) <= len("MSG robot ") + 1020
        heard += line[len("MSG robot "):]
    assert heard == long
    bob.hears(*(f"MSG robot {line}" for line in lines), "LEFT robot")
    assert robot.status() == 0

@pytest.mark.parametrize("arguments, name, room", [
    ([], "guest1", "lobby"), (["--room", "tea"], "guest1", "tea"),
    (["--name", "a b"], "a_b", "lobby"), (["--name", "José", "--room", "ห้อง"], "José", "ห้อง")],
    ids=str)
def test_client_joins(start, server, arguments, name, room):
    """Without --name as a guest; even the first line is a message then."""
    bob = server.join("bob", room)
    robot = run(start, server, *arguments, typed="hello\n")
    assert robot.status() == 0 and f"You are {name} in {room}.\n" in robot.out
    bob.hears_nothing_but(f"JOINED {name}", f"MSG {name} hello", f"LEFT {name}")

@pytest.mark.parametrize("clients, arguments, reason", [
    (2, ["--name", "bob"], "bob is taken"), (2, ["--name", "b!"], "20 letters"),
    *((1, arguments, r"the server is full \(at most 1 clients\)")
      for arguments in (["--name", "ann"], ["--name", "ann", "--room", "tea"], []))], ids=str)
def test_client_is_refused(start, clients, arguments, reason):
    """A script cannot be asked again: it ends, with the reason and status 1."""
    server = start(Server, "--max-clients", clients)
    bob = server.join("bob")
    robot = run(start, server, *arguments, typed="hello\n")
    assert robot.status() == 1
    assert re.search(reason, robot.out + robot.err), robot.out + robot.err
    bob.hears_nothing_but()

@pytest.mark.parametrize("ending, status", [(Server.interrupt, 0), (Server.stop, 1)],
                         ids=["closed", "killed"])
def test_client_and_the_end_of_the_server(start, server, ending, status):
    robot = run(start, server, "--name", "robot")
    eventually(lambda: "You are robot" in robot.out)
    ending(server)
    assert robot.status(2) == status
    assert robot.err.startswith("client.py: connection lost" * status)
    assert status or "* the server is closing\n" in robot.out

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
    bob = server.join("bob")
    ann = run(start, server, command=launched(IDLE, "client.py"))
    eventually(lambda: "Your name: " in ann.out)
    ann.types("ann\n")
    bob.hears("JOINED ann")
    bob.says("MSG hi")
    eventually(lambda: "bob: hi\n" in ann.out)
    ann.types("hello\n/quit\n")
    bob.hears("MSG ann hello", "LEFT ann")
    assert ann.status() == 0 and ann.err == ""
    assert "\033" not in ann.out and "* you have left\n" in ann.out

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
    sock = liar.accepts()
    eventually(lambda: "You are ann" in robot.out)
    for _ in range(32):
        sock.sendall(b"MSG " + b"x" * 256 * 1024)
    sock.sendall(b"\nMSG bob " + b"y" * 60000 + b"\nMSG bob short\nMSG bob cut o")
    eventually(lambda: "bob: short" in robot.out)
    assert robot.measured("VmHWM") < 24 * 1024
    liar.half_closes()
    assert robot.status() == 1 and robot.err.startswith("client.py: connection lost")
    assert robot.out.endswith("bob: " + "y" * 60000 + "\nbob: short\n") and "x" not in robot.out
    assert robot.out.count("overlong") == 1

# ---- The client at a terminal, and what a person sees of it -------------------------------------

def sit_down(start, server, name="ann", room=None, **more):
    """Start client.py at a terminal; with a name, wait for the prompt after the welcome."""
    words = ["--name", name] * bool(name) + ["--room", room] * bool(room)
    person = start(Terminal, "client.py", "127.0.0.1", server.port, *words, **more)
    if isinstance(server, Liar):
        server.accepts()
    prompt = ">" if name else "Your name:"
    eventually(lambda: person.look()[0][-1] == prompt and ("You are" in person.out) == bool(name),
               lambda: f"the prompt: {person.look()}")
    return person

def pair(start, server, **more):
    """Return bob, a Peer, and ann, at a terminal; both have joined."""
    bob, ann = server.join("bob"), sit_down(start, server, **more)
    bob.hears("JOINED ann")
    return bob, ann

def typing(person):
    """Return what stands in the rows in which one types, and the cursor's row there and column."""
    with person.lock:
        screen = person.screen
        first = len(screen.rows) - min(3, len(screen.rows) // 2)
        return screen.lines(first), screen.row - first, screen.column

def shows(person, line):
    """The line is shown, once, in the conversation."""
    eventually(lambda: person.everything().count(line) == 1, lambda: (line, person.everything()))

def test_client_at_a_terminal(start, server):
    bob, ann = server.join("bob"), sit_down(start, server, None, columns=70)
    ann.types("bob\r", "! the name bob is taken", "Your name:")
    ann.types("b!\r")
    eventually(lambda: "20 letters" in ann.out)
    ann.types("ann\r", "* Welcome to Chatroom, ann! You are ann in lobby.", ">", cursor=2)
    bob.hears("JOINED ann")
    assert typing(ann) == ([">"], 0, 2)
    ann.types("hallo\033[D\033[D\033[D\x7fe", "> hello", cursor=4)             # three to the left
    bob.says("MSG hi")
    ann.sees("bob: hi", "> hello", cursor=4)
    ann.types("\r", "bob: hi", "ann: hello", ">", cursor=2)
    ann.types("//who\r", "ann: hello", "ann: /who", ">")
    ann.types("\033[A\033[A\r", "ann: /who", "ann: hello", ">")                # from the history
    bob.hears("MSG ann hello", "MSG ann /who", "MSG ann hello")
    ann.types("/who\r", "ann: hello", "* in this room: bob, ann", ">")

TYPED = ["half a line", "the middle of it\033[D\033[D\033[D", "x" * 200, "x" * 100 + "\033[D" * 50,
         "x" * 100 + "\x01", "日本語" * 5, "日本語" * 5 + "\033[D\033[D", "😀" * 10, "é" * 30,
         "שלום " * 6, "a search\r\x12sear", "keep it where it was\x0c"]     # Ctrl-A, -R, -L

def test_client_keeps_what_is_being_typed(start, fast):
    """Whatever is being typed: a message moves neither it nor the cursor, and all is sent."""
    def keeps(number, keys):
        bob = fast.join(f"bob{number}", f"room{number}")
        ann = sit_down(start, fast, f"ann{number}", f"room{number}", columns=60)
        ann.types(keys)
        settled(ann)
        before = typing(ann)
        assert "\r" in keys or before[0][0] not in (">", ""), before
        for text in ("one", "two", "three"):
            bob.says(f"MSG {text}")
            shows(ann, f"bob{number}: {text}")
            assert typing(ann) == before
        ann.types("\r")
        text = re.escape(re.sub(r"\033\[D|\r.*|[\x01\x0c]", "", keys))
        bob.hears(f"JOINED ann{number}", *[f"MSG ann{number} {text}"] * (1 + ("\r" in keys)))
        eventually(lambda: typing(ann) == ([">"], 0, 2), lambda: (keys, typing(ann)))
    at_once(keeps, *enumerate(TYPED))

def test_client_window_changes(start, fast):
    """What is typed meanwhile is sent whole, and the next prompt stands where it should."""
    def changes(columns, height):
        bob = fast.join(f"bob{columns}{height}", f"room{columns}{height}")
        ann = sit_down(start, fast, f"ann{columns}{height}", f"room{columns}{height}")
        bob.says(*(f"MSG before {number}" for number in range(20)))
        ann.sees(f"bob{columns}{height}: before 19", ">")
        ann.types("half a line, ", "> half a line,", cursor=15)
        ann.resize(columns, height)
        settled(ann)
        bob.says("MSG meanwhile")
        shows(ann, f"bob{columns}{height}: meanwhile")
        ann.types("and all\r")
        bob.hears("JOINED .*", f"MSG ann{columns}{height} half a line, and all")
        eventually(lambda: typing(ann) == ([">"], 0, 2), lambda: typing(ann))
        bob.says("MSG after")
        ann.sees(f"bob{columns}{height}: after", ">", cursor=2)
        shows(ann, f"bob{columns}{height}: meanwhile")
    at_once(changes, (30, 24), (60, 24), (40, 10), (40, 40), (25, 8))

def test_client_in_a_low_window(start, fast):
    def talks(height):
        ann = sit_down(start, fast, f"ann{height}", f"room{height}", height=height, columns=60)
        bob = fast.join("bob" * height, f"room{height}")
        bob.says("MSG hi")
        eventually(lambda: ": hi" in ann.out)
        ann.types("hello\r/quit\r")
        bob.hears(f"MSG ann{height} hello", f"LEFT ann{height}")
        assert ann.status() == 0 and ann.leaves_terminal_as_it_was()
    at_once(talks, *((height,) for height in (5, 4, 3, 2, 1)))

def test_client_many_messages_while_keys_come(start, fast):
    """400 messages, while a key comes every 2 ms: all are shown, all that is typed is sent."""
    def slowly(act, things):
        for thing in things:
            act(thing)
            time.sleep(0.002)                        # as fast as somebody who leans on a key
    bob, ann = pair(start, fast, columns=60)
    typed = [f"line {number}, which is longer than her window is wide: so" for number in range(3)]
    at_once(slowly, (bob.says, [f"MSG number {n}" for n in range(400)]),
            (ann.types, "\r".join([*typed, "half"])))
    bob.hears(*(f"MSG ann {line}" for line in typed))
    ann.sees("bob: number 399", "> half")
    shown = [line for line in ann.everything() if line.startswith("bob: ")]
    assert shown == [f"bob: number {number}" for number in range(400)]
    ann.types("\025" + "".join(f"pasted {number}\r" for number in range(50)))
    bob.hears(*(f"MSG ann pasted {number}" for number in range(50)))

def test_client_and_the_shell(start, server):
    """The shell's lines stay; Ctrl-Z gives its screen back, and fg goes on with the chat."""
    shell = start(Terminal, "-c", "import os; os.execvp('bash', ['bash', '--norc', '-i'])",
                  columns=80, stderr=subprocess.STDOUT, PS1="$ ", HISTFILE=os.devnull)
    shell.types("echo one; echo two\r", "one", "two", "$")
    bob = server.join("bob")
    shell.types(f"{sys.executable} client.py 127.0.0.1 {server.port} --name ann\r")
    shell.sees(">")
    bob.hears("JOINED ann")
    shell.types("hal", "> hal")
    assert "two" in shell.look()[0]
    shell.types("\x1a")
    eventually(lambda: shell.everything()[-1] == "$", lambda: shell.look())
    assert shell.scrolls_as_a_whole()
    bob.says("MSG hi")
    shell.types("fg\r")
    shows(shell, "bob: hi")
    shell.types("lo\r")
    bob.hears("MSG ann hallo")
    shell.types("/quit\r")
    eventually(lambda: shell.everything()[-2:] == ["* you have left", "$"], lambda: shell.look())
    shell.types("echo three\r", "three", "$")

@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": ""}, {"TERM": "dumb"}], ids=str)
def test_client_colours(start, server, environment):
    """At a dumb terminal a message is a line; what was half typed is not lost."""
    carol, (bob, ann) = server.join("carol"), pair(start, server, columns=80, **environment)
    ann.types("hel", "> hel")
    bob.says("MSG one")
    carol.says("MSG two")
    eventually(lambda: "one" in ann.out and "two" in ann.out)
    ann.types("lo\r")
    carol.hears("JOINED bob", "JOINED ann", "MSG bob one", "MSG ann hello")
    colours = dict(re.findall(r"\033\[38;5;(\d+)m(bob|carol)\033\[0m: ", ann.out))
    assert len(colours) == (0 if environment else 2)
    assert bool(re.search(r"\033\[[0-9;]*m", ann.out)) == (not environment)
    assert ("\033" in ann.out) == ("TERM" not in environment)

LIES = (b"\033[2J\033]0;owned\007 MSG\nMSG \033[31mred \r\033[Kboo\x9b1m\nMSG\nMSG \nMSG x\n\n \n"
        b"JOINED\nLEFT \nWHO\nROOMS\nROOMS = a==b\nWELCOME\nWELCOME x\nERROR\nMSG ESC7 \0337\033M\n"
        b"HELLO w\xc3\xb6rld\xff\xfe\xc3\n\0\0\nMSG a \xe2\x80\xaeb\xe2\x80\xa8\x7f\tc\r\n")

def test_client_and_a_server_that_lies(start):
    liar = start(Liar)
    ann = sit_down(start, liar, columns=200)
    liar.sock.sendall(LIES + b"WELCOME r ann hi\nBYE\033[2J\nBYE \033[3J\n")
    assert ann.status() == 0 and ann.leaves_terminal_as_it_was()
    shows(ann, "? HELLO wörld\ufffd\ufffd\ufffd")
    shows(ann, "a: \ufffdb\ufffd\ufffd c")
    for code in ("\033[2J", "\033[31m", "\033[3J", "\033]", "\033M", "\x9b", "\u202e", "\u2028"):
        assert code not in ann.out

def test_client_flooded_by_the_server(start):
    """As many lines as the terminal takes: what is typed goes out at once; memory is bounded."""
    liar = start(Liar)
    ann, over = sit_down(start, liar), threading.Event()
    liar.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    flooder = threading.Thread(daemon=True, target=lambda: [
        liar.sock.sendall(b"MSG bob buy my book\n" * 100) for _ in iter(over.is_set, True)])
    flooder.start()
    eventually(lambda: sum(map(len, ann.shown)) > 200000)
    for number in range(5):
        ann.types(f"typed {number}\r")
        began, heard = time.monotonic(), b""
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

@pytest.mark.parametrize("ending", [Liar.half_closes, Liar.stop], ids=["end of file", "reset"])
def test_client_ends_at_once(start, ending):
    """Whatever it is doing, it shows messages, and ends within 0.3 s without a key."""
    def ends(doing):
        liar = start(Liar)
        ann = sit_down(start, liar)
        ann.types(DOING[doing])
        settled(ann)
        before = ann.measured("cpu")
        liar.sock.sendall(b"MSG bob hi\n")
        shows(ann, "bob: hi")
        assert ann.measured("cpu") - before < 0.1, "waiting costs nothing"
        began = time.monotonic()
        ending(liar)
        assert ann.status(3) == 1 and time.monotonic() - began < 0.3, doing
        assert "client.py: connection lost; start again when" in ann.err
        assert ann.leaves_terminal_as_it_was(), doing
    at_once(ends, *((doing,) for doing in DOING))

LEFT = [("ann", "/quit\r"), ("ann", "half\3"), ("ann", "\3"), ("ann", "\4"), (None, "\3"),
        (None, "\4")]
ENDS = [("ann", Server.interrupt, "* the server is closing"), ("ann", Server.stop, None),
        (None, Server.stop, None), *((*left, "* you have left") for left in LEFT)]

@mostly_waits
def test_client_ends(start, tmp_path):
    """By a command, a key or the end of the server: it tells the reason."""
    def ends(name, ending, reason):
        server = start(Server)
        bob, ann = server.join("bob"), sit_down(start, server, name)
        time.sleep(0.1)                              # readline may miss a Ctrl-C that comes at once
        if isinstance(ending, str):
            ann.types(ending)
            bob.hears(*["JOINED ann", "LEFT ann"] * bool(name))
        else:
            ending(server)
        assert ann.status(2) == (not reason) and ann.leaves_terminal_as_it_was()
        eventually(lambda: not reason or ann.everything()[-1] == reason, lambda: ann.look())
        assert ann.err.startswith("client.py: connection lost" * (not reason))
    at_once(ends, *ENDS)

# ---- README: what it says is what happens -------------------------------------------------------

def parsed(text):
    """Return {heading: {language: [block, ...]}}; a `diff` is (script, old, new)."""
    parts, heading, script = {}, "", ""
    for match in re.finditer(r"^#+ ([^\n]*)|[Ii]n `(\w+\.py)`|^ *```(\w+)\n(.*?)^ *```$", text,
                             re.M | re.S):
        heading, script = match[1] or heading, match[2] or script
        blocks = parts.setdefault(heading, collections.defaultdict(list))
        if match[3] == "diff":
            lines = textwrap.dedent(match[4]).splitlines()
            old, new = ("".join(f"\n{line[1:]}" for line in lines if line[0] != sign)
                        for sign in "+-")
            blocks["diff"].append((script, f"{old}\n", f"{new}\n"))
        elif match[3]:
            blocks[match[3]].append(textwrap.dedent(match[4]))
    return parts

README_TEXT = (HERE / "README.md").read_text(encoding="utf-8")
README = parsed(README_TEXT)
COMMANDS = next(part["sh"] for part in README.values() if "client.py" in "".join(part["sh"]))
BY_HAND = [heading for heading in README if "wait for the reader" in heading]
LESSONS = [heading for heading, part in README.items() if part["transcript"]]
PORTS = itertools.count(20000 + os.getpid() % 10000)         # no system gives these to clients

def free_port():
    return next(port for port in PORTS if socket.socket().connect_ex(("127.0.0.1", port)))

def test_forty_lines(start, tmp_path):
    """README's first server works, as long as everyone is nice and types slowly."""
    def connect():
        with contextlib.suppress(ConnectionRefusedError):
            return Peer(port)
    code = next(part["python"][0] for part in README.values() if part["python"])
    (tmp_path / "forty.py").write_text(code, encoding="utf-8")
    assert code.count("\n") <= 40
    port = free_port()
    start(Process, tmp_path / "forty.py", port)
    ann, bob = eventually(connect), eventually(connect)
    ann.hears("Your name[?]")
    ann.asks("ann", "ann joined")
    bob.hears("Your name[?]")
    bob.asks("bob", "bob joined")
    ann.asks("hi bob", "bob joined")
    bob.hears("ann: hi bob")
    bob.asks("bye", "Goodbye!", None)
    ann.hears("bob left")

NC = """#!/bin/bash
until exec 3<>/dev/tcp/$1/$2; do sleep 0.05; done 2> /dev/null
cat <&0 >&3 &
cat <&3
"""

class Replay:
    """What README shows under a heading, to be played with the real scripts in real terminals.

    Each command of `sh` has a column of `transcript`: there `$` starts it; what follows `> ` or
    `Your name: ` is typed, and so are (Enter), ^C and ^\\; … is anything; what stands in brackets
    is a direction; all the rest is what is to be seen. A `diff` is an edit.
    """

    def __init__(self, start, folder, heading, left_out=0):
        part, port = README[heading], str(free_port())
        self.start, self.folder, self.rows = start, folder, []
        commands = "".join(part["sh"] or COMMANDS).replace("12345", port)
        self.commands = re.findall(r"^(\S.*(?:\n .*)*)", commands, re.M)
        python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        for name, text in (("python", python), ("nc", NC), ("forty.py", "".join(part["python"]))):
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        edits = part["diff"][:len(part["diff"]) - left_out]
        for script in ("server.py", "client.py"):
            edited(folder, script, *(edit[1:] for edit in edits if edit[0] == script))
        for line in "".join(part["transcript"]).splitlines()[2:]:
            cells = enumerate(line.split("|"))
            self.rows.append([cell[number > 0:].rstrip() for number, cell in cells])
            for number, cell in enumerate(self.rows[-1]):
                if cell.startswith("    "):          # the last cell of this column goes on
                    last = next(row for row in self.rows[-2::-1] if row[number])
                    last[number], self.rows[-1][number] = f"{last[number]} {cell.strip()}", ""

    def run(self, number):
        """Start a command beside the scripts; wait until it listens, or shows something."""
        command = self.commands[number]
        command = command if re.search(r"[|(]", command) else f"exec {command}"
        shell = f"import os; os.execvp('bash', ['bash', '-c', {command!r}])"
        terminal = self.start(Terminal, "-c", shell, columns=200, height=60,
                              stderr=subprocess.STDOUT, cwd=self.folder,
                              PATH=f"{self.folder}:{os.environ['PATH']}")
        awaited = {"exec python server": " listening on ", "exec python client": "You are"}
        eventually(lambda: awaited.get(command[:18], "") in terminal.out or
                   "Your name:" in terminal.out, lambda: terminal.out)
        return terminal

    def play(self, patience=PATIENCE):
        """Play the transcript, row by row; fail if something else is seen."""
        running, expected = {}, collections.defaultdict(list)
        for row in self.rows:
            for number, cell in enumerate(row):
                if cell == "$":
                    running[number] = self.run(number)
                elif cell:
                    self.act(number, running[number], cell, expected[number], patience)
            for number in running:                   # more may follow
                sees(running[number], expected[number] + ["…"], patience)
            quiet = [running[number] for number in running if row[number] == "(nothing)"]
            before = [terminal.out for terminal in quiet]
            time.sleep(0.4 if quiet else 0)          # in all that time
            assert before == [terminal.out for terminal in quiet]
        for number in filter(expected.get, running):         # but not at the end
            sees(running[number], expected[number], patience)

    def act(self, number, terminal, cell, expected, patience):
        """Do what a cell says, or note what is then to be seen."""
        typed = re.match(r"> (.*)|Your name: (.*)", cell)
        if typed or cell in ("^C", "^\\", "(Enter)"):
            keys = typed[1] or typed[2] if typed else ""
            terminal.types({"^C": "\3", "^\\": "\34"}.get(cell, keys + "\r"))
            expected += [keys] * self.commands[number].startswith("nc ")         # its echo
        elif cell == "(the screen is cleared)":
            eventually(lambda: "\033[2J" in terminal.out, lambda: terminal.out, patience)
            expected.clear()
        elif cell == "(a processor is busy)":        # half of one, for half a second
            before = terminal.measured("cpu")
            eventually(lambda: not before or terminal.measured("cpu") - before > 0.25,
                       "a busy processor", patience)
        elif cell[0] != "(":
            expected.append(cell)

def sees(terminal, expected, patience):
    """The lines on its screen become the expected ones; prompts do not count."""
    def masked(line):
        line = re.sub(r"\^[C\\]|^> .*|^>$|^Your name:.*", "", line)
        return re.sub(r"127\.0\.0\.1:\d+|^\d\d:\d\d:\d\d", "N", line)
    def as_expected():
        seen = "".join(f"{line}\n" for line in map(masked, terminal.everything()) if line)
        return re.fullmatch(pattern, seen)
    pattern = "".join(r"(.*\n)*" if line == "…" else re.escape(masked(line)) + "\n"
                      for line in expected)
    eventually(as_expected, lambda: f"{expected}; there is {terminal.everything()}", patience)

def play_by_hand(replay, is_edited):
    """Bob presses Ctrl-Z while zoe floods the room: only with the edit everybody waits for him."""
    server, bob, alice = map(replay.run, range(3))
    os.killpg(bob.popen.pid, signal.SIGSTOP)
    replay.run(3)
    if not is_edited:
        eventually(lambda: "* bob left" in alice.everything() and "not reading" in server.out)
        return
    eventually(lambda: alice.out.count("zoe") > 100, "a flood")
    settled(alice, 0.3)
    alice.types("/who\r")
    settled(alice, 0.3)
    assert "in this room" not in alice.out and "bob left" not in alice.out
    os.killpg(bob.popen.pid, signal.SIGCONT)         # fg
    eventually(lambda: "* in this room: bob, alice, zoe" in alice.out, "an answer")

@pytest.fixture(scope="module")
def plays(start_all, tmp_path_factory):
    """{heading: futures of its plays}; they mostly wait, and do that at the same time."""
    def play(folder, heading, left_out, function, *arguments):
        function(Replay(start_all, folder, heading, left_out), *arguments)
    plays = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        def submit(heading, *arguments):
            folder = tmp_path_factory.mktemp("lesson")
            plays[heading].append(pool.submit(play, folder, heading, *arguments))
        for heading in LESSONS if pty else ():
            submit(heading, 0, Replay.play)
            if README[heading]["diff"]:
                submit(heading, 1, lambda it: pytest.raises(pytest.fail.Exception, it.play, 1))
        for heading in BY_HAND if pty else ():
            submit(heading, 0, play_by_hand, True)
            submit(heading, len(README[heading]["diff"]), play_by_hand, False)
        yield plays

@pytest.mark.parametrize("heading", LESSONS + BY_HAND)
def test_lesson(plays, heading):
    """One sees what README shows; without the last edit of an experiment one does not."""
    if not pty:
        pytest.skip("needs a pseudo-terminal")
    for future in plays[heading]:
        future.result()

@pytest.mark.parametrize("script, defaults", [("server.py", ["100", "8192"]), ("client.py", [])])
def test_readme_options(start, script, defaults):
    described = start(Process, script, "--help")
    assert described.status() == 0
    for words in re.findall(rf"python {script}([^`\n|&>)]*)", README_TEXT):
        assert all(option in described.out for option in re.findall(r"--[\w-]+", words)), words
    for number in defaults:
        assert number in described.out and number in README_TEXT

@pytest.mark.parametrize("constant, words", [
    ("MAX_REQUEST", "{} bytes"), ("JOIN_SECONDS", "{} seconds"), ("FAREWELL_SECONDS", "{} seconds"),
    ("SEND_BUFFER", "{} KiB"), ("RECEIVE_BUFFER", "{} KiB")])
def test_readme_constants(constant, words):
    code = (HERE / "server.py").read_text(encoding="utf-8")
    number = re.search(rf"^{constant} = (\d+)( \* 1024)? ", code, re.M)[1]
    assert words.format(number) in " ".join(README_TEXT.split())

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

LATE = 2 if WINDOWS else 0.25            # seconds; what stands for Windows here may be slow

class Conversation:
    """People in a room who talk all the time. Leaving the `with` block checks how they fared:

    nothing is lost, doubled, cut, out of order or later than LATE; nothing has come but lines of
    the protocol, without control characters; nobody has come or left twice; nobody else is left.
    """

    def __init__(self, server, names=("ann", "ben")):
        self.server, self.over = server, False
        self.peers = dict(zip(names, server.join_all(names)))
        self.sent, self.heard, self.threads = {}, {}, []     # for each: times; (time, line)
        for name, peer in self.peers.items():
            peer.says("WHO")
            self.sent[name], self.heard[name] = [], [(0, peer.hears_sometime("WHO .*"))]
            self.threads.append(threading.Thread(target=self.live, args=(name,)))

    def live(self, name):
        """Say something every 20 ms; when it is over, listen until all has come."""
        peer, due = self.peers[name], time.monotonic()
        while not self.over or self.missing(name) and time.monotonic() < self.over + PATIENCE:
            if not self.over and time.monotonic() >= due:
                self.sent[name].append(time.monotonic())
                peer.says(f"MSG {len(self.sent[name]) - 1}")
                due = time.monotonic() + 0.02
            with contextlib.suppress(socket.timeout):
                self.heard[name].append((time.monotonic(), peer.line(0.01) or "END"))

    def missing(self, name):
        """Return how many messages of the others it has not heard."""
        lines = [line for _, line in self.heard[name] if line.startswith("MSG ")]
        heard = [line.split()[1] in self.peers for line in lines]
        return sum(len(self.sent[other]) for other in self.peers if other != name) - sum(heard)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over = time.monotonic()
        for thread in self.threads:
            thread.join()
        for name in self.peers:
            self.check(name)
        eventually(self.alone, "nobody else to be there").leaves()
        self.server.has_clients(len(self.peers))
        assert "Traceback" not in self.server.err

    def alone(self):
        """Return a new peer, joined, if there is nobody but those names, in one room; else None."""
        peer = self.server.connect()
        peer.says("JOIN witness", "ROOMS", "WHO")
        rooms, who = peer.hears_sometime("ROOMS .*"), peer.hears_sometime("WHO .*")
        alone = {*who.split()[1:]} == {*self.peers, "witness"} and len(rooms.split()) == 2
        return peer if alone else peer.leaves()

    def check(self, name):
        (_, who), *lines = self.heard[name]
        present, counts = set(who.split()[1:]), collections.Counter()
        for began, line in lines:
            assert re.fullmatch(r"(MSG|JOINED|LEFT) [\w-]{1,20}( .*)?", line), (name, line)
            assert line.isprintable(), (name, line)
            verb, other, *text = line.split(" ", 2)
            assert (other in present) != (verb == "JOINED"), f"{name} heard {line!r}, of {present}"
            present = present - {other} if verb == "LEFT" else present | {other}
            if verb == "MSG" and other in self.peers:
                assert text[0] == str(counts[other]), f"{name} heard {line!r}, not {counts[other]}"
                late = began - self.sent[other][counts[other]]
                assert late < LATE, f"{name} heard {line!r} after {late:.2f} s"
                counts[other] += 1
        assert not self.missing(name), f"{name} heard {counts}"

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

@pytest.mark.parametrize("lines, end", [(MESSAGES, Peer.hangs_up), (OTHERS, Peer.resets)],
                         ids=["messages", "others"])
def test_many_flooders(server, lines, end):
    """Those who talk among them are neither slowed down nor dropped."""
    with Conversation(server):
        flooders = [server.join(f"flooder{n}") for n in range(len(lines))]
        floods = [line.replace(b"%d", b"%d" % n) for n, line in enumerate(lines)]
        at_once(flood, *zip(flooders, floods))
        assert "dropped" not in server.err and "ends" not in server.err
        for peer in flooders:
            end(peer)
        eventually(lambda: server.err.count("thread ends") == len(lines), "all to leave")

def test_a_frozen_reader_delays_nobody(fast):
    """Many messages go to one that does not read, until it is dropped, and after that."""
    with Conversation(fast):
        fast.join("frozen", receive_buffer=4096)
        talker = fast.join("talker")
        for _ in range(60):
            talker.says(*[f"MSG {'x' * 1000}"] * 16)
            time.sleep(0.005)
        fast.logs("dropped: not reading")
        talker.leaves()

def test_ninety_at_once_with_long_names(start, tmp_path):
    """What they say while they wait for the lock is more than a send buffer holds."""
    edit = ('verb == "ROOMS"', 'verb == "ROOMS" and not time.sleep(0.3)')
    server = start(Server, "--rate", 0, script=edited(tmp_path, "server.py", edit))
    reader = server.join("reader")
    peers = server.join_all(f"{'𠀀' * 18}{n}" for n in range(90))
    reader.says("ROOMS")                             # all the others have to wait
    for peer in peers:
        peer.sends(b"MSG x\n" * 84 + b"LEAVE\n")
    heard = reader.reads(b"LEFT ", 90)               # a client that reads is not dropped
    assert heard.count(b" x\n") > 20 * 84            # not 90: these do not read

@needs_unix
@pytest.mark.parametrize("limit, value, message", ids=["files", "threads"], argvalues=[
    ("RLIMIT_NOFILE", 12, "cannot accept: "),
    pytest.param("RLIMIT_AS", 200 << 20, "thread ends: .*(start new thread|allocate)",
                 marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it"))])
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
    assert server.err.count("cannot accept") - lines < 6
    for peer in crowd:
        peer.hangs_up()
    eventually(lambda: server.err.count("thread ends: ") == len(crowd), "all of them to have gone")
    server.join("bob").says("MSG hi")
    alice.hears("JOINED bob", "MSG bob hi")

GARBAGE = [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff\xfb\x1f\xff\xfd\x03hello\r\n",
           b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,      # TLS
           b"NICK x\r\nUSER x 0 * :x\r\nPRIVMSG #a :hi\r\n", b"\0" * 3000 + b"\n",
           b"\n\n\r\n" * 1000, "MSG \x1b[2J\x1b]0;x\x07\r\x9b31m\u202e\n".encode()]

def sabotage(server, first, over):
    """Connect, send something, and go at any moment, again and again."""
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
        (peer.resets if n % 2 and not WINDOWS else peer.hangs_up)()
        time.sleep(0.004)                            # or they come faster than they are accepted

def test_saboteurs(start):
    """Three honest talkers among five saboteurs, who leave no trace."""
    server = start(Server, "--rate", 200000, "--max-clients", 1000)
    with Conversation(server, ("ann", "ben", "cem")):
        at_once(sabotage, *((server, number, time.monotonic() + 0.4) for number in range(5)))
        server.has_clients(3)
        before = server.measured("VmRSS")
        at_once(sabotage, *((server, number, time.monotonic() + 0.7) for number in range(5)))
        assert server.measured("VmRSS") - before < 1024      # KiB, after 700 connections

@pytest.mark.parametrize("arguments, clients, talkers, count, pause", [
    ("--rate 0", 50, 10, 30, 0), ("", 50, 10, 5, 0.005),
    ("--rate 0 --max-clients 300", 300, 5, 6, 0)], ids=["fast", "default", "many"])
def test_fan_out(start, arguments, clients, talkers, count, pause):
    """Some members say a message each, in turn; each when all have heard the last, `pause` s later.

    The figures are printed, not judged. The delay is the time until the last member has heard it.
    """
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
