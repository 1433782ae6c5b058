"""Tests of the chatroom: the real scripts as processes, real sockets, a real terminal (pty).

    python -m pytest                      all of it
    python -m pytest -s -k fan_out        how fast it is on this machine

A test starts a server of its own on a free port, and reads like the protocol:
`alice.says("MSG hi")`, `bob.hears("MSG alice hi")`. Waiting has a deadline, never a fixed length.
"""
import collections
import concurrent.futures
import contextlib
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from pathlib import Path

import pytest

try:
    import fcntl
    import pty
    import readline
    import resource
    import termios
except ImportError as missing:
    raise pytest.Collector.CollectError(f"these tests need a Unix (pseudo-terminals, readline): {missing}") from None

os.environ.pop("PYTHONUNBUFFERED", None)         # it would hide that a flush is missing
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's & would hand on that Ctrl-C is ignored
HERE = Path(__file__).parent
PATIENCE = 10        # seconds until something that should have happened counts as missing
LIBEDIT = "libedit" in readline.__doc__

# ---- Helpers ------------------------------------------------------------------------------------

def eventually(condition, what="it", seconds=PATIENCE):
    """Wait until `condition()` is true, and return its value; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what() if callable(what) else what}"
        time.sleep(0.005)
    return value

def edited(folder, script, *edits):
    """Return the path of a copy of `script` with (old, new) edits; each old must be in it once."""
    text = (HERE / script).read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{script} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    (folder / script).write_text(text, encoding="utf-8")
    return folder / script

def at_once(function, *arguments):
    """Run function(*each) for each of the tuples at the same time, since most of it is waiting; fail if one fails."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
    for future, each in zip(futures, arguments):
        assert not future.exception(), f"{each}: {future.exception()!r}"

class Process:
    """A script, started as a person starts it; `out` and `err` are what it has printed so far."""

    def __init__(self, *command, stdin=subprocess.DEVNULL, stdout=None, stderr=None, cwd=HERE, **more):
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        self.popen = subprocess.Popen([sys.executable, *map(str, command)], stdin=stdin, cwd=cwd,
                                      stdout=stdout or self.files[0], stderr=stderr or self.files[1], **more)

    def printed(self, file):
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="ignore")

    out = property(lambda self: self.printed(self.files[0]))
    err = property(lambda self: self.printed(self.files[1]))

    def status(self, seconds=PATIENCE):
        """Wait for the end; return the exit status. No traceback is ever printed."""
        status = self.popen.wait(seconds)
        assert not re.search("Traceback|Exception", self.out + self.err), self.out + self.err
        return status

    def stop(self):
        self.popen.kill()
        self.popen.wait()

    def measured(self, what):
        """Return "VmRSS", "VmHWM" (KiB of memory: now, at most), "cpu" (seconds) or "files"; 0 where it is unknown."""
        proc = Path(f"/proc/{self.popen.pid}")
        if not proc.exists():
            memory = subprocess.getoutput(f"ps -o rss= -p {self.popen.pid}").strip() if what == "VmRSS" else ""
            return int(memory) if memory.isdigit() else warnings.warn(f"not checked here, without /proc: {what}") or 0
        if what == "cpu":
            return sum(map(int, (proc / "stat").read_text().split(")")[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        if what == "files":
            return len(os.listdir(proc / "fd"))
        return int(re.search(rf"{what}:\s+(\d+)", (proc / "status").read_text())[1])

def screen(output, columns):
    """Return what a terminal so many columns wide, with rows enough, shows: its lines (list of str), row and column."""
    rows, row, column = collections.defaultdict(list), 0, 0
    output = re.sub(r"\033(\[[?0-9;]*)?$", "", output)        # a code whose end is still to come
    for token in re.findall(r"\033\[[?0-9;]*[a-zA-Z@]|\033.|[^\033]", output, re.DOTALL):
        code, number = token[-1] if token[0] == "\033" else "", max(1, int(re.sub(r"\D", "", token.split(";")[0]) or 0))
        row, column = {"\r": (row, 0), "\n": (row + 1, column), "\033[H": (0, 0)}.get(token, (row, column))
        if token == "\b" or code and code != "m":
            column = min(column, columns - 1)
        line = rows[row]
        if code:
            line += " " * (column - len(line))
        if token == "\b" or code == "D":
            column = max(0, column - number)
        elif code == "A":
            row = max(0, row - number)
        elif code in ("C", "G"):
            column = min(columns - 1, column + number) if code == "C" else number - 1
        elif token == "\033[2J":
            rows.clear()
        elif token in ("\033[K", "\033[J"):
            del line[column:]
            for below in [below for below in rows if below > row and code == "J"]:
                del rows[below]
        elif code == "P":
            del line[column:column + number]
        elif code == "@":
            line[column:column] = " " * number
        elif code:
            assert code in "mhlH", f"unknown: {token!r}"
        elif unicodedata.combining(token):
            line[column - 1] += token
        elif token >= " ":
            width = 2 if unicodedata.east_asian_width(token) in "WF" else 1
            if column + width > columns:                     # the last column was full: autowrap
                row, column = row + 1, 0
                line = rows[row]
            line += " " * (column - len(line))
            line[column:column + width] = [token, ""][:width]
            column += width
    return ["".join(rows[number]).rstrip() for number in range(max([*rows, row]) + 1)], row, column

class Terminal(Process):
    """A command at a terminal, under a person's hands and eyes: keys go in, `sees` looks at the screen."""

    leaves_rows = LIBEDIT        # it cannot clear a half-typed line: of several rows the upper ones stay behind

    def __init__(self, *command, columns=40, stderr=None, cwd=HERE, **environment):
        self.keyboard, self.tty = pty.openpty()
        self.resize(columns)
        self.modes, self.shown = termios.tcgetattr(self.tty), b""
        super().__init__(*command, stdin=self.tty, stdout=self.tty, stderr=stderr, cwd=cwd, start_new_session=True,
                         env={**os.environ, "TERM": "xterm-256color", "INPUTRC": os.devnull, **environment},
                         preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.eyes = threading.Thread(target=self.watch, daemon=True)
        self.eyes.start()

    def watch(self):
        with contextlib.suppress(OSError):                   # the terminal has been closed
            for data in iter(lambda: os.read(self.keyboard, 65536), b""):
                self.shown += data

    out = property(lambda self: self.shown.decode(errors="ignore"))

    def resize(self, columns):
        self.columns = columns
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys, *lines, cursor=None):
        """Type; then see these lines, if any. (Ctrl-C waits a little: readline may miss one that comes at once.)"""
        time.sleep(0.05 if keys == "\3" else 0)
        with contextlib.suppress(OSError):                   # the terminal has been closed
            os.write(self.keyboard, keys.encode())
        if lines:
            self.sees(*lines, cursor=cursor)

    lines = property(lambda self: screen(self.out, self.columns)[0])

    def sees(self, *lines, cursor=None):
        """The last lines on the screen become these; the cursor stands `cursor` columns from the left."""
        def as_expected():
            shown, _, column = screen(self.out, self.columns)
            return "\n".join(["", *shown]).rstrip("\n").endswith("\n".join(["", *lines])) and cursor in (None, column)
        eventually(as_expected, lambda: f"{lines}, cursor {cursor}; but saw {screen(self.out, self.columns)}")

    def hears(self, bob, message, *lines, cursor=None):
        """bob says something; then this stands on the screen."""
        bob.says(f"MSG {message}")
        self.sees(*lines, cursor=cursor)

    def sees_below(self, messages, typed, cursor=None):
        """What has been typed stands below these messages; where rows of it are left behind, below the last of them."""
        rows, row, column = screen(typed, self.columns)
        self.sees(*messages[-1 if self.leaves_rows and (row or column == self.columns) else 0:], *rows, cursor=cursor)

    def leaves_terminal_as_it_was(self):
        return termios.tcgetattr(self.tty) == self.modes

    def stop(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        super().stop()
        os.close(self.tty)
        self.eyes.join(PATIENCE)
        os.close(self.keyboard)

def frozen(terminal, seconds=0.3):
    """Wait until nothing has come in all that time."""
    shown = -1
    while shown < len(terminal.shown):
        shown = len(terminal.shown)
        time.sleep(seconds)

class Server(Process):
    """A server that listens."""

    def __init__(self, *arguments, script=HERE / "server.py", **more):
        super().__init__(script, 0, *arguments, **more)
        self.peers = []                                      # which keeps their connections open
        self.port = int(self.logs(r" listening on \S+:(\d+) ")[1])

    def connect(self, **options):
        self.peers.append(Peer(self.port, **options))
        return self.peers[-1]

    def join(self, name, room="", **options):
        """Return a Peer that has joined."""
        peer = self.connect(**options)
        peer.asks(f"JOIN {name} {room}".strip(), rf"WELCOME \S+ {name} .*")
        return peer

    def join_both(self, *names, **options):
        """Return two Peers in the lobby; the first has heard of the second, whose options these are."""
        first, second = self.join(names[0]), self.join(names[1], **options)
        first.hears(f"JOINED {names[1]}")
        return first, second

    def join_all(self, names):
        """Return a Peer for each name; they join at once, and may have heard JOINED of others."""
        peers = {name: self.connect() for name in names}
        for name, peer in peers.items():
            peer.says(f"JOIN {name}")
        return [peer for name, peer in peers.items() if peer.hears_sometime(rf"WELCOME \S+ {name} .*")]

    def logs(self, pattern):
        """Wait for a line of the log that matches."""
        return eventually(lambda: re.search(pattern, self.err, re.M), lambda: f"{pattern!r} in the log:\n{self.err}")

    def has_clients(self, count):
        """So many threads are left, says the log, and as many sockets (0, 1, 2 and the listener are files, too)."""
        eventually(lambda: self.err.count(" starts\n") - self.err.count("thread ends: ") == count, lambda: self.err)
        eventually(lambda: self.measured("files") in (4 + count, 0), "the sockets to be closed")

class ServerAtTerminal(Server, Terminal):
    """A server whose log is shown at a terminal, where Ctrl-S stops it and Ctrl-Q lets it go on."""
    err = property(lambda self: self.out.replace("\r\n", "\n"))

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
        """The next lines match these patterns (regular expressions; None: the end), one each; return the last one."""
        line = None
        for pattern in patterns:
            line = self.line()
            assert line is pattern is None or re.fullmatch(pattern or "$^", line or ""), f"{line!r} is not {pattern!r}"
        return line

    def asks(self, request, *answers):
        """The answers to the request are the next lines; return the last one."""
        self.says(request)
        return self.hears(*answers)

    def hears_nothing_but(self, *patterns):
        """These lines are all that was sent to us so far. (Asks WHO, whose answer must come next.)"""
        self.hears(*patterns)
        self.asks("WHO", "WHO .*")

    def hears_sometime(self, pattern):
        """One of the next lines matches; return it."""
        end = time.monotonic() + PATIENCE
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

    def hangs_up(self):
        self.sock.close()

    def resets(self):                                        # instead of an orderly end
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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

# ---- The protocol, rule by rule -----------------------------------------------------------------

def test_rule_1_rooms(server):
    alice, bob = server.join("alice"), server.join("bob", "Den")
    bob.asks("ROOMS", "ROOMS lobby=1 Den=1")
    carol = server.join("carol")                     # no room given: the oldest
    carol.asks("ROOMS\nWHO", "ROOMS lobby=2 Den=1", "WHO alice carol")
    alice.hears("JOINED carol")
    alice.leaves()
    carol.hears("LEFT alice")
    carol.asks("JOIN cleo\nROOMS", "WELCOME lobby cleo .*", "ROOMS lobby=1 Den=1")       # the same room
    assert server.err.count("room lobby created") == 1 and "deleted" not in server.err
    carol.leaves()
    bob.asks("ROOMS", "ROOMS Den=1")                 # deleted at once
    dave = server.connect()                          # the oldest now; then: stay where you are
    dave.asks("ROOMS\nJOIN dave\nJOIN dora", "ROOMS Den=1", "WELCOME Den dave .*", "WELCOME Den dora .*")
    bob.hears("JOINED dave", "LEFT dave", "JOINED dora")
    dave.asks("JOIN dora dEN", "ERROR .*already.*")  # names of rooms are the same in any case
    bob.asks("JOIN bob third\nROOMS", "WELCOME third bob .*", "ROOMS Den=1 third=1")

def test_rule_2_names(fast):
    peer = fast.connect()
    for arguments in ("x" * 21, "a.b", "a=b", "a ☃", "a/b", "a b c", "a\x1b[2J", "a\x00", "a b\u202e", "a " + "r" * 21):
        peer.asks(f"JOIN {arguments}\nROOMS", "ERROR .*20 letters.*", "ROOMS")
    for name in ("a", "x" * 20, "Ann_Lee-2", "Ünïcödé", "名前", "Имя", "١٢", "_"):
        fast.join(name, name).asks("WHO\nROOMS", f"WHO {name}", f"ROOMS (.* )?{name}=1")

def test_rule_2_unique_without_regard_to_case(server):
    alice, straße, bob = server.join("Alice"), server.join("Straße", "den"), server.connect()
    bob.asks("JOIN alice\nJOIN ALICE tea\nJOIN STRASSE\nJOIN bob", *["ERROR .* taken"] * 3, "WELCOME lobby bob .*")
    bob.asks("JOIN aLICE\nWHO", "ERROR .*", "WHO Alice bob")
    alice.asks("JOIN alice", "JOINED bob", "WELCOME lobby alice .*")         # one's own name may change its case
    straße.hears_nothing_but()

def test_rule_2_guests(server):
    first, second, last = server.connect(), server.connect(), server.connect()
    name, other = (guest.asks("JOIN", r"WELCOME lobby guest\d+ .*").split()[2] for guest in (first, second))
    assert name != other
    first.hears(f"JOINED {other}")
    taken = [f"guest{n}" for n in range(1, 40) if f"guest{n}" not in (name, other)]
    for guest in taken:                              # whichever it would pick next is taken now
        server.join(guest, "den")
    assert last.asks("JOIN", r"WELCOME lobby guest\d+ .*").split()[2] not in (name, other, *taken)

def test_rule_3_moving(server):
    (alice, bob), carol = server.join_both("alice", "bob"), server.join("carol", "den")
    alice.asks("JOIN anna den\nWHO", "WELCOME den anna .*", "WHO carol anna")
    bob.hears("LEFT alice")
    carol.hears("JOINED anna")
    alice.asks("JOIN carol lobby\nJOIN anna !\nJOIN x y z\nJOIN anna\nJOIN anna den\nWHO\nROOMS",
              *["ERROR .*"] * 5, "WHO carol anna", "ROOMS lobby=1 den=2")
    bob.hears_nothing_but()
    carol.hears_nothing_but()
    carol.asks("JOIN carol lobby", "WELCOME lobby carol .*")
    alice.hears("LEFT carol")
    alice.asks("JOIN anna lobby\nROOMS", "WELCOME lobby anna .*", "ROOMS lobby=3")

def test_rule_4_before_joining(server):
    peer = server.connect()
    peer.says("MSG hi", "WHO", "HELLO", "", "rooms", "leave")
    peer.hears(*["ERROR join a room first.*JOIN.*"] * 2, "ERROR unknown request.*", "ROOMS", "BYE .*", None)

def test_rule_5_entering_in_the_middle(server):
    """A client that enters hears what is said, and who enters, from then on, and nothing from before."""
    (alice, bob), carol = server.join_both("alice", "bob"), server.connect()
    bob.says("MSG before")
    alice.hears("MSG bob before")
    carol.asks("JOIN carol\nWHO", "WELCOME lobby carol .*", "WHO alice bob carol")
    dave = server.join("dave")
    bob.says("MSG after")
    alice.hears("JOINED carol", "JOINED dave", "MSG bob after")
    alice.leaves()
    bob.hears_nothing_but("JOINED carol", "JOINED dave", "LEFT alice")
    carol.hears_nothing_but("JOINED dave", "MSG bob after", "LEFT alice")
    dave.hears_nothing_but("MSG bob after", "LEFT alice")

def test_rule_5_same_order_for_everyone(server):
    """Five talk at once; the sixth hears what the five hear, each without its own, in the same order."""
    peers = [server.join(f"p{n}") for n in range(6)]
    for n, peer in enumerate(peers):
        peer.hears(*(f"JOINED p{later}" for later in range(n + 1, 6)))
    for i, peer in itertools.product(range(40), peers[:5]):
        peer.says(f"MSG {i}")
    heard = [[peer.line() for _ in range(200 if n == 5 else 160)] for n, peer in enumerate(peers)]
    for n in range(5):
        own = [line for line in heard[5] if line.startswith(f"MSG p{n} ")]
        assert own == [f"MSG p{n} {i}" for i in range(40)]
        assert heard[n] == [line for line in heard[5] if line not in own]

def test_rule_6_pieces(server):
    bob, alice = server.join_both("bob", "alice")
    for byte in "msg hé€😀\r\n".encode():
        alice.sends(bytes([byte]))
    bob.hears("MSG alice hé€😀")
    alice.sends("\r\n\n   \nMSG\nMSG \nMSG  \t \nMsG   a  b \nWHO\r\nmsg".encode())
    alice.hears("WHO bob alice")
    alice.sends(b" c\nMSG a\xffb \xc3( \xe2\x82\nMSG never finished")      # not UTF-8
    bob.hears("MSG alice   a  b ", "MSG alice c", "MSG alice a\ufffdb \ufffd\\( \ufffd")
    alice.sock.shutdown(socket.SHUT_WR)
    alice.hears("BYE .*", None)
    bob.hears("LEFT alice")

def test_rule_6_too_long(fast):
    bob, alice = fast.join_both("bob", "alice")
    full, accents = "x" * 1020, "é" * 510
    alice.says(*(f"MSG {text}" for text in (full, f"{full}\r", f"{full}x", f"{full}x\r", accents, f"{accents}é", "ok")))
    alice.hears(*["ERROR .*1024.*"] * 3)
    bob.hears(*[f"MSG alice {full}"] * 2, f"MSG alice {accents}", "MSG alice ok")
    before = fast.measured("VmRSS")
    alice.sends(b"MSG ")
    for n in range(40):                              # a line of 40 MiB
        alice.sends(b"x" * (1 << 20))
        bob.says(f"MSG {n}")                         # the others go on
    alice.sends(b"\nMSG ok\n")
    bob.hears("MSG alice ok")
    assert fast.measured("VmRSS") - before < 512
    heard = sorted(alice.line() for _ in range(41))
    assert heard[0].startswith("ERROR ") and heard[1:] == sorted(f"MSG bob {n}" for n in range(40))

def test_rule_7_safe_text(server):
    bob, alice = server.join_both("bob", "alice")
    codes = {*range(0x20), *range(0x7f, 0xa0), *range(0x2028, 0x202f), *range(0x2066, 0x206a)} - {*map(ord, "\t\n")}
    fine = "👩\u200d🏫 e\u0301 עברית العربية \u200f\u061c\u00a0\ufeff 漢字 \U0001f1e9\U0001f1ea \x7e"
    alice.says("MSG " + "".join(map(chr, codes)) + ".", "MSG a\tb\rc", "MSG\td", f"MSG {fine}")
    bob.hears("MSG alice " + "\ufffd" * len(codes) + r"\.", "MSG alice a b\ufffdc", "MSG alice d", f"MSG alice {fine}")

def test_rule_8_one_way_out(fast):
    """However it goes, what it has said is delivered, except after a reset; it leaves once; its name is free again."""
    alice, said = fast.join("alice"), ["JOINED bob", *(f"MSG bob {n}" for n in range(50))]
    for end in (Peer.resets, Peer.hangs_up, lambda bob: (bob.sock.shutdown(socket.SHUT_WR), bob.hears("BYE .*", None))):
        bob = fast.join("bob")
        bob.says(*(f"MSG {n}" for n in range(50)))
        alice.hears(*said * (end is Peer.resets))
        end(bob)
        alice.hears_nothing_but(*said * (end is not Peer.resets), "LEFT bob")
    for _ in range(20):
        fast.join("bob").leaves()                    # it is free from when BYE has arrived, too
    alice.hears_nothing_but(*["JOINED bob", "LEFT bob"] * 20)
    fast.has_clients(1)

def test_rule_8_leave_in_the_middle(fast):
    """A hundred requests in one segment: each is answered in its turn, and none after LEAVE."""
    alice, bob = fast.join_both("alice", "bob")
    requests = "MSG 1,WHO,MSG 2,MSG 3,JOIN rob,MSG 4,ROOMS,nonsense,JOIN rob den,MSG 5,JOIN bob lobby,MSG 6".split(",")
    bob.says(*requests * 8, "MSG end", "LEAVE", "MSG after", "WHO")
    answers = "WHO alice bob,WELCOME lobby rob.*,ROOMS lobby=2,ERROR.*,WELCOME den rob.*,WELCOME lobby bob.*".split(",")
    bob.hears(*answers * 8, "BYE .*", None)
    heard = "MSG bob 1,MSG bob 2,MSG bob 3,LEFT bob,JOINED rob,MSG rob 4,LEFT rob,JOINED bob,MSG bob 6".split(",")
    alice.hears_nothing_but(*heard * 8, "MSG bob end", "LEFT bob")

def test_rule_8_bye_arrives_behind_much_else(fast):
    """One that is merely behind gets it all, 200 KiB; then BYE, not lost to a reset although it goes on sending."""
    alice, slow = fast.join_both("alice", "slow", receive_buffer=4096)
    alice.says(*(f"MSG {n} {'x' * 1000}" for n in range(200)))
    alice.hears_nothing_but()
    slow.says("LEAVE", *["MSG more"] * 5000)
    alice.hears("LEFT slow")
    slow.hears(*(f"MSG alice {n} x+" for n in range(200)), "BYE .*", None)

def test_rule_9_max_clients(start):
    server = start(Server, "--max-clients", 2)
    alice, bob = server.join("alice"), server.connect()
    for more in (b"", b"JOIN carol\nMSG hi\n" * 2000):
        carol = server.connect()
        with contextlib.suppress(ConnectionError):
            carol.sends(more)
        carol.hears("BYE .*full.*2.*", None)
        carol.hangs_up()
    bob.asks("JOIN bob\nROOMS", "WELCOME lobby bob .*", "ROOMS lobby=2")
    for _ in range(10):                              # free again as soon as somebody has left
        bob.leaves()
        bob = server.join("bob")
    alice.hears("JOINED bob", *["LEFT bob", "JOINED bob"] * 10)

def test_rule_9_join_deadline(start, tmp_path):
    script = edited(tmp_path, "server.py", ("JOIN_SECONDS = 30", "JOIN_SECONDS = 0.3"),
                    ("FAREWELL_SECONDS = 2", "FAREWELL_SECONDS = 0.2"))
    server = start(Server, script=script)
    alice, silent, trickling, began = server.join("alice"), server.connect(), server.connect(), time.monotonic()
    with pytest.raises(OSError):                     # one deadline for all of the farewell
        while time.monotonic() < began + 3:
            trickling.sends(b"x")
            time.sleep(0.02)
    silent.hears("BYE no JOIN within 0.3 seconds", None)
    silent.hangs_up()
    server.has_clients(1)
    alice.hears_nothing_but()                        # who has joined may stay
    server.logs("client-3 +thread ends: no JOIN within 0.3 seconds")

def test_rule_10_slow_readers(fast):
    """One that stops reading is dropped after 256 KiB, and nobody waits for it."""
    alice, slow = fast.join_both("alice", "slow", receive_buffer=4096)
    bob = fast.join("bob")
    before, unread, heard = fast.measured("VmRSS"), 0, []
    while "LEFT slow" not in heard:
        alice.says(*[f"MSG {'x' * 1000}"] * 16)
        started = time.monotonic()
        heard = [bob.line() for _ in range(16)]
        assert time.monotonic() - started < 0.25
        unread += sum(map(len, heard))
        assert unread < 2 << 20, "it should have been dropped by now"
    assert unread > 200 * 1024 and fast.measured("VmRSS") - before < 1024
    alice.hears("JOINED bob", "LEFT slow")
    fast.logs("dropped: it does not read")
    slow.hears("JOINED bob", "MSG alice x+")         # what did fit arrives, then the connection ends

# ---- What a room full of students tries ------------------------------------------------------------

class Conversation:
    """People in a room who talk all the time. Leaving the `with` block checks how they fared:

    nothing is lost, doubled, cut, out of order or later than 0.25 s; nothing but the lines of the protocol, without
    control characters, has come; nobody has come twice, left twice or said something outside; nobody else is left.
    """

    def __init__(self, server, names=("ann", "ben")):
        self.server, self.over = server, False
        self.peers = {name: server.join(name) for name in names}
        self.present, self.sent, self.heard = {}, {}, {}     # for each: who is there at first; times; (time, line)
        for name, peer in self.peers.items():
            peer.says("WHO")
            self.present[name], self.sent[name], self.heard[name] = peer.hears_sometime("WHO .*").split()[1:], [], []
        self.threads = [threading.Thread(target=self.live, args=(name,)) for name in names]

    def live(self, name):
        peer, due, missing = self.peers[name], time.monotonic(), 1
        while missing and (not self.over or time.monotonic() < self.over + PATIENCE):
            if not self.over and time.monotonic() >= due:
                self.sent[name].append(time.monotonic())
                peer.says(f"MSG {len(self.sent[name]) - 1}")
                due = time.monotonic() + 0.02
            with contextlib.suppress(socket.timeout):
                self.heard[name].append((time.monotonic(), peer.line(0.01) or "END"))
            if self.over:
                messages = sum(line.split()[1] in self.peers for _, line in self.heard[name] if line.startswith("MSG "))
                missing = sum(map(len, self.sent.values())) - len(self.sent[name]) - messages

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over = time.monotonic()
        for thread in self.threads:
            thread.join()
        for name, heard in self.heard.items():
            present, counts = set(self.present[name]), collections.Counter()
            for began, line in heard:
                assert re.fullmatch(r"(MSG|JOINED|LEFT) [\w-]{1,20}( .*)?", line) and line.isprintable(), (name, line)
                verb, other, *text = line.split(" ", 2)
                assert (other in present) != (verb == "JOINED"), f"{name} heard {line!r}, of {present}"
                present = present - {other} if verb == "LEFT" else present | {other}
                if verb == "MSG" and other in self.peers:
                    assert text[0] == str(counts[other]), f"{name} heard {line!r} instead of {counts[other]}"
                    assert began - self.sent[other][counts[other]] < 0.25, f"{name} heard {line!r} late"
                    counts[other] += 1
            assert all(counts[other] == len(times) for other, times in self.sent.items() if other != name), name
        eventually(self.alone, "nobody else to be in the room").leaves()
        self.server.has_clients(len(self.peers))
        assert "Traceback" not in self.server.err

    def alone(self):
        """Return a new peer, joined, if nobody but those names is in the one room; else None."""
        peer = self.server.connect()
        peer.says("JOIN witness", "ROOMS", "WHO")
        rooms, who = peer.hears_sometime("ROOMS .*"), peer.hears_sometime("WHO .*")
        alone = set(who.split()[1:]) == {*self.peers, "witness"} and rooms == f"ROOMS lobby={len(self.peers) + 1}"
        return peer if alone else peer.leaves()

GARBAGE = [b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",                                  # HTTP
           b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,                      # TLS
           b"NICK x\r\nUSER x 0 * :x\r\nPRIVMSG #a :hi\r\n", b"\xff\xfb\x1f\xff\xfd\x03hello\r\n",         # IRC, telnet
           b"\0" * 3000 + b"\n", b"\n\n\r\n" * 1000, bytes((n * n * 7919 >> 5) & 255 for n in range(5000)) + b"\n",
           "MSG \x1b[2J\x1b]0;x\x07\r\x9b31m\u202e\n".encode()]

@pytest.mark.parametrize("limit, value, message", ids=["files", "threads"], argvalues=[
    ("RLIMIT_NOFILE", 12, "cannot accept: "),
    pytest.param("RLIMIT_AS", 200 << 20, "thread ends: .*(start new thread|allocate)",
                 marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS"))])
def test_few_files_or_threads(start, limit, value, message):
    """Where the system has none left a client has to wait, or its connection is closed; and the server goes on."""
    server = start(Server, preexec_fn=lambda: resource.setrlimit(getattr(resource, limit), (value, value)))
    alice = server.join("alice")
    crowd = [server.connect() for _ in range(60)]
    server.logs(message)
    before, lines = server.measured("cpu"), server.err.count("cannot accept")
    time.sleep(0.3)                                  # the time in which it is measured
    assert server.measured("cpu") - before < 0.1 and server.err.count("cannot accept") - lines < 6
    for peer in crowd:
        peer.hangs_up()
    eventually(lambda: server.err.count("thread ends: ") == len(crowd), "all of them to have gone")
    server.join("bob").says("MSG hi")
    alice.hears("JOINED bob", "MSG bob hi")

def test_rule_11_held_back(start):
    """What the server does not read yet waits in 64 KiB (on Linux, in twice as much); then a flooder has to wait."""
    mallory, sent = start(Server, "--rate", 1000).connect(), 0
    mallory.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    mallory.sock.settimeout(0.3)
    with pytest.raises(socket.timeout):
        while sent < 1 << 20:
            sent += mallory.sock.send(b"MSG hi\n" * 100)
    assert 32 * 1024 < sent < 160 * 1024

def test_rule_11_nothing_of_a_flood_is_lost(server):
    """A pasted listing of 300 lines at the default rate arrives whole; it takes the time that it should."""
    alice, bob = server.join_both("alice", "bob")
    listing, started = [f"  x[{n}]" for n in range(300)], time.monotonic()
    bob.says(*(f"MSG {line}" for line in listing))
    alice.hears(*("MSG bob " + re.escape(line) for line in listing))
    assert 0.8 * 300 * len("MSG bob   x[100]\n") / 8192 < time.monotonic() - started < 3

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
JOINS = [b"JOIN a%d\nJOIN b%d\n", b"JOIN c%d d\nJOIN c%d lobby\n", b"WHO\n", b"ROOMS\n", b"JOIN\n"] * 3

@pytest.mark.parametrize("lines", [MESSAGES, JOINS], ids=["messages", "others"])
def test_many_flooders(server, lines):
    with Conversation(server) as conversation:
        flooders = [server.join(f"flooder{n}") for n in range(len(lines))]
        at_once(flood, *zip(flooders, (line.replace(b"%d", b"%d" % number) for number, line in enumerate(lines))))
        assert "dropped" not in server.err and "ends" not in server.err
        for peer in flooders:
            (peer.resets if lines is JOINS else peer.hangs_up)()
        eventually(lambda: server.err.count("thread ends") == len(lines), "all to leave", 20)
        assert lines is JOINS or sum(line.startswith("LEFT ") for _, line in conversation.heard["ann"]) == 30

def test_sixty_at_once_with_long_names(server):
    """Passed on, `MSG x` of somebody with a long name is eleven times as long. Nobody is dropped for it."""
    peers = server.join_all(f"{'漢' * 18}{n}" for n in range(60))
    for peer in peers:
        peer.sends(b"MSG x\n" * 170)
    time.sleep(0.3)                                  # so long nobody reads
    at_once(Peer.reads, *((peer, b" x\n", 59 * 170) for peer in peers))
    assert "dropped" not in server.err

def test_ninety_at_once_with_longer_names(start, tmp_path):
    """What ninety say while they wait for the lock is more than a send buffer holds. Who reads is not dropped."""
    line = '        if verb == "ROOMS":\n'
    server = start(Server, script=edited(tmp_path, "server.py", (line, f"{line}            time.sleep(0.3)\n")))
    reader = server.join("reader")
    peers = server.join_all(f"{'𠀀' * 18}{n}" for n in range(90))
    reader.says("ROOMS")                             # holds the lock so long that all the others have to wait
    for peer in peers:
        peer.sends(b"MSG x\n" * 84 + b"LEAVE\n")
    heard = reader.reads(b"LEFT ", 90)
    assert heard.count(b" x\n") > 20 * 84           # not 90: these do not read, so some may have been dropped

def test_input_after_bye_costs_little(server):
    peer = server.join("peer")
    peer.asks("LEAVE", "BYE .*")
    before, end = server.measured("cpu"), time.monotonic() + 0.4
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            peer.sends(b"x" * 65536)
    assert server.measured("cpu") - before < 0.08

def test_saboteurs(start):
    """Three honest talkers among five saboteurs, whose connections end at any moment, and leave no trace."""
    server = start(Server, "--rate", 200000)

    def sabotage(first, over):
        for n in itertools.takewhile(lambda _: time.monotonic() < over, itertools.count(first, 5)):
            peer = Peer(server.port)
            with contextlib.suppress(ConnectionError, socket.timeout):
                peer.sends(b"JOIN mallory\nMSG hi\nWHO\n"[:n % 24])
                if n % 3:
                    peer.says(f"JOIN mallory{n % 7} cave{n % 4}")
                    peer.sends(GARBAGE[n // 4 % len(GARBAGE)] if n % 4 == 0 else b"MSG spam\nWHO\nROOMS\n" * (n % 50))
                    for k in range(n % 9):
                        peer.says(f"JOIN m{n % 5}_{k} cave{k % 3}", "MSG moved", f"JOIN m{n % 5}_{k} lobby", "MSG back")
                    peer.says("LEAVE") if n % 5 == 1 else peer.line(0.2) if n % 5 == 2 else None
            (peer.resets if n % 2 else peer.hangs_up)()
            time.sleep(0.004)                        # faster than they are accepted, and they would wait a second
    with Conversation(server, ("ann", "ben", "cem")):
        at_once(sabotage, *((number, time.monotonic() + 0.4) for number in range(5)))
        server.has_clients(3)
        before = server.measured("VmRSS")
        at_once(sabotage, *((number, time.monotonic() + 0.7) for number in range(5)))
        assert server.measured("VmRSS") - before < 512       # KiB, after 700 connections

# ---- Starting and closing the server ------------------------------------------------------------

@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_rule_12_closing(server, signum):
    alice, bob = server.join_both("alice", "bob")
    silent = server.connect()
    server.logs("thread client-3 starts")
    server.popen.send_signal(signum)
    for n, peer in enumerate((alice, bob, silent), 1):
        peer.hears("BYE the server is closing", None)  # and no LEFT before it
        peer.hangs_up()
        server.logs(rf"client-{n} +thread ends: the server is closing \(messages: 0\)")
    assert server.status() == 0
    assert re.search(r"main +closing: BYE to all clients \(3\)\n(.*\n)+.*main +closed\n\Z", server.err)

def test_rule_12_closing_in_the_middle_of_it(start, tmp_path):
    """Flooders, one that does not read, one that has not joined: all that read get BYE."""
    script = edited(tmp_path, "server.py", ("FAREWELL_SECONDS = 2 ", "FAREWELL_SECONDS = 0.3 "))
    server = start(Server, "--rate", 30000, script=script)
    alice, silent, frozen = server.join("alice"), server.connect(), server.join("frozen")
    flooders = [server.join(f"flooder{n}") for n in range(5)]
    for peer in (frozen, *flooders):
        peer.sends(b"MSG more\n" * 3000)
    alice.hears_sometime("MSG flooder.*")
    started = time.monotonic()
    server.popen.send_signal(signal.SIGINT)
    for peer in (alice, silent, *flooders):
        peer.hears_sometime("BYE the server is closing")
        peer.hears(None)
        peer.hangs_up()
    assert server.status() == 0
    assert 0.3 < time.monotonic() - started < 1.3    # with 2 s for the farewell: 3 s

@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_closing_twice(server, start, second):
    frozen = server.join("frozen")                   # never hangs up: the farewell would take 2 s
    server.popen.send_signal(signal.SIGINT)
    frozen.hears("BYE .*")
    server.popen.send_signal(second)
    assert server.status(1) == -second and server.err.count("\n") < 10

    def close_twice_at_once():                       # the second may come while the first is being handled
        other = start(Server)
        for peer in other.join_all([f"p{number}" for number in range(20)]):
            peer.sends(b"MSG a flooder, whose thread rests\n" * 300)
        other.popen.send_signal(signal.SIGINT)
        other.popen.send_signal(signal.SIGINT)
        for peer in other.peers:
            peer.hangs_up()
        assert other.status(5) in (0, -signal.SIGINT)
    at_once(close_twice_at_once, *[()] * 3)

@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::", "no network"])
def test_first_line_of_the_log(start, tmp_path, host):
    """It ends with what is typed on another machine: with an address of this machine on the network."""
    if host == "no network":                         # the broadcast address cannot be reached, as if there were none
        script = edited(tmp_path, "server.py", ("192.0.2.1", "255.255.255.255"))
        server = start(Server, "--host", "0.0.0.0", script=script)
        assert server.logs(r"main +Chatroom listening on 0\.0\.0\.0:\d+ .*not on a network")
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError as error:
        return warnings.warn(f"not checked here: --host {host} ({error})")
    server = start(Server, "--host", host, "--name", "Room 12\x1b[2J")
    line = server.logs(r"^\d\d:\d\d:\d\d main +Room 12\ufffd\[2J listening on (\S+):(\d+) (.*)\n")
    assert line[1] == host and ("(this machine only; --host 0.0.0.0 " in line[3]) == (host in ("127.0.0.1", "::1"))
    if host in ("0.0.0.0", "::") and "not on a network" not in line[3]:
        address = re.fullmatch(rf".*: python client\.py (\S+) {line[2]}", line[3])[1]
        socket.create_server((address, 0), family=family).close()        # fails if it is not this machine's
        assert not address.startswith("127.") and address not in ("::1", host)

def test_log_that_nobody_reads(start):
    """Where the terminal of the log stands still nobody has to wait, and in the end nothing is missing."""
    server = start(ServerAtTerminal, "--rate", 0, stderr=subprocess.STDOUT)
    alice = server.join("alice")
    server.logs("alice joined")
    server.type("\x13")                              # Ctrl-S
    alice.says(*["JOIN !"] * 3000)                   # each of them is logged: much more than a terminal or a pipe holds
    alice.hears(*["ERROR .*"] * 3000)
    ann, ben = server.join_both("ann", "ben")
    for n in range(20):
        server.join(f"visitor{n}", "den").leaves()
        ann.says(f"MSG secret {n}")
    ben.hears(*(f"MSG ann secret {n}" for n in range(20)))
    server.popen.send_signal(signal.SIGTERM)
    alice.hears_sometime("BYE the server is closing")
    for peer in server.peers:
        peer.hangs_up()
    server.type("\x11")                              # Ctrl-Q
    assert server.status() == 0
    story = ["client-1 +refused: JOIN .*", *(line for n in range(20) for line in (
        f"main +connection from .*: thread client-{n + 4} starts", "room den created",
        f"client-{n + 4} +visitor{n} joined den", f"visitor{n} left den", "room den deleted")), r"closing: BYE .*\(3\)"]
    assert re.search("(.*\n)*?.*".join(story), server.err)     # in this order, with other lines in between
    assert server.err.count("refused: ") == 3000 and server.err.endswith("closed\n") and "secret" not in server.err
    assert server.err.count("you said LEAVE (messages: 0)") == 20 and server.err.count("(messages: 20)") == 1

def test_trace(start):
    """It shows the bytes, and the lock, which the main thread does not take for nothing; a message as in README."""
    server = start(Server, "--trace")
    alice, bob = server.join_both("alice", "bob")
    server.logs(r"client-2 +lets go of the lock\n\Z")
    assert re.search("main +waits for the lock\n.*main +has the lock\n.*main +lets go of the lock\n", server.err)
    before = len(server.err)
    time.sleep(0.3)                                  # as long as three looks at the deadlines take
    alice.says("MSG hi")
    bob.hears("MSG alice hi")
    expected = FENCES.findall(section("One message"))[-1][1]
    eventually(lambda: server.err.count("\n", before) == expected.count("\n"), lambda: server.err[before:])
    assert re.sub(r"\d\d:\d\d:\d\d", "", server.err[before:]) == re.sub(r"\d\d:\d\d:\d\d", "", expected)
    alice.sends(b"MSG h\xc3")
    server.logs(r"client-1 +recv b'MSG h\\xc3'$")

CANNOT_START = [
    ("server.py PORT", 1, r"cannot listen on 127.0.0.1:\d+: Address already in use; .+"),
    *((f"server.py 0 --host {host}", 1, f"cannot listen on {host}.*host") for host in ("192.0.2.1", "a..b", "x" * 70)),
    *((f"server.py {words}", 2, "error: .+") for words in (
        "", "x", "-1", "65536", "0 1", "0 --max-clients 0", "0 --max-clients x",
        "0 --rate -1", "0 --name=\t", "0 --host=", "0 --host ä..x", "0 --no-such")),
    *((f"client.py 127.0.0.1 {words}", 2, "error: .+") for words in (
        "", "0", "65536", "x", "1 --name=", "1 --room=", "1 --room=a,b")),
    ("client.py 127.0.0.1 BOUND", 1, r"cannot connect to 127.0.0.1:\d+: Connection refused; .*address.*"),
    ("client.py 127.0.0.1 FULL", 1, r"cannot connect to 127.0.0.1:\d+: timed out; .*address.*"),
    *((f"client.py {host} 1", 1, f"cannot connect to {host}.*address.*") for host in ("no.such.invalid", "x" * 70))]

def test_scripts_that_cannot_start(server, start, tmp_path):
    edited(tmp_path, "server.py")
    edited(tmp_path, "client.py", ("CONNECT_SECONDS = 10 ", "CONNECT_SECONDS = 0.2 "))
    with socket.socket() as bound, socket.socket() as full, socket.socket() as first, socket.socket() as second:
        bound.bind(("127.0.0.1", 0))                         # but not listening
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for sock in (first, second):                         # fill the queue
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        ports = {"PORT": server.port, "BOUND": bound.getsockname()[1], "FULL": full.getsockname()[1]}
        words = [[ports.get(word, word) for word in command.split(" ") if word] for command, _, _ in CANNOT_START]
        processes = [start(Process, *each, cwd=tmp_path) for each in words]
        for (command, status, message), process in zip(CANNOT_START, processes):
            assert process.status() == status and not process.out, (command, process.err)
            assert re.search(rf"^{command[:9]}: {message}$", process.err, re.M), (command, process.err)
            assert process.err.startswith(f"usage: {command[:9]} ") if status == 2 else process.err.count("\n") == 1

# ---- The client, and what a person sees of it ----------------------------------------------------

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

    def stop(self):
        self.listener.close()
        self.sock.close()

def run(start, server, *arguments, typed=None, **more):
    """Start client.py with `typed` (str) as its standard input, a pipe; it stays open if nothing is given."""
    process = start(Process, "client.py", "127.0.0.1", server.port, *arguments, stdin=subprocess.PIPE, **more)
    if typed is not None:
        process.popen.stdin.write(typed.encode())
        process.popen.stdin.close()
    return process

def sit_down(start, server, name="ann", script="client.py", **more):
    """Start client.py at a terminal; with a name, wait for the prompt after the welcome."""
    person = start(Terminal, script, "127.0.0.1", server.port, *(["--name", name] if name else []), **more)
    if name and not isinstance(server, Liar):
        eventually(lambda: "You are" in person.out and person.lines[-1] == ">", lambda: f"the prompt: {person.lines}")
    return person

def pair(start, server, **more):
    """Return bob, a Peer, and ann, at a terminal; both have joined."""
    bob, ann = server.join("bob"), sit_down(start, server, **more)
    bob.hears("JOINED ann")
    return bob, ann

def test_client_in_pipes_says_and_shows(start, server):
    bob = server.join("bob")
    robot = run(start, server, "--name", "robot")
    bob.hears("JOINED robot")
    bob.says("MSG good morning")
    eventually(lambda: "bob: good morning\n" in robot.out, "a line, flushed at once")
    server.join("carol").leaves()
    eventually(lambda: "* carol joined\n* carol left\n" in robot.out)
    os.write(robot.popen.stdin.fileno(), b"hello \xff\n  two  spaces\n//who?\n\n")
    bob.hears("JOINED carol", "LEFT carol", "MSG robot hello \ufffd", "MSG robot   two  spaces", "MSG robot /who[?]")
    robot.popen.stdin.close()
    bob.hears("LEFT robot")
    assert robot.status() == 0 and robot.err == ""
    assert robot.out == ("* Welcome to Chatroom, robot! You are robot in lobby.\nbob: good morning\n"
                         "* carol joined\n* carol left\n* you have left\n")

def test_client_commands(start, server):
    bob = server.join("bob")
    ann = run(start, server, "--room", "tea", typed="ann\n/who\n/rooms\n/dance now\n/join\n/name Anna\n/join LOBBY\n"
              "/who\n/help\n/dance\nhello\n/quit\nnever said\n")
    assert ann.status() == 0
    bob.hears_nothing_but("JOINED Anna", "MSG Anna hello", "LEFT Anna")
    for shown in ("* in this room: ann\n", "* rooms: lobby with 1, tea with 1\n", "not a command: /dance now;",
                  "not a command: /join;", "are Anna in tea.\n", "are Anna in lobby.\n", "* in this room: bob, Anna\n"):
        assert ann.out.count(shown) == 1, (shown, ann.out)
    commands = re.search(r"^/who  .*\n(/.*\n)+", ann.out, re.M)[0]
    assert ann.out.count(commands) == 4 and commands.count("\n") == 6 and max(map(len, commands.splitlines())) <= 60

def test_client_loses_nothing(start, fast):
    """All that is typed is sent, in its order."""
    bob, long = fast.join("bob"), "".join(f"{number} é日😀 " for number in range(2000))
    lines = [f"line {number}" for number in range(2000)]
    robot = run(start, fast, typed="\n".join(["robot", *lines[:1000], long, *lines[1000:]]))
    bob.hears("JOINED robot", *(f"MSG robot {line}" for line in lines[:1000]))
    heard = ""
    while len(heard) < len(long):
        line = bob.line()
        assert len(line.encode()) <= len("MSG robot ") + 1020
        heard += line[len("MSG robot "):]
    assert heard == long
    bob.hears(*(f"MSG robot {line}" for line in lines[1000:]), "LEFT robot")
    assert robot.status() == 0

def test_client_with_and_without_a_name(start):
    def joins(full, arguments, typed, status, out, err):
        server = start(Server, *["--max-clients", 1] * full)
        bob = server.join("bob")
        ann = run(start, server, *arguments.split(), typed=typed)
        assert ann.status() == status and re.fullmatch(err, ann.err) and re.fullmatch(out, ann.out), (ann.out, ann.err)
        if status or full:
            bob.hears_nothing_but()
    guest = r"(.*\n)*.*You are guest1 in %s\.\n.*\n"
    at_once(joins, (0, "", "\n", 0, guest % "lobby", ""), (0, "--room tea", "\n", 0, guest % "tea", ""),
            (0, "", "bob\nhello\n", 1, ".*\n", r"client\.py: .*bob is taken; .*--name\n"),
            (0, "--name b!", "hello\n", 1, ".*\n", r"client\.py: .*20 letters.*--name\n"),
            *((1, arguments, "\n", 0, r"\* the server is full \(at most 1 clients\)\n", "")
              for arguments in ("--name ann", "--name ann --room tea", "--room tea")))

@pytest.mark.parametrize("closed", [[], [0, 1], [2], [0, 1, 2]])
def test_client_without_input_output_or_error(server, start, closed):
    """These are closed; or they are open, but nobody reads the output any more."""
    reading, writing = os.pipe()
    os.close(reading)
    bob = server.join("bob")
    ann = run(start, server, "--name", "ann", stdout=writing, preexec_fn=lambda: [*map(os.close, closed)])
    os.close(writing)
    bob.hears("JOINED ann", "LEFT ann")
    assert ann.status() == 0 and ann.err == ""

LIES = (b"\033[2J\033]0;owned\007 MSG\nMSG \033[31mred \r\033[Kboo\x9b1m\nMSG\nMSG \nMSG x\n\n \nJOINED\nLEFT \n"
        b"WHO\nROOMS\nROOMS = a==b\nWELCOME\nWELCOME x\nERROR\nHELLO w\xc3\xb6rld\xff\xfe\xc3\n\0\0\n"
        b"MSG a \xe2\x80\xaeb\xe2\x80\xa8\x7f\tc\r\n")

def test_client_and_a_server_that_lies(start):
    liar = start(Liar)
    ann = sit_down(start, liar, columns=200)
    liar.accepts(LIES + b"BYE\033[2J\nBYE \033[3J\n")
    assert ann.status() == 0 and ann.leaves_terminal_as_it_was()
    shown = re.sub(r"\033\[(\d|38;5;\d+)m", "", ann.out)
    assert not re.findall("[\0-\7\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u2028\u202e]|\033(?!\\[[JKA])", shown), shown
    assert "? HELLO wörld\ufffd\ufffd\ufffd" in shown and "a: \ufffdb\ufffd\ufffd c" in shown
    assert "\033[2J" not in shown and "\033[31m" not in shown

def test_client_and_a_line_without_end(start):
    liar = start(Liar)
    robot = run(start, liar, "--name", "robot")
    sock = liar.accepts()
    eventually(lambda: "You are ann" in robot.out)
    for _ in range(32):
        sock.sendall(b"MSG " + b"x" * 256 * 1024)
    sock.sendall(b"\nMSG bob " + b"y" * 60000 + b"\nMSG bob short\nMSG bob cut o")
    eventually(lambda: "too long" in robot.out)
    assert robot.measured("VmHWM") < 24 * 1024
    sock.shutdown(socket.SHUT_WR)
    assert robot.status() == 1
    assert robot.out.endswith("bob: " + "y" * 60000 + "\nbob: short\n") and "x" not in robot.out
    assert robot.out.count("too long") == 1 and robot.err.startswith("client.py: connection lost")

def test_client_flooded_by_the_server(start):
    """As many lines as the terminal takes: what is typed goes out at once, and memory is bounded."""
    liar = start(Liar)
    ann, over = sit_down(start, liar), threading.Event()
    sock = liar.accepts()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    ann.sees("* hi You are ann in r.", ">")
    flooder = threading.Thread(daemon=True, target=lambda: [
        sock.sendall(b"MSG bob buy my book\n" * 100) for _ in iter(over.is_set, True)])
    flooder.start()
    eventually(lambda: len(ann.shown) > 200000)
    for number in range(5):
        ann.type(f"typed {number}\r")
        began, heard = time.monotonic(), b""
        while f"MSG typed {number}\n".encode() not in heard:
            heard += sock.recv(1000)
        assert time.monotonic() - began < 0.5
    assert ann.measured("VmHWM") < 24 * 1024
    over.set()
    flooder.join(PATIENCE)
    liar.stop()
    assert ann.status() == 1

@pytest.mark.parametrize("doing", ["a key", "an answer", "a send"])
def test_client_ends_at_once(start, tmp_path, doing):
    """Whatever it is waiting for, it shows messages, and ends within 0.3 s after the connection has ended."""
    def ends(ending, script="client.py"):
        liar = start(Liar)
        ann = sit_down(start, liar, script=script)
        liar.accepts()
        ann.sees("* hi You are ann in r.", ">")
        ann.type(*("/name bob\r", "> /name bob") if doing == "an answer" else ("half a line", "> half a line"))
        if doing == "a send":                                # cut, then paste more than is sent until somebody reads it
            ann.type("\r" + "x" * 1000 + "\25" + "\31\r" * 300)
        before = ann.measured("cpu")
        frozen(ann)
        assert doing == "a send" or ann.measured("cpu") - before < 0.1, "waiting costs nothing"
        liar.sock.sendall(b"MSG bob hi\n")
        eventually(lambda: ": hi" in ann.out, "a message")
        began = time.monotonic()
        ending(liar)
        assert ann.status(3) == 1 and time.monotonic() - began < 0.3
        assert ann.err.startswith("client.py: connection lost") and ann.leaves_terminal_as_it_was()
    without_bell = edited(tmp_path, "client.py", ('BELL = getattr(signal, "SIGUSR1", None)', "BELL = None"))
    at_once(ends, (Peer.resets,), (Peer.hangs_up,), (lambda liar: liar.sock.shutdown(socket.SHUT_WR),),
            *[(Peer.hangs_up, without_bell)] * (doing == "an answer"))

def test_client_before_and_after_the_prompt(start, tmp_path):
    """Keys that come too soon are echoed by the system. What comes after /quit or Ctrl-C is shown, up to BYE."""
    def talks(ending, pause):
        liar = start(Liar)
        ann = sit_down(start, liar, script=script)
        sock = liar.accepts(b"")
        ann.type("half", "half")
        sock.sendall(b"MSG bob hi\n")
        ann.sees("bob: hi")                                  # in its place
        sock.sendall(b"WELCOME r ann hi\n")
        ann.sees("bob: hi", "* hi You are ann in r.", "> half")
        ann.type(ending)
        time.sleep(pause)                                    # for Ctrl-C less than GOODBYE_SECONDS
        sock.sendall(b"MSG bob late\nBYE bye\n")
        ann.sees("bob: late", "* you have left")
        assert ann.status() == 0
    script = edited(tmp_path, "client.py", ("GOODBYE_SECONDS = 1 ", "GOODBYE_SECONDS = 0.5 "))
    at_once(talks, ("\25/quit\r", 0.6), ("\3", 0.2))

def test_client_at_a_terminal(start, server):
    bob = server.join("bob")
    ann = sit_down(start, server, None)
    ann.sees("Your name:")
    ann.type("b o!b\r")
    eventually(lambda: "20 letters" in ann.out)
    ann.sees("Your name:")
    ann.type("ann\r", "in lobby.", ">", cursor=2)
    bob.hears("JOINED ann")
    ann.type("hallo", "> hallo", cursor=7)
    ann.hears(bob, "hi", "bob: hi", "> hallo", cursor=7)
    ann.type("\033[D\033[D\033[D\x7fe", "bob: hi", "> hello", cursor=4)             # three to the left
    ann.hears(bob, "how are you?", "bob: hi", "bob: how are you?", "> hello", cursor=4)
    ann.type("\r")
    bob.hears("MSG ann hello")
    ann.sees("bob: how are you?", "> hello", ">")
    ann.type("\033[A\033[A\033[B, bob\r")                    # up, up, down: hello, from the history
    bob.hears_nothing_but("MSG ann hello, bob")
    ann.sees("> hello, bob", ">", cursor=2)
    for number in range(1, 11):                              # answers stand above the next prompt
        ann.type("/who\r")
        eventually(lambda: ann.out.count("in this room") == number)
    ann.sees(*["> /who", "* in this room: bob, ann"] * 10, ">")

def test_client_keeps_what_is_being_typed(start, tmp_path):
    """Rows of narrow and wide characters; in the end with a readline that cannot clear the line, like that of macOS."""
    def keeps(typed, script="client.py"):
        bob, ann = pair(start, start(Server, "--rate", 0), script=script)
        ann.leaves_rows |= script != "client.py"
        ann.type(typed)
        column, messages = screen("> " + typed, ann.columns)[2] % ann.columns, ["in lobby."]      # after a full row: 0
        for number in range(3):
            ann.sees_below(messages, f"> {typed}", cursor=column)
            bob.says(f"MSG {number}")
            messages.append(f"bob: {number}")
        ann.type("\033[D" * 5)
        bob.says("MSG moved")
        ann.sees_below([*messages, "bob: moved"], f"> {typed}")
        ann.type("\033[C" * 5)
        ann.sees_below([*messages, "bob: moved"], f"> {typed}", cursor=column)
        ann.type("\033[D!\r")
        bob.hears(f"MSG ann {typed[:-1]}!{typed[-1]}")
    simple = edited(tmp_path, "client.py", ('"rl_clear_visible_line"', '"rl_no_such_function"'))
    at_once(keeps, ("half a line", simple), ("x" * 60, simple), *zip([
        "x" * 38, "x" * 39, "x" * 78, "日本語" * 6 + "x", "日" * 19, "x" + "日" * 19, "😀" * 40, "é" * 40, "שלום " * 9]))

def test_client_many_messages_while_keys_come(start, fast):
    """Four hundred messages while a key comes every 2 ms: all are shown, all that is typed is sent."""
    bob, ann = pair(start, fast, columns=60)
    typed = [f"line {number} of what ann types; it is longer than her screen is wide" for number in range(3)]

    def slowly(act, things):
        for thing in things:
            act(thing)
            time.sleep(0.002)                                # as fast as somebody who leans on a key
    at_once(slowly, (bob.says, [f"MSG number {n}" for n in range(400)]), (ann.type, "\r".join([*typed, "half"])))
    bob.hears(*(f"MSG ann {line}" for line in typed))
    eventually(lambda: "number 399" in ann.out)
    ann.sees("bob: number 399", "> half")
    lines = [line for line in ann.lines if line][1:]
    assert [line for line in lines if line.startswith("bob: ")] == [f"bob: number {number}" for number in range(400)]
    rows = [row for line in typed for row in screen(f"> {line}", 60)[0]]
    seen = [line for line in lines if not line.startswith("bob: ")]
    assert set(rows) <= set(seen) if LIBEDIT else seen == [*rows, "> half"]
    ann.type("\025" + "".join(f"pasted {number}\r" for number in range(50)))
    bob.hears(*(f"MSG ann pasted {number}" for number in range(50)))
    assert "\033[?2004h" not in ann.out                      # bracketed paste would make it one line

def test_client_message_while_searching_and_far_from_the_end(start, fast):
    bob, ann = pair(start, fast)
    for typed in ("good morning", "good evening"):
        ann.type(f"{typed}\r", f"> {typed}", ">", cursor=2)                # before that, the system echoes keys
        bob.hears(f"MSG ann {typed}")
    if not LIBEDIT:                                          # its search looks different
        ann.type("\x12morn", "(reverse-i-search)`morn': good morning")       # Ctrl-R
        ann.hears(bob, "hi", "> good evening", "bob: hi", "(reverse-i-search)`morn': good morning")
        ann.type("\r")
        bob.hears("MSG ann good morning")
        ann.sees(">", cursor=2)
    ann.type("x" * 100 + "\x01")                             # Ctrl-A: to the beginning of three rows
    ann.sees_below([], "> " + "x" * 100, cursor=2)
    for columns, message in ((40, "hi"), (30, "narrow"), (0, "unknown")):
        before = ann.out
        ann.resize(columns)
        ann.columns = columns or (30 if LIBEDIT else 80)     # without a width it is 80, or as before
        eventually(lambda: LIBEDIT or columns == 40 or ann.out != before, "the line in its new width")
        bob.says(f"MSG {message}")
        ann.sees_below([f"bob: {message}"], "> " + "x" * 100, cursor=2)
    ann.type("y\r")
    bob.hears("MSG ann yx{100}")

def test_client_colours_and_terminals_without_them(start, server, tmp_path):
    def sit(name, script="client.py", **environment):
        return sit_down(start, server, name, script, columns=80, **environment)
    windows = edited(tmp_path, "client.py", ('os.name != "nt"', "False"))         # its old console shows codes as text
    coloured = [sit("c1"), sit("c2", windows, WT_SESSION="1")]
    plain = [sit("p1", NO_COLOR=""), sit("p2", TERM="dumb"), sit("p3", windows), run(start, server, "--name", "p4")]
    plain[1].sees("* p4 joined", ">")
    plain[1].type("hel", "> hel")
    bob, carol = server.join("bob"), server.join("carol")
    bob.says("MSG one")
    carol.says("MSG two")
    bob.says("MSG three")
    for person in (*coloured, *plain):
        eventually(lambda: all(number in person.out for number in ("one", "two", "three")))
    for person in coloured:
        colours = {name: code for code, name in re.findall(r"\033\[38;5;(\d+)m(\w+)\033\[0m: (?:one|two)", person.out)}
        assert colours["bob"] != colours["carol"] and f"\033[38;5;{colours['bob']}mbob\033[0m: three" in person.out
        assert "\033[2m* bob joined\033[0m" in person.out
    assert not any(re.search(r"\033\[[0-9;]*m", person.out) for person in plain)
    assert not any("\033" in person.out for person in (plain[1], plain[3]))
    plain[1].sees(">")                                       # "hel" is gone from the screen, but not lost
    plain[1].type("lo\r")
    carol.hears_sometime("MSG p2 hello")

def test_client_ends(start):
    """By a command, a key, or the end of the server: at the prompt, asked for its name (again), in a pipe."""
    left, closed, lost = (0, "* you have left"), (0, "* the server is closing"), (1, None)

    def ends(prompt, typed, ending, status, reason):
        server = start(Server)
        bob = server.join("bob")
        if prompt == "a pipe":
            ann = run(start, server, "--name", "ann",        # as a shell's & does:
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
            eventually(lambda: "You are ann" in ann.out)
        else:
            ann = sit_down(start, server, "ann" if prompt == "> " else None)
            if prompt == "again":
                eventually(lambda: ann.lines[-1] == "Your name:")
                ann.type("bob\r", "Your name: bob", "! the name bob is taken", "Your name:")
            prompt = prompt if prompt == "> " else "Your name: "
            ann.sees(prompt.rstrip())
            ann.type(typed, (prompt + typed).rstrip())
        ann.type(ending) if isinstance(ending, str) else server.popen.send_signal(ending)
        assert ann.status(1 if status else PATIENCE) == status
        assert ann.err == status * "client.py: connection lost; start again when the server is back\n"
        eventually(lambda: status or ann.out.replace("\033[0m", "").rstrip().endswith(reason), lambda: ann.out)
        if prompt != "a pipe":
            assert ann.leaves_terminal_as_it_was()
            shown = {"/quit\r": "/quit", "\x04": "^D" if LIBEDIT else ""}.get(ending, typed)
            ann.sees((prompt + shown).rstrip(), *[reason] * (not status))
        if isinstance(ending, str):
            bob.hears_nothing_but(*["JOINED ann", "LEFT ann"] * (prompt == "> "))
    at_once(ends, ("> ", "", "/quit\r", *left), ("> ", "half a line", "\x03", *left),
            *((prompt, "", key, *left) for prompt in ("> ", "Your name: ", "again") for key in "\x03\x04"),
            *((prompt, typed, signum, *end) for signum, end in ((signal.SIGINT, closed), (signal.SIGKILL, lost))
              for prompt, typed in (("> ", "half a line"), ("Your name: ", "an"), ("a pipe", ""))))

def test_client_where_input_cannot_be_interrupted(start, server, tmp_path):
    script = edited(tmp_path, "client.py", ('BELL = getattr(signal, "SIGUSR1", None)', "BELL = None"),
                    ("CONNECT_SECONDS = 10 ", "CONNECT_SECONDS = 0.2 "),
                    ("    import readline ", "    import no_readline_on_windows as readline "))
    bob, ann = pair(start, server, script=script, columns=70, stderr=subprocess.STDOUT)
    time.sleep(0.3)                                          # longer than connecting may take
    ann.hears(bob, "hi", "bob: hi", ">")
    ann.type("hello\r")
    bob.hears("MSG ann hello")
    server.popen.kill()
    eventually(lambda: "press Enter" in ann.out)
    ann.type("\r")
    assert ann.status() == 1
    ann.sees("client.py: connection lost; start again when the server is back")

# ---- How fast -----------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, clients, talkers, count, pause", ids=["fast", "default", "many"], argvalues=[
    ("--rate 0", 50, 10, 30, 0), ("", 50, 10, 5, 0.005), ("--rate 0 --max-clients 300", 300, 5, 6, 0)])
def test_fan_out(start, arguments, clients, talkers, count, pause):
    """Some members say a message each, in turn, `count` times; each when all have heard the last, `pause` s later.

    The figures are printed, not judged. The delay of a message is the time until the last member has heard it.
    """
    server = start(Server, *arguments.split())
    before, peers = server.measured("VmRSS"), [server.join(f"p{n}") for n in range(clients)]
    for peer in peers:
        peer.says("WHO")
        peer.hears_sometime("WHO .*")
        peer.sock.settimeout(None)       # a deadline kept by the system is cheaper: it is part of the delay
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
    memory, delays = (server.measured("VmRSS") - before) / clients, []
    for n, talker in itertools.product(range(count), peers[:talkers]):
        said = time.monotonic()
        talker.says(f"MSG {n}")
        assert all(peer.sock.recv(4096).endswith(b" %d\n" % n) for peer in peers if peer is not talker)
        delays.append(time.monotonic() - said)
        time.sleep(pause)
    rate, median, worst = len(delays) * (clients - 1) / sum(delays), sorted(delays)[len(delays) // 2], max(delays)
    print(f"\n{clients} clients, {len(delays)} messages: {rate:,.0f} deliveries/s, delay until all have it: median "
          f"{median * 1000:.2f} ms, worst {worst * 1000:.2f} ms; lost: 0; {memory:.0f} KiB of memory a client")

# ---- The lesson: what README says is what happens -------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
SCRIPTS = {script: (HERE / script).read_text(encoding="utf-8") for script in ("server.py", "client.py")}
PORTS = itertools.count(20000 + os.getpid() % 10000)         # no system gives these to clients, so they stay free
FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)

def section(heading):
    """Return README's text under a heading, up to the next one of its level or above."""
    start = re.search(rf"^(#+) {re.escape(heading)}.*\n", README, re.M)
    assert start, f"README has no heading {heading}"
    rest = README[start.end():]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", FENCES.sub(lambda block: "x" * len(block[0]), rest), re.M)
    return rest[:end.start()] if end else rest

NC = """#!/bin/bash
until exec 3<>/dev/tcp/$1/$2; do sleep 0.05; done 2> /dev/null       # forty.py does not say when it listens
cat <&0 >&3 &
cat <&3
"""

class Replay:
    """What README shows under a heading, to be played with the real scripts in real terminals.

    Blocks of `diff` are edits, of which the last may be left out. Each line of `sh` is a command for a terminal, which
    has a column of `transcript`: there `$` starts the command; what follows `> ` or `Your name: ` is typed, and so are
    (Enter), ^C and ^\\; … is anything; what stands in brackets is a direction; all the rest is what the terminal shows.
    """

    def __init__(self, start, folder, heading, left_out):
        text = section(heading)
        blocks = collections.defaultdict(str)
        for language, block in FENCES.findall(text):
            blocks[language] += block
        self.port = str(next(port for port in PORTS if socket.socket().connect_ex(("127.0.0.1", port))))
        self.start, self.folder, self.transcript = start, folder, blocks["transcript"]
        commands = blocks["sh"] or FENCES.findall(section("Two terminals"))[0][1]
        self.commands = re.findall(r"^(\S.*(?:\n .*)*)", commands.replace("12345", self.port), re.M)
        python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        for name, program in (("python", python), ("nc", NC), ("forty.py", blocks["python"])):
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        edits, place = [], []
        for script, function, diff in re.findall(r"[Ii]n `(?:(\w+\.py)|(\w+))`|^```diff\n(.*?)^```", text, re.M | re.S):
            place = [script, ""] if script else [*place[:1], function] if function else place
            if diff:
                old, new = ("".join(line[1:] + "\n" for line in diff.splitlines() if line[0] == sign) for sign in "-+")
                before = SCRIPTS[place[0]].partition(f"\n{old}")[0]
                assert place[1] in ("", re.findall(r"def (\w+)", before)[-1]), f"README: not in {place}:\n{old}"
                edits.append((place[0], f"\n{old}", f"\n{new}"))
        for script in SCRIPTS:
            edited(folder, script, *(edit for name, *edit in edits[:len(edits) - left_out] if name == script))

    def run(self, number):
        """Start a command in a terminal, beside the scripts; wait until a server listens, a client shows something."""
        command = self.commands[number]
        terminal = self.start(Terminal, "-c", "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])",
                              ("" if re.search(r"[|(]", command) else "exec ") + command, columns=200,
                              stderr=subprocess.STDOUT, cwd=self.folder, PATH=f"{self.folder}:{os.environ['PATH']}")
        awaited = {"python server": " listening on ", "python client": "\n"}.get(command[:13], "")
        eventually(lambda: awaited in terminal.out or "Your name:" in terminal.out, lambda: terminal.out)
        return terminal

    def play(self, patience=PATIENCE):
        """Play the transcript, row by row; fail if something else is seen."""
        rows, last = [], {}
        for line in self.transcript.splitlines()[2:]:
            rows.append([cell[number > 0:].rstrip() for number, cell in enumerate(line.split("|"))])
            for number, cell in enumerate(rows[-1]):
                if cell.startswith("    "):                  # a cell goes on
                    last[number][number] += " " + cell.strip()
                    rows[-1][number] = ""
                elif cell:
                    last[number] = rows[-1]
        running, expected = {}, collections.defaultdict(list)
        for row in [*rows, []]:
            for number, cell in enumerate(row):
                if cell == "$":
                    running[number] = self.run(number)
                self.act(running.get(number), cell, expected[number], self.commands[number], patience)
            for number in filter(expected.get, running):     # more may follow, but not at the end
                eventually(lambda: matches(running[number].lines, expected[number], "(.*\n)*" if row else ""),
                           lambda: f"{expected[number]}; there is {running[number].lines}", patience)
            quiet = {number: running[number].out for number, cell in enumerate(row) if cell == "(nothing)"}
            time.sleep(0.4 if quiet else 0)                  # in all that time
            assert quiet == {number: running[number].out for number in quiet}

    def act(self, terminal, cell, expected, command, patience):
        """Do what a cell says, and note what is then to be seen."""
        typed = re.match(r"(> |Your name: )(.*)", cell)
        if typed or cell in ("^C", "^\\", "(Enter)"):
            terminal.type({"^C": "\3", "^\\": "\34"}.get(cell, f"{typed[2] if typed else ''}\r"))
        if cell == "(the screen is cleared)":
            eventually(lambda: "\033[2J" in terminal.out, lambda: terminal.out, patience)
            expected.clear()
        elif cell == "(a processor is busy)":                # half of one, for half a second
            before = terminal.measured("cpu")
            eventually(lambda: not before or terminal.measured("cpu") - before > 0.25, "a busy processor", patience)
        elif cell and cell[0] not in "$(^":
            expected.append(typed[2] if typed and command.startswith("nc ") else cell)

def matches(lines, expected, rest):
    """Return whether the lines on a screen are the expected ones, and then `rest` (a regular expression)."""
    def masked(text):
        text = re.sub(r"^\d\d:\d\d:\d\d ", "hh:mm:ss ", re.sub(r"\^[C\\]", "", text), flags=re.M)
        return re.sub(r'127\.0\.0\.1:\d+|File ".*server\.py"', "N", text)
    seen = [row + "\n" for row in masked("\n".join(lines)).splitlines() if row.strip() not in ("", ">", "Your name:")]
    pattern = "".join(r"(.*\n)*" if line == "…" else re.escape(masked(line)) + "\n" for line in expected)
    return re.fullmatch(pattern + rest, "".join(seen))

def wait_for_the_reader(replay, edited):
    server, bob, alice = map(replay.run, range(3))
    os.killpg(bob.popen.pid, signal.SIGSTOP)                 # Ctrl-Z
    replay.run(3)
    if not edited:
        return eventually(lambda: "* bob left" in alice.out and "dropped: it does not" in server.out, "bob to leave")
    eventually(lambda: len(alice.shown) > 100000, "a flood")
    frozen(alice)
    alice.type("/who\r")
    frozen(alice)
    assert "in this room" not in alice.out and "bob left" not in alice.out and "dropped" not in server.out
    os.killpg(bob.popen.pid, signal.SIGCONT)                 # fg
    eventually(lambda: "* in this room: bob, alice, zoe" in alice.out, "an answer")

def wait_at_the_door(slow, short):
    """Where the queue is long all are served; where it is short few are, before TCP asks again after a second."""
    servers, crowds = [each.run(0) for each in (slow, short)], [each.run(1) for each in (slow, short)]
    began = time.monotonic()
    eventually(lambda: servers[0].out.count("thread ends: you said LEAVE") == 30 and "real" in crowds[0].out)
    time.sleep(max(0, began + 0.9 - time.monotonic()))
    assert 0 < servers[1].out.count("thread ends: you said LEAVE") < 30

def do_not_pace(replay, limit):
    replay.commands[0] = replay.commands[0].replace(" --rate 0", limit)
    server, bob, _ = map(replay.run, range(3))
    if limit:
        eventually(lambda: "connection lost" in bob.out and "client-1  thread ends: dropped: it " in server.out)
        assert bob.status() == 1 and bob.out.count("buy my book") > 1000
        return
    eventually(lambda: bob.out.count("buy my book") > 50)
    before = bob.out.count("\n")
    time.sleep(0.5)                                          # the lines that come in half a second
    assert 100 < bob.out.count("\n") - before < 500 and "dropped" not in server.out

LESSONS = ["The server in forty lines", "A session, side by side", "`nc` as a client",
           *map("Experiment {}:".format, range(1, 11))]

@pytest.fixture(scope="module")
def plays(start_all, tmp_path_factory):
    """For each heading, futures of its plays: first, at once, all that mostly wait; then what needs a processor."""
    def replay(heading, left_out=0):
        return Replay(start_all, tmp_path_factory.mktemp("lesson"), heading, left_out)

    def play(heading, function, *arguments):
        plays[heading].append(pool.submit(function, *arguments))
    plays = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        shown = [heading for heading in LESSONS if "\n```transcript\n" in section(heading)]
        for heading in shown:
            play(heading, replay(heading).play)
        for heading in shown[3:]:
            play(heading, pytest.raises, AssertionError, replay(heading, 1).play, 1)
        play("Experiment 9:", wait_at_the_door, replay("Experiment 9:", 1), replay("Experiment 9:"))
        concurrent.futures.wait(sum((plays[heading] for heading in plays if "5" not in heading), []))  # 5 only sleeps
        for case in (0, 1):
            play("Experiment 6:", wait_for_the_reader, replay("Experiment 6:", 1 - case), case)
            play("Experiment 10:", do_not_pace, replay("Experiment 10:"), " --rate 0" * case)
        yield plays

@pytest.mark.parametrize("heading", LESSONS)
def test_lesson(plays, heading):
    """One sees what README shows; of an experiment, without the last of its edits, one does not."""
    assert plays[heading]
    for future in plays[heading]:
        future.result()

def test_lesson_names(start):
    """README names no function, log line, constant, message, command, option or place in itself that is not there."""
    def table(heading):
        rows = [line.strip("| ").split(" | ") for line in section(heading).splitlines() if line.startswith("| ")]
        return [[re.findall(r"`(.+?)`", cell) for cell in row] for row in rows[1:] if set(row[0]) != {"-"}]
    session, code = re.sub(r"\s*\|\n?\s*", " ", section("A session")), "".join(SCRIPTS.values())
    for script, heading in (("server.py", "The walk: eight"), ("client.py", "The walk: five")):
        for _, _, names, lines in table(heading):
            assert names and all(f"def {name}(" in SCRIPTS[script] for name in names), f"not all in {script}: {names}"
            assert all(line.split("!")[0] in session or line == "--trace" for line in lines), lines
    for names in re.findall(r"(?:Note over \w|->>\w): ([\w, ]+):", section("One message")):
        assert all(f"def {name}(" in code for name in names.split(", ")), names
    assert all(piece.rstrip("…)") in SCRIPTS["server.py"] for _, pieces, *_ in table("From C") for piece in pieces)
    rules = " ".join(section("The rules").split())
    for constant, words in {
            "MAX_REQUEST = 1024 ": "1024 bytes", "REQUEST_BYTES = 100 ": "100 bytes",
            'r"[\\w-]{1,20}"': "1 to 20 letters", "JOIN_SECONDS = 30 ": "30 seconds",
            "FAREWELL_SECONDS = 2 ": "2 seconds at most", "SEND_BUFFER = 256 * 1024 ": "256 KiB",
            "RECEIVE_BUFFER = 64 * 1024 ": "64 KiB", '"--max-clients", type=int, default=100,': "100 clients",
            '"--rate", type=int, default=8192,': "8192 bytes"}.items():
        assert constant in SCRIPTS["server.py"] and words in rules, constant
    for message in re.findall(r"^\| `(.*?)` ?…?.* \|", section("When it does not connect"), re.M):
        assert re.sub(r"\bann\b", "{name}", message) in code, message
    assert all(command in SCRIPTS["client.py"] for command in re.findall(r"`(/\w+)", section("A demo")))
    for script in SCRIPTS:
        described = start(Process, script, "--help")
        assert described.status() == 0
        for arguments in re.findall(rf"python {script}([^`\n|&>)]*)", README):
            assert all(option in described.out for option in re.findall(r"--[\w-]+", arguments)), arguments
    headings = re.findall(r"^#+ (.*)", FENCES.sub("", README), re.M)
    places = ["#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert len(places) == len(set(places)) and links and set(links) <= set(places), set(links) - set(places)
    assert len(FENCES.findall(section("The server in forty"))[0][1].splitlines()) <= 40
