"""Tests of the chatroom: the real scripts as processes, real sockets, a real terminal (pty).

    python -m pytest                      all of it
    python -m pytest -s -k fan_out        how fast it is on this machine

A test starts a server of its own on a free port, and reads like the protocol:
`alice.says("MSG hi")`, `bob.hears("MSG alice hi")`. Waiting has a deadline, never a fixed length.
"""
import ast
import concurrent.futures
import contextlib
import fcntl
import functools
import os
import pty
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from pathlib import Path

import pytest

os.environ.pop("PYTHONUNBUFFERED", None)          # it would hide that a flush is missing

HERE = Path(__file__).parent
PATIENCE = 10        # seconds until something that should have happened counts as missing


# ---- Helpers ------------------------------------------------------------------------------------

def eventually(condition, what="it", seconds=PATIENCE):
    """Wait until `condition()` is true, and return its value; fail after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def edited(tmp_path, script, *edits):
    """Return the path of a copy of `script` with (old, new) edits; each old must be in it once."""
    text = (HERE / script).read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{script} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    path = tmp_path / script
    path.write_text(text, encoding="utf-8")
    return path


def side_by_side(test, *cases):
    """Run test(case) for each case, each in a thread of its own, since most of it is waiting."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(test, cases))


class Process:
    """A script, started as a person starts it; what it prints is collected in `out` and `err`."""

    def __init__(self, *command, stdin=subprocess.DEVNULL, **more):
        command = [sys.executable, *map(str, command)]
        self.popen = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE, **more)
        self.collected = {"out": b"", "err": b""}
        self.reading = threading.Event()                     # cleared: what it prints is not read
        self.reading.set()
        self.threads = [threading.Thread(target=self.collect, args=(name, stream), daemon=True)
                        for name, stream in (("out", self.popen.stdout), ("err", self.popen.stderr))]
        for thread in self.threads:
            thread.start()

    def collect(self, name, stream):
        for data in iter(lambda: os.read(stream.fileno(), 65536), b""):
            self.collected[name] += data
            self.reading.wait()

    @property
    def out(self):
        return self.collected["out"].decode()

    @property
    def err(self):
        return self.collected["err"].decode()

    def type(self, text):
        self.popen.stdin.write(text.encode())
        self.popen.stdin.flush()

    def status(self, seconds=PATIENCE):
        """Wait for the end; return the exit status. No traceback is ever printed."""
        status = self.popen.wait(seconds)
        for thread in self.threads:
            thread.join(seconds)
        assert "Traceback" not in self.err and "Exception" not in self.err, self.err
        return status

    def stop(self):
        self.reading.set()
        with contextlib.suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()
        for thread in self.threads:
            thread.join(PATIENCE)
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


class Server(Process):
    """A running server."""

    def __init__(self, *arguments, script=HERE / "server.py", **more):
        super().__init__(script, 0, *arguments, **more)
        self.peers = []

    @functools.cached_property
    def port(self):
        """Where it listens; wait until it does."""
        return int(self.logs(r" listening on \S+:(\d+) ").group(1))

    def connect(self, **options):
        peer = Peer(self.port, **options)
        self.peers.append(peer)
        return peer

    def join(self, name, room="", **options):
        """Return a Peer that has joined."""
        peer = self.connect(**options)
        peer.says(f"JOIN {name} {room}".strip())
        peer.hears(rf"WELCOME \S+ {name} .*")
        return peer

    def join_all(self, names):
        """Return a Peer for each name; they join at once, and may have heard JOINED of others."""
        peers = {name: self.connect() for name in names}
        for name, peer in peers.items():
            peer.says(f"JOIN {name}")
        for name, peer in peers.items():
            peer.hears_sometime(rf"WELCOME \S+ {name} .*")
        return list(peers.values())

    def logs(self, pattern, seconds=PATIENCE):
        """Wait for a line of the log that matches."""
        return eventually(lambda: re.search(pattern, self.err), f"{pattern!r} in the log:\n{self.err}", seconds)

    def close(self, signum=signal.SIGINT):
        """Close the server as a person does; return its exit status."""
        self.popen.send_signal(signum)
        return self.status()

    def threads_now(self):
        """How many threads it has for clients; there are two more, the main thread and the log's."""
        return len(os.listdir(f"/proc/{self.popen.pid}/task")) - 2

    def rss(self):
        """Memory in use, in KiB."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.popen.pid}/status").read_text()).group(1))

    def cpu(self):
        """Processor time used so far, in seconds."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        for peer in self.peers:
            peer.sock.close()
        super().stop()


class Peer:
    """A raw connection to the server, line by line."""

    def __init__(self, port, receive_buffer=None):
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def says(self, *requests):
        self.sends("".join(f"{request}\n" for request in requests).encode())

    def sends(self, data):
        self.sock.sendall(data)

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

    def hears(self, *patterns, seconds=PATIENCE):
        """The next lines match these patterns (regular expressions), one each; return the last one."""
        line = None
        for pattern in patterns:
            line = self.line(seconds)
            assert line is not None and re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"
        return line

    def hears_nothing(self):
        """All that was sent to us so far has been heard. (Asks WHO, whose answer must come next.)"""
        self.says("WHO")
        self.hears("WHO .*")

    def hears_nothing_but(self, *patterns):
        """These lines are all that was sent to us so far."""
        self.hears(*patterns)
        self.hears_nothing()

    def hears_end(self, *patterns):
        """After lines like these the connection is closed, in order."""
        if patterns:
            self.hears(*patterns)
        assert self.line() is None

    def hears_sometime(self, pattern, seconds=PATIENCE):
        """One of the next lines matches; return it."""
        end = time.monotonic() + seconds
        while True:
            line = self.line(end - time.monotonic())
            assert line is not None, f"the end came before {pattern!r}"
            if re.fullmatch(pattern, line):
                return line

    def leaves(self):
        self.says("LEAVE")
        self.hears_sometime("BYE .*")
        self.hears_end()
        self.sock.close()

    def resets(self):
        """Vanish with a reset instead of an orderly end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


@pytest.fixture
def start():
    """start(Class, ...) makes a process that is stopped after the test."""
    started = []

    def starter(process, *arguments, **more):
        started.append(process(*arguments, **more))
        return started[-1]
    yield starter
    for process in started:
        process.stop()


@pytest.fixture(scope="module")
def next_server():
    """A list with the next test's server, which starts up while this test is running."""
    servers = [Server()]
    yield servers
    servers.pop().stop()


@pytest.fixture
def server(next_server):
    next_server.append(Server())
    server = next_server.pop(0)
    assert server.port
    yield server
    server.stop()


def client(server, *arguments, typed=None):
    """Run client.py with `typed` (str) as its standard input, a pipe."""
    process = Process("client.py", "127.0.0.1", server.port, *arguments, stdin=subprocess.PIPE)
    if typed is not None:
        process.popen.stdin.write(typed.encode())
        process.popen.stdin.close()
    return process


# ---- The scenario -------------------------------------------------------------------------------

def test_scenario_in_the_log(server):
    alice = server.connect()
    alice.says("JOIN alice")
    alice.hears("WELCOME lobby alice .*Chatroom.*")
    server.logs("alice joined lobby")                # the log is written when the lock is free again
    bob = server.connect()
    bob.says("JOIN bob")
    bob.hears("WELCOME lobby bob .*Chatroom.*")
    alice.hears("JOINED bob")
    server.logs("bob joined lobby")
    bob.says("MSG hello")
    alice.hears("MSG bob hello")
    bob.leaves()
    alice.hears("LEFT bob")
    server.logs("client-2 +thread ends")
    alice.sock.close()
    server.logs("client-1 +thread ends")
    carol = server.join("carol")
    server.logs("carol joined lobby")
    server.popen.send_signal(signal.SIGINT)
    carol.hears_end("BYE the server is closing")
    carol.sock.close()
    assert server.status() == 0
    log = [re.sub(r"^\d\d:\d\d:\d\d (\S+) +(.*?)(:\d+)?( \(.*)?$", r"\1 \2", line) for line in server.err.splitlines()]
    story = ["main Chatroom listening on 127.0.0.1",
             "main connection from 127.0.0.1:PORT: thread client-1 starts",
             "client-1 room lobby created",
             "client-1 alice joined lobby",
             "main connection from 127.0.0.1:PORT: thread client-2 starts",
             "client-2 bob joined lobby",
             "client-2 bob left lobby",
             "client-2 thread ends after 1 messages: you said LEAVE",
             "client-1 alice left lobby",
             "client-1 room lobby deleted",
             "client-1 thread ends after 0 messages: end of file",
             "main connection from 127.0.0.1:PORT: thread client-3 starts",
             "client-3 room lobby created",
             "client-3 carol joined lobby",
             "main closing: BYE to 1 clients",
             "client-3 carol left lobby",
             "client-3 room lobby deleted",
             "client-3 thread ends after 0 messages: the server is closing",
             "main closed"]
    assert [re.sub(r":\d{4,5}:", ":PORT:", line) for line in log] == story
    assert "hello" not in server.err


# ---- The protocol, rule by rule -------------------------------------------------------------------

def test_rule_1_rooms(server):
    alice, bob = server.join("alice"), server.join("bob", "Den")
    bob.says("ROOMS")
    bob.hears("ROOMS lobby=1 Den=1")
    carol = server.join("carol")                     # no room given: the oldest
    carol.says("ROOMS", "WHO")
    carol.hears("ROOMS lobby=2 Den=1", "WHO alice carol")
    alice.hears("JOINED carol")
    alice.leaves()
    carol.hears("LEFT alice")
    carol.leaves()
    bob.says("ROOMS")
    bob.hears("ROOMS Den=1")                         # deleted at once
    dave = server.connect()
    dave.says("ROOMS", "JOIN dave", "JOIN dora")     # the oldest now; then: stay where you are
    dave.hears("ROOMS Den=1", "WELCOME Den dave .*", "WELCOME Den dora .*")
    bob.hears("JOINED dave", "LEFT dave", "JOINED dora")
    dave.says("JOIN dora dEN")                       # names of rooms are the same in any case
    dave.hears("ERROR .*")


def test_rule_1_room_alone_keeps_its_age(server):
    alice, bob = server.join("alice", "first"), server.join("bob", "second")
    alice.says("JOIN anna", "ROOMS")
    alice.hears("WELCOME first anna .*", "ROOMS first=1 second=1")
    bob.says("JOIN bob third", "ROOMS")
    bob.hears("WELCOME third bob .*", "ROOMS first=1 third=1")


def test_rule_2_good_names(server):
    for name in ("a", "x" * 20, "Ann_Lee-2", "Ünïcödé", "名前", "Имя", "١٢", "_"):
        peer = server.join(name, name)
        peer.says("WHO", "ROOMS")
        peer.hears(f"WHO {name}", f"ROOMS (.* )?{name}=1")


def test_rule_2_bad_names(server):
    peer = server.connect()
    for arguments in ("x" * 21, "a.b", "a=b", "a \N{SNOWMAN}", "a/b", "a b c", "a\x1b[2J", "a\x00", "a b\u202e", "a " + "r" * 21):
        peer.says(f"JOIN {arguments}", "ROOMS")
        peer.hears("ERROR .*", "ROOMS")
    peer.says("JOIN fine")
    peer.hears("WELCOME lobby fine .*")


def test_rule_2_unique_without_regard_to_case(server):
    alice = server.join("Alice")
    straße = server.join("Straße", "den")
    bob = server.connect()
    bob.says("JOIN alice", "JOIN ALICE elsewhere", "JOIN STRASSE", "JOIN bob")
    bob.hears("ERROR .*", "ERROR .*", "ERROR .*", "WELCOME lobby bob .*")
    bob.says("JOIN aLICE", "WHO")
    bob.hears("ERROR .*", "WHO Alice bob")
    alice.says("JOIN alice")                         # one's own name may change its case
    alice.hears("JOINED bob", "WELCOME lobby alice .*")
    straße.hears_nothing()


def test_rule_2_name_is_free_again(server):
    alice = server.join("alice")
    for ending in (Peer.leaves, Peer.resets, lambda peer: peer.sock.close()):
        bob = server.join("bob")
        alice.hears("JOINED bob")
        ending(bob)
        alice.hears("LEFT bob")                      # from here on the name is free
    server.join("bob").leaves()
    alice.hears("JOINED bob", "LEFT bob")


def test_rule_2_name_is_free_when_bye_arrives(server):
    for _ in range(30):
        server.join("bob").leaves()


def test_rule_2_guests(server):
    first, second = server.connect(), server.connect()
    first.says("JOIN")
    name = first.hears(r"WELCOME lobby guest\d+ .*").split()[2]
    second.says("JOIN")
    other = second.hears(r"WELCOME lobby guest\d+ .*").split()[2]
    assert name != other
    first.hears(f"JOINED {other}")
    taken = [f"guest{n}" for n in range(1, 40) if f"guest{n}" not in (name, other)]
    for guest in taken:                              # whichever it would pick next is taken now
        server.join(guest, "den")
    last = server.connect()
    last.says("JOIN")
    assert last.hears(r"WELCOME lobby guest\d+ .*").split()[2] not in (name, other, *taken)


def test_rule_3_moving(server):
    alice, bob, carol = server.join("alice"), server.join("bob"), server.join("carol", "den")
    alice.hears("JOINED bob")
    alice.says("JOIN anna den", "WHO")
    alice.hears("WELCOME den anna .*", "WHO carol anna")
    bob.hears("LEFT alice")
    carol.hears("JOINED anna")
    alice.says("JOIN carol lobby", "JOIN anna !", "JOIN x y z", "JOIN anna", "JOIN anna den", "WHO", "ROOMS")
    alice.hears(*["ERROR .*"] * 5, "WHO carol anna", "ROOMS lobby=1 den=2")
    bob.hears_nothing()
    carol.hears_nothing()
    carol.says("JOIN carol lobby")
    carol.hears("WELCOME lobby carol .*")
    anna = alice
    anna.hears("LEFT carol")
    anna.says("JOIN anna lobby", "ROOMS")
    anna.hears("WELCOME lobby anna .*", "ROOMS lobby=3")


def test_rule_4_before_joining(server):
    peer = server.connect()
    peer.says("MSG hi", "WHO", "HELLO", "", "rooms", "leave")
    peer.hears_end("ERROR .*JOIN.*", "ERROR .*JOIN.*", "ERROR .*", "ROOMS", "BYE .*")


def test_rule_5_entering_in_the_middle(server):
    """A client that enters hears what is said, and who enters, from then on, and nothing from before."""
    alice, bob = server.join("alice"), server.join("bob")
    bob.says("MSG before")
    alice.hears("JOINED bob", "MSG bob before")
    carol = server.connect()
    carol.says("JOIN carol", "WHO")
    carol.hears("WELCOME lobby carol .*", "WHO alice bob carol")
    dave = server.join("dave")
    bob.says("MSG after")
    alice.hears("JOINED carol", "JOINED dave", "MSG bob after")
    carol.hears("JOINED dave", "MSG bob after")
    dave.hears("MSG bob after")
    bob.hears("JOINED carol", "JOINED dave")
    alice.leaves()
    for peer in (bob, carol, dave):
        peer.hears_nothing_but("LEFT alice")


def test_rule_5_said_to_one_who_takes_another_name(start, tmp_path):
    script = edited(tmp_path, "server.py", ("        guests = (", "        time.sleep(0.05)\n        guests = ("))
    server = start(Server, script=script)
    alice, bob = server.join("alice"), server.join("bob")
    alice.hears("JOINED bob")
    for name in ("anna", "anne", "anja"):
        alice.says(f"JOIN {name}")
        bob.says(f"MSG hi {name}")                   # its thread has to wait for the lock
        alice.hears_sometime(f"MSG bob hi {name}")


def test_rule_5_who_moves_hears_what_the_others_hear(start):
    """From JOINED until LEFT the others of a room hear the same as who moves in and out all the time."""
    server = start(Server, "--rate", 0)
    peers = {f"{kind}-{room}": server.join(f"{kind}-{room}", room) for kind in ("watch", "talk") for room in ("red", "blue")}
    peers.update({name: server.join(name, "hall") for name in ("mary", "moe")})
    heard = {name: [] for name in peers}

    def listen(name):
        while not (heard[name] and heard[name][-1].startswith("BYE ")):
            heard[name].append(peers[name].line())

    def move(name):
        for number in range(0, 200, 4):
            peers[name].says(*(f"JOIN {name}{n} {('red', 'blue')[n % 2]}" for n in range(number, number + 4)))
            peers[name].says("MSG hi")

    def talk(name):
        while any(thread.is_alive() for thread in movers):
            peers[name].says("MSG hello", "MSG again")
            time.sleep(0.001)
    listeners = {name: threading.Thread(target=listen, args=(name,)) for name in peers}
    movers = [threading.Thread(target=move, args=(name,)) for name in ("mary", "moe")]
    talkers = [threading.Thread(target=talk, args=(name,)) for name in peers if name.startswith("talk")]
    for thread in (*listeners.values(), *movers, *talkers):
        thread.start()
    for thread in (*movers, *talkers):
        thread.join()
    for name in reversed(list(peers)):                       # those who watch leave last
        peers[name].says("LEAVE")
        listeners[name].join(PATIENCE)
    for name in ("mary", "moe"):
        stays = re.findall(r"^WELCOME (red|blue) (\w+) .*\n((?:(?!WELCOME|BYE).*\n)*)", "\n".join(heard[name]), re.M)
        assert len(stays) == 200
        for room, called, lines in stays:
            others = "\n".join(heard[f"watch-{room}"])
            expected = re.search(rf"^JOINED {called}\n((?:.*\n)*?)LEFT {called}$", others, re.M).group(1)
            assert lines == re.sub(rf"^MSG {called} .*\n", "", expected, flags=re.M), called


def test_rule_5_same_order_for_everyone(server):
    """Five talk at once; the sixth hears what the five hear, each without its own, in the same order."""
    peers = [server.join(f"p{n}") for n in range(6)]
    for n, peer in enumerate(peers):
        peer.hears(*(f"JOINED p{later}" for later in range(n + 1, 6)))
    for i in range(40):
        for peer in peers[:5]:
            peer.says(f"MSG {i}")
    heard = [[peer.line() for _ in range(200 if n == 5 else 160)] for n, peer in enumerate(peers)]
    for n in range(5):
        own = [line for line in heard[5] if line.startswith(f"MSG p{n} ")]
        assert own == [f"MSG p{n} {i}" for i in range(40)]
        others = [line for line in heard[5] if line not in own]
        assert heard[n] == others


def test_rule_6_pieces(server):
    bob, alice = server.join("bob"), server.join("alice")
    bob.hears("JOINED alice")
    for byte in "msg hé€😀\r\n".encode():
        alice.sends(bytes([byte]))
    bob.hears("MSG alice hé€😀")
    alice.sends("\r\n\n   \nMSG\nMSG \nMSG  \t \nMsG   a  b \nWHO\r\nmsg".encode())
    alice.hears("WHO bob alice")
    alice.sends(b" c\nMSG never finished")
    bob.hears("MSG alice   a  b ", "MSG alice c")
    alice.sock.shutdown(socket.SHUT_WR)
    alice.hears_end("BYE .*")
    bob.hears("LEFT alice")


def test_rule_6_too_long(start):
    server = start(Server, "--rate", 0)
    bob, alice = server.join("bob"), server.join("alice")
    bob.hears("JOINED alice")
    longest = "x" * 1020
    alice.sends(f"MSG {longest}\nMSG {longest}\r\nMSG {longest}x\nMSG {longest}x\r\nMSG ok\n".encode())
    alice.hears("ERROR .*1024.*", "ERROR .*1024.*")
    bob.hears(f"MSG alice {longest}", f"MSG alice {longest}", "MSG alice ok")
    alice.sends(b"MSG " + "é".encode() * 510 + b"\n" + b"MSG " + "é".encode() * 511 + b"\nMSG ok\n")
    bob.hears("MSG alice " + "é" * 510, "MSG alice ok")
    alice.hears("ERROR .*")
    for _ in range(3):
        alice.sends(b"x" * 3000)
        bob.hears_nothing()
    alice.sends(b"\nMSG ok\n")
    bob.hears("MSG alice ok")
    alice.hears("ERROR .*")                          # one for the whole line
    alice.hears_nothing()


def test_rule_6_line_of_40_mib(start):
    server = start(Server, "--rate", 0)
    bob, alice = server.join("bob"), server.join("alice")
    bob.hears("JOINED alice")
    before = server.rss()
    alice.sends(b"MSG ")
    for n in range(40):
        alice.sends(b"x" * (1 << 20))
        bob.says(f"MSG {n}")                         # the others go on
    alice.sends(b"\nMSG ok\n")
    bob.hears("MSG alice ok")
    assert server.rss() - before < 512
    heard = [alice.line() for _ in range(41)]
    assert sum(line.startswith("ERROR ") for line in heard) == 1
    assert [line for line in heard if not line.startswith("ERROR ")] == [f"MSG bob {n}" for n in range(40)]


def test_rule_6_invalid_utf8(server):
    bob, alice = server.join("bob"), server.join("alice")
    bob.hears("JOINED alice")
    alice.sends(b"MSG a\xffb \xc3( \xe2\x82\nMSG ok\n")
    bob.hears("MSG alice a\ufffdb \ufffd\\( \ufffd", "MSG alice ok")


def test_rule_7_safe_text(server):
    bob, alice = server.join("bob"), server.join("alice")
    bob.hears("JOINED alice")
    forbidden = [c for c in map(chr, [*range(0x20), *range(0x7f, 0xa0), 0x2028, 0x2029, *range(0x202a, 0x202f), *range(0x2066, 0x206a)])
                 if c not in "\t\n"]
    alice.says("MSG " + "".join(forbidden) + ".")
    bob.hears("MSG alice " + "\ufffd" * len(forbidden) + r"\.")
    alice.says("MSG a\tb\rc", "MSG\td")
    bob.hears("MSG alice a b\ufffdc", "MSG alice d")
    fine = "👩\u200d🏫 e\u0301 עברית العربية \u200f\u061c\u00a0\ufeff 漢字 \U0001f1e9\U0001f1ea \x7e"
    alice.says(f"MSG {fine}")
    bob.hears(f"MSG alice {fine}")


def test_rule_8_one_way_out(server):
    alice = server.join("alice")
    quiet = server.threads_now()
    endings = {"leave": Peer.leaves, "close": lambda peer: peer.sock.close(), "reset": Peer.resets,
               "half": lambda peer: (peer.sock.shutdown(socket.SHUT_WR), peer.hears_end("BYE .*"), peer.sock.close())}
    for name, ending in endings.items():
        peer = server.join(name)
        alice.hears(f"JOINED {name}")
        peer.says("MSG last words")
        alice.hears(f"MSG {name} last words")
        ending(peer)
        alice.hears(f"LEFT {name}")
    alice.hears_nothing()
    eventually(lambda: server.threads_now() == quiet, "the threads to end")
    assert len(os.listdir(f"/proc/{server.popen.pid}/fd")) <= 6      # 0, 1, 2, the listener, alice


def test_rule_8_said_before_the_end_is_delivered(server):
    alice, bob = server.join("alice"), server.connect()
    bob.says("JOIN bob", *(f"MSG {n}" for n in range(100)))
    bob.sock.shutdown(socket.SHUT_WR)
    alice.hears("JOINED bob", *(f"MSG bob {n}" for n in range(100)), "LEFT bob")


def test_rule_8_leave_in_the_middle(server):
    """A hundred requests in one segment: each is answered in its turn, and none after LEAVE."""
    alice, bob = server.join("alice"), server.join("bob")
    alice.hears("JOINED bob")
    requests = ["MSG 1", "WHO", "MSG 2", "MSG 3", "JOIN rob", "MSG 4", "ROOMS", "nonsense", "JOIN rob den", "MSG 5", "JOIN bob lobby", "MSG 6"]
    bob.says(*requests * 8, "MSG end", "LEAVE", "MSG after", "WHO")
    answers = ["WHO alice bob", "WELCOME lobby rob .*", "ROOMS lobby=2", "ERROR .*", "WELCOME den rob .*", "WELCOME lobby bob .*"]
    bob.hears_end(*answers * 8, "BYE .*")
    heard = ["MSG bob 1", "MSG bob 2", "MSG bob 3", "LEFT bob", "JOINED rob", "MSG rob 4", "LEFT rob", "JOINED bob", "MSG bob 6"]
    alice.hears(*heard * 8, "MSG bob end", "LEFT bob")
    alice.hears_nothing()


def test_rule_8_bye_arrives_behind_much_else(start):
    """BYE is not lost to a reset when 200 KiB wait before it and we go on sending after LEAVE."""
    server = start(Server, "--rate", 0)
    alice, slow = server.join("alice"), server.join("slow", receive_buffer=4096)
    alice.hears("JOINED slow")
    alice.says(*(f"MSG {n} {'x' * 1000}" for n in range(200)))
    alice.hears_nothing()
    slow.says("LEAVE", *["MSG more"] * 5000)
    alice.hears("LEFT slow")
    slow.hears_end(*(f"MSG alice {n} x+" for n in range(200)), "BYE .*")


def test_rule_9_max_clients(start):
    server = start(Server, "--max-clients", 2)
    alice, bob = server.join("alice"), server.connect()
    for more in (b"", b"JOIN carol\nMSG hi\n" * 2000):
        carol = server.connect()
        with contextlib.suppress(ConnectionError):
            carol.sends(more)
        carol.hears_end("BYE .*full.*2.*")
        carol.sock.close()
    bob.says("JOIN bob", "ROOMS")
    bob.hears("WELCOME lobby bob .*", "ROOMS lobby=2")
    for _ in range(10):                              # free again as soon as somebody has left
        bob.leaves()
        bob = server.join("bob")
    alice.hears("JOINED bob", *["LEFT bob", "JOINED bob"] * 10)


def test_rule_9_join_deadline(start, tmp_path):
    server = start(Server, script=edited(tmp_path, "server.py", ("JOIN_SECONDS = 30", "JOIN_SECONDS = 0.3"), ("FAREWELL_SECONDS = 2", "FAREWELL_SECONDS = 0.2")))
    alice, silent, trickling = server.join("alice"), server.connect(), server.connect()
    ends = time.monotonic() + 5
    with contextlib.suppress(ConnectionError):       # after its BYE it may well be reset
        while not trickling.buffer and time.monotonic() < ends:
            trickling.sends(b"x")
            trickling.sock.settimeout(0.1)
            with contextlib.suppress(socket.timeout):
                trickling.buffer += trickling.sock.recv(100)
    assert re.fullmatch(b"BYE no JOIN within 0.3 seconds\n", trickling.buffer)
    silent.hears_end("BYE no JOIN within 0.3 seconds")
    silent.sock.close()
    with pytest.raises(OSError):                     # one deadline for all of the farewell
        while time.monotonic() < ends + 5:
            trickling.sends(b"x")
            time.sleep(0.02)
    eventually(lambda: server.threads_now() == 1, "the threads to end")
    alice.hears_nothing()                            # who has joined may stay


def test_rule_10_slow_reader(start):
    """One that stops reading is dropped after its 256 KiB; nobody waits for it."""
    server = start(Server, "--rate", 0)
    alice, bob, frozen = server.join("alice"), server.join("bob"), server.join("frozen", receive_buffer=4096)
    alice.hears("JOINED bob", "JOINED frozen")
    bob.hears("JOINED frozen")
    before, unread = server.rss(), 0
    while True:
        alice.says(*[f"MSG {'x' * 1000}"] * 16)
        started = time.monotonic()
        heard = [bob.line() for _ in range(16)]
        assert time.monotonic() - started < 0.25
        unread += sum(map(len, heard))
        if "LEFT frozen" in heard:
            break
        assert unread < 2 << 20, "it should have been dropped by now"
    assert unread > 200 * 1024
    alice.hears("LEFT frozen")
    server.logs("dropped: it does not read")
    assert server.rss() - before < 1024
    heard = frozen.sock.recv(100)                    # what did fit arrives, then the connection ends
    assert heard.startswith(b"JOINED") or heard.startswith(b"MSG alice xxx")


def test_rule_10_slow_for_a_while(start):
    """One that is merely behind gets it all: 200 KiB wait for it."""
    server = start(Server, "--rate", 0)
    alice, slow = server.join("alice"), server.join("slow", receive_buffer=4096)
    alice.hears("JOINED slow")
    alice.says(*(f"MSG {n} {'x' * 1000}" for n in range(200)))
    alice.hears_nothing()                            # all of it has been handled
    slow.hears(*(f"MSG alice {n} x+" for n in range(200)))


class Conversation:
    """Two people in a room who talk all the time. Leaving the `with` block checks how they fared:

    nothing is lost, doubled, cut, out of order or later than 0.25 s, nothing but the lines of the
    protocol, without control characters, has come, and nobody has come twice, left twice or said
    something outside.
    """

    def __init__(self, server, names=("ann", "ben"), pause=0.02):
        self.names, self.pause = names, pause
        self.peers, self.present = {}, {}
        for name in names:
            self.peers[name] = server.join(name)
            self.peers[name].says("WHO")
            self.present[name] = set(self.peers[name].hears_sometime("WHO .*").split()[1:])
        self.sent = {name: [] for name in names}                         # times
        self.heard = {(name, other): [] for name in names for other in names if name != other}
        self.strange, self.late, self.others = [], [], []
        self.over = False
        self.threads = [threading.Thread(target=self.live, args=(name,)) for name in names]

    def live(self, name):
        peer, due = self.peers[name], time.monotonic()
        while not self.over or not self.complete(name) and time.monotonic() < self.over + PATIENCE:
            if not self.over and time.monotonic() >= due:
                self.sent[name].append(time.monotonic())
                peer.says(f"MSG {len(self.sent[name]) - 1}")
                due = time.monotonic() + self.pause
            with contextlib.suppress(socket.timeout):
                self.note(name, peer.line(0.01))

    def note(self, name, line):
        verb, other, *text = (line or "").split(" ", 2)
        if verb == "MSG" and other in self.names:
            number = len(self.heard[name, other])
            self.heard[name, other].append(text[0])
            delay = time.monotonic() - self.sent[other][number]
            if delay > 0.25:
                self.late.append((other, number, round(delay, 3)))
        elif not re.fullmatch(r"(MSG|JOINED|LEFT) [\w-]{1,20}( .*)?", line or "END") or not line.isprintable():
            self.strange.append(line)
        else:
            self.others.append(line)
        if (other in self.present[name]) == (verb == "JOINED"):
            self.strange.append(f"{line} (to {name})")
        if verb != "MSG":
            (self.present[name].add if verb == "JOINED" else self.present[name].discard)(other)

    def complete(self, name):
        return all(len(self.heard[name, other]) >= len(self.sent[other]) for other in self.names if other != name)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over = time.monotonic()
        for thread in self.threads:
            thread.join()
        for (name, other), texts in self.heard.items():
            assert texts == [str(n) for n in range(len(self.sent[other]))], f"{name} heard of {other}: {texts}"
        assert not self.strange
        assert not self.late


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    "irc": b"NICK x\r\nUSER x 0 * :x\r\nPRIVMSG #a :hi\r\nQUIT\r\n",
    "telnet": b"\xff\xfb\x1f\xff\xfd\x03hello\r\n",
    "nul": b"\0" * 3000 + b"\n",
    "empty": b"\n" * 3000 + b"\r\n" * 1000,
    "random": bytes((n * n * 7919 >> 5) & 255 for n in range(5000)) + b"\n",
    "terminal": "MSG \x1b[2J\x1b]0;x\x07\r\x9b31m\u202e\n".encode(),
}


def test_garbage(start):
    server = start(Server, "--rate", 100000)
    with Conversation(server):
        for joined in (b"", b"JOIN mallory\n"):
            for garbage in GARBAGE.values():
                peer = server.connect()
                peer.sends(joined + garbage + b"\nROOMS\n")
                peer.hears_sometime("ROOMS .*")
                peer.leaves()
    after(server, "ann", "ben")


def after(server, *names):
    """Nothing is left behind: those are here, each with a socket and a thread, and nobody else."""
    peer = eventually(lambda: reaches(server, *names), "nobody else to be in the room")
    peer.leaves()
    people = len(names)
    eventually(lambda: server.threads_now() == people, "the threads to end")
    assert len(os.listdir(f"/proc/{server.popen.pid}/fd")) == 4 + people     # 0, 1, 2 and the listener
    assert "Traceback" not in server.err


def reaches(server, *names):
    """Return a new peer, joined, if nobody but those names is in the one room; else None."""
    peer = server.connect()
    peer.says("JOIN witness", "ROOMS", "WHO")
    lines = [peer.line() for _ in range(3)]
    while not lines[-1].startswith("WHO"):
        lines.append(peer.line())
    if sorted(lines[-1].split()[1:]) == sorted([*names, "witness"]) and f"ROOMS lobby={len(names) + 1}" in lines:
        return peer
    peer.leaves()
    return None


def test_resets_at_any_moment(server):
    with Conversation(server):
        for n in range(120):
            peer = server.connect()
            peer.sends(b"JOIN mallory\nMSG hi\nWHO\n"[:n % 24])
            peer.resets()
    after(server, "ann", "ben")


def test_600_connections_leave_no_trace(server):
    def visit(times):
        for n in range(times):
            peer = Peer(server.port)
            if n % 3:
                peer.says("JOIN visitor")
            (peer.resets if n % 2 else peer.sock.close)()
        eventually(lambda: server.threads_now() == 0, "the threads to end")
    visit(100)
    before = server.rss()
    visit(600)
    assert server.rss() - before < 1024


def test_few_file_descriptors(start):
    server = start(Server, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)))
    alice = server.join("alice")
    crowd = [server.connect() for _ in range(20)]
    server.logs("cannot accept: ")
    before = server.cpu()
    time.sleep(0.3)                                  # the time in which it is measured
    assert server.cpu() - before < 0.1
    for peer in crowd:
        peer.sock.close()
    bob = server.join("bob")
    bob.says("MSG hi")
    alice.hears("JOINED bob", "MSG bob hi")


def test_few_threads(start):
    """Where the system has no thread left a connection is closed, and the server goes on."""
    server = start(Server, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20)))
    alice = server.join("alice")
    crowd = [server.connect() for _ in range(60)]
    server.logs("start new thread|allocate")
    for peer in crowd:
        peer.sock.close()
    eventually(lambda: server.threads_now() == 1, "the threads to end")
    server.join("bob")
    alice.hears("JOINED bob")


def flood(peer, seconds, line=b"MSG " + b"x" * 60 + b"\n"):
    """Send as fast as possible, and read what comes, for so many seconds."""
    end = time.monotonic() + seconds
    block = line * (8192 // len(line))
    peer.sock.setblocking(False)
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            peer.sock.send(block)
        with contextlib.suppress(BlockingIOError):
            assert peer.sock.recv(1 << 20), "a flooder was dropped"
        time.sleep(0.005)


def test_rule_11_flood(start):
    rate = 65536
    server = start(Server, "--rate", rate)
    with Conversation(server) as conversation:
        mallory = server.join("mallory")
        started = time.monotonic()
        flood(mallory, 0.5)
        relayed = sum(len(line) + 1 for line in conversation.others if line.startswith("MSG mallory"))
        relayed /= 2                                 # ann and ben both heard it
        assert 0.5 * rate < relayed / (time.monotonic() - started) < 1.15 * rate
        mallory.sock.close()
        # With the default rate this would be 20 s: 8 times as long.
        eventually(lambda: "LEFT mallory" in conversation.others, "quiet", 20 * 8192 / rate)
    after(server, "ann", "ben")


def test_rule_11_nothing_of_a_flood_is_lost(start):
    server = start(Server, "--rate", 800000)
    alice, bob = server.join("alice"), server.join("bob")
    alice.hears("JOINED bob")
    threading.Thread(target=bob.says, args=[f"MSG {n} {'x' * 90}" for n in range(2000)], daemon=True).start()
    started = time.monotonic()
    alice.hears(*(f"MSG bob {n} x+" for n in range(2000)))
    assert time.monotonic() - started > 2000 * 97 / 800000 * 0.8


def test_thirty_flooders(server):
    with Conversation(server) as conversation:
        flooders = [server.join(f"flooder{n}") for n in range(30)]
        threads = [threading.Thread(target=flood, args=(peer, 0.5)) for peer in flooders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "dropped" not in server.err and " left " not in server.err
        for peer in flooders:
            peer.resets()
        eventually(lambda: sum(line.startswith("LEFT ") for line in conversation.others) == 2 * 30, "all to leave", 20)
    after(server, "ann", "ben")


def test_sixty_at_once_with_long_names(server):
    """Passed on, `MSG x` of somebody with a long name is eleven times as long. Nobody is dropped for it."""
    peers = server.join_all(f"{'漢' * 18}{n}" for n in range(60))
    for peer in peers:
        peer.sends(b"MSG x\n" * 170)
    time.sleep(0.3)                                  # so long nobody reads
    heard = dict.fromkeys(peers, 0)
    end = time.monotonic() + 2 * PATIENCE
    while min(heard.values()) < 59 * 170:
        for peer in peers:
            peer.sock.settimeout(0.001)
            with contextlib.suppress(socket.timeout):
                heard[peer] += peer.sock.recv(1 << 20).count(b"x")
        assert time.monotonic() < end and "dropped" not in server.err
    assert set(heard.values()) == {59 * 170}


def test_ninety_at_once_with_longer_names(start, tmp_path):
    """What ninety say while they wait for the lock is more than a send buffer holds. Who reads is not dropped."""
    line = '        elif verb == "ROOMS":\n'
    server = start(Server, script=edited(tmp_path, "server.py", (line, f'{line}            time.sleep(0.3)\n')))
    reader = server.join("reader")
    peers = server.join_all(f"{'𠀀' * 18}{n}" for n in range(90))
    reader.says("ROOMS")                             # holds the lock so long that all the others have to wait
    for peer in peers:
        peer.sends(b"MSG x\n" * 84 + b"LEAVE\n")
    heard = b""
    while heard.count(b"LEFT ") < 90:
        data = reader.sock.recv(1 << 20)
        assert data, "the reader was dropped"
        heard += data
    assert heard.count(b" x\n") > 20 * 84           # not 90: these do not read, so some may have been dropped


def test_input_after_bye_costs_little(server):
    peer = server.join("peer")
    peer.says("LEAVE")
    peer.hears("BYE .*")
    before, end = server.cpu(), time.monotonic() + 0.4
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            peer.sends(b"x" * 65536)
    assert server.cpu() - before < 0.15


def test_pasted_listing(server):
    """500 lines at the default rate arrive whole within 8 s."""
    alice, bob = server.join("alice"), server.join("bob")
    alice.hears("JOINED bob")
    listing = [f"    x[{n}] = {n}" for n in range(500)]
    started = time.monotonic()
    bob.says(*(f"MSG {line}" for line in listing))
    alice.hears(*("MSG bob " + re.escape(line) for line in listing))
    assert time.monotonic() - started < 8


@pytest.mark.parametrize("crowd", [1, 6])
def test_requests_are_cheap(server, crowd):
    """Requests that are not messages, as fast as the rate allows, hurt nobody either."""
    with Conversation(server):
        floods = [b"JOIN a%d\nJOIN b%d\n", b"JOIN c%d d\nJOIN c%d lobby\n", b"WHO\n", b"ROOMS\n", b"JOIN\n"]
        floods = [line.replace(b"%d", b"%d" % number) for line in floods for number in range(crowd)]
        peers = {server.connect(): line for line in floods}
        for peer in peers:
            peer.says("JOIN")
        threads = [threading.Thread(target=flood, args=(peer, 0.5, line)) for peer, line in peers.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for peer in peers:
            peer.resets()
    after(server, "ann", "ben")


def test_saboteurs(start):
    """Three honest talkers among five saboteurs, for two seconds."""
    server = start(Server, "--rate", 200000)
    over = time.monotonic() + 2

    def sabotage(number):
        n = number
        while time.monotonic() < over:
            peer = Peer(server.port)
            with contextlib.suppress(ConnectionError, socket.timeout):
                peer.says(f"JOIN mallory{n % 7}" if n % 3 else f"JOIN mallory{n % 7} cave{n % 4}")
                peer.sends(list(GARBAGE.values())[n % len(GARBAGE)] if n % 4 == 0 else b"MSG spam\nWHO\nROOMS\n" * (n % 50))
                for k in range(n % 9):
                    peer.says(f"JOIN m{n % 5}_{k} cave{k % 3}", "MSG moved", f"JOIN m{n % 5}_{k} lobby", "MSG back")
                if n % 5 == 1:
                    peer.says("LEAVE")
                if n % 5 == 2:
                    peer.line(1)
            (peer.resets if n % 2 else peer.sock.close)()
            n += 5
    with Conversation(server, ("ann", "ben", "cem")):
        threads = [threading.Thread(target=sabotage, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    after(server, "ann", "ben", "cem")


# ---- Starting and closing the server ------------------------------------------------------------

@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_rule_12_closing(server, signum):
    alice, bob, silent = server.join("alice"), server.join("bob"), server.connect()
    alice.hears("JOINED bob")
    server.logs("thread client-3 starts")
    server.popen.send_signal(signum)
    for n, peer in enumerate((alice, bob, silent), 1):
        peer.hears_end("BYE the server is closing")  # and no LEFT before it
        peer.sock.close()
        server.logs(f"client-{n} +thread ends after 0 messages: the server is closing")
    assert server.status() == 0


def test_rule_12_closing_in_the_middle_of_it(start, tmp_path):
    """Flooders, one that does not read, one that has not joined: all that read get BYE."""
    script = edited(tmp_path, "server.py", ("FAREWELL_SECONDS = 2 ", "FAREWELL_SECONDS = 0.3 "))
    server = start(Server, "--rate", 30000, script=script)
    alice, silent, frozen = server.join("alice"), server.connect(), server.join("frozen")
    flooders = [server.join(f"flooder{n}") for n in range(5)]
    last = {}

    def live(peer):
        tail = b""
        peer.sock.setblocking(False)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                if peer is not alice and peer is not silent:
                    peer.sock.send(b"MSG more\n" * 50)
            try:
                data = peer.sock.recv(65536)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            if not data:
                break
            tail = last[peer] = (tail + data)[-100:]
        peer.sock.close()
    threads = [threading.Thread(target=live, args=(peer,)) for peer in (alice, silent, *flooders)]
    for thread in threads:
        thread.start()
    frozen.sends(b"MSG more\n" * 3000)
    eventually(lambda: b"MSG flooder" in last.get(alice, b""), "some traffic")
    started = time.monotonic()
    assert server.close() == 0
    assert 0.3 < time.monotonic() - started < 1.3    # with 2 s for the farewell: 3 s
    for thread in threads:
        thread.join()
    assert [tail.rpartition(b"\n")[0].rpartition(b"\n")[2] for tail in last.values()] == [b"BYE the server is closing"] * 7


def test_closing_twice(server):
    frozen = server.join("frozen")                   # never hangs up: the farewell would take 2 s
    server.popen.send_signal(signal.SIGINT)
    frozen.hears("BYE .*")
    started = time.monotonic()
    assert server.close() == -signal.SIGINT
    assert time.monotonic() - started < 1
    assert server.err.count("\n") < 10


def test_closing_with_nobody_there(server):
    assert server.close() == 0
    assert server.err.splitlines()[-1].endswith("closed")


def test_first_line_of_the_log(start):
    server = start(Server, "--name", "Room 12\x1b[2J")
    server.logs("listening")
    assert re.search(r"^\d\d:\d\d:\d\d main +Room 12\ufffd\[2J listening on 127\.0\.0\.1:\d+ .*--host", server.err)
    peer = server.connect()
    peer.says("JOIN ann")
    assert "Room 12" in peer.hears("WELCOME lobby ann .*")


@pytest.mark.parametrize("host, wildcard", [("0.0.0.0", True), ("127.0.0.2", False), ("::", True), ("::1", False)])
def test_first_line_says_how_others_connect(start, host, wildcard):
    """It ends with what is typed on another machine: with an address of this machine on the network."""
    server = start(Server, "--host", host)
    line = server.logs(r"^\S+ main +Chatroom listening on (\S+):(\d+) (.*)\n")
    assert line[1] == host and line[3].endswith("this machine only; --host 0.0.0.0 opens it to the classroom)") != wildcard
    if wildcard and "not on a network" not in line[3]:
        address = re.fullmatch(rf".*python client\.py (\S+) {line[2]}", line[3])[1]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.bind((address, 0))                   # fails for an address that is not this machine's
        assert not address.startswith("127.") and address not in ("::1", host)


def test_first_line_without_a_network(start, tmp_path):
    """The broadcast address takes the place of an address elsewhere: to connect to it is not allowed."""
    server = start(Server, "--host", "0.0.0.0", script=edited(tmp_path, "server.py", ("192.0.2.1", "255.255.255.255")))
    server.logs(r"main +Chatroom listening on 0\.0\.0\.0:\d+ .*not on a network")


def test_log_that_nobody_reads(start):
    """Where the terminal of the log stands still nobody has to wait, and in the end nothing is missing."""
    server = start(Server, "--rate", 0)
    alice = server.join("alice")
    server.logs("alice joined")
    server.reading.clear()
    alice.says(*["JOIN !"] * 3000)                   # each of them is logged: much more than a pipe holds
    for _ in range(3000):
        alice.hears("ERROR .*")
    with Conversation(server):
        for n in range(20):
            server.join(f"visitor{n}", "den").leaves()
    server.popen.send_signal(signal.SIGTERM)
    alice.hears_sometime("BYE the server is closing")
    for peer in server.peers:
        peer.sock.close()
    server.reading.set()
    assert server.status() == 0
    story = ["refused: .*", *[line for n in range(20) for line in (
        f"connection from .*: thread client-{n + 4} starts", "room den created", f"visitor{n} joined den", f"visitor{n} left den",
        "room den deleted")], "closing: BYE to 3 clients"]
    lines = iter(server.err.splitlines())
    for expected in story:                           # in this order, with other lines in between
        assert any(re.search(expected, line) for line in lines), expected
    assert server.err.count("refused: ") == 3000 and server.err.count("thread ends") == 23 and server.err.endswith("closed\n")


def test_trace_shows_the_main_thread(start):
    """It shows the main thread where that takes the lock, and that it does not take it for nothing."""
    server = start(Server, "--trace")
    alice = server.join("alice")
    server.logs("client-1 +lets go of the lock\n$")
    before = len(server.err)
    assert re.search("main +waits for the lock\n.*main +has the lock\n.*main +lets go of the lock\n", server.err)
    time.sleep(0.5)                                  # as long as five looks at the deadlines take
    assert server.err[before:] == ""
    alice.sends(b"MSG h\xc3")
    server.logs(r"client-1 +recv b'MSG h\\xc3'\n")
    alice.sends(b"\xa9\r\nWHO\n")
    server.logs(r"client-1 +recv b'\\xa9\\r\\nWHO\\n'\n(.*client-1 .*lock\n)+.*client-1 +send b'WHO alice\\n' to alice\n")


def test_port_in_use(server, start):
    second = start(Process, "server.py", server.port)
    assert second.status() == 1
    assert re.fullmatch(r"server.py: cannot listen on 127.0.0.1:\d+: Address already in use; .*\n", second.err)


def test_host_that_is_not_ours(start):
    for host in ("192.0.2.1", "no such host", "a..b"):
        server = start(Process, "server.py", 0, "--host", host)
        assert server.status() == 1
        assert server.err.count("\n") == 1 and "--host" in server.err


def test_senseless_arguments(start):
    processes = [start(Process, "server.py", *arguments) for arguments in (
        (), ("x",), (-1,), (65536,), (0, "--max-clients", 0), (0, "--max-clients", "x"), (0, "--rate", -1),
        (0, "--name", ""), (0, "--name", " "), (0, "--host", ""), (0, "--no-such"), (0, 1))]
    for process in processes:
        assert process.status() == 2
        assert process.err.startswith("usage: server.py ")
        assert re.search(r"^server.py: error: .+$", process.err, re.M)


# ---- The client, and what a person sees of it ---------------------------------------------------

def screen(output, columns):
    """Return what a terminal so many columns wide shows: its lines (list of str), row and column.

    It has all the rows it needs, so nothing scrolls away. It knows what readline and the client use.
    """
    rows, row, column = [[]], 0, 0
    output = re.sub(r"\033(\[[?0-9;]*)?$", "", output)        # a code whose end is still to come
    for token in re.findall(r"\033\[[?0-9;]*[a-zA-Z@]|\033.|[^\033]", output, re.DOTALL):
        number = int(re.sub(r"\D", "", token.split(";")[0]) or 0)
        row, column = {"\r": (row, 0), "\n": (row + 1, column)}.get(token, (row, column))
        column = min(column, columns - 1) if token == "\b" or token[0] == "\033" and token[-1] != "m" else column
        line = rows[row] if row < len(rows) else rows.append([]) or rows[row]
        if token == "\b" or token.startswith("\033[") and token[-1] == "D":
            column = max(0, column - max(1, number))
        elif token[0] == "\033":
            line += " " * (column - len(line))
            if token[-1] == "A":
                row = max(0, row - max(1, number))
            elif token[-1] == "B":
                row += max(1, number)
            elif token[-1] == "C":
                column = min(columns - 1, column + max(1, number))
            elif token[-1] in "KJ":
                assert number == 0, f"unknown: {token!r}"
                del line[column:]
                if token[-1] == "J":
                    del rows[row + 1:]
            elif token[-1] == "P":
                del line[column:column + max(1, number)]
            elif token[-1] == "@":
                line[column:column] = " " * max(1, number)
            else:
                assert token[-1] in "mhl", f"unknown: {token!r}"
        elif unicodedata.combining(token):
            line[column - 1] += token
        elif token >= " ":
            width = 2 if unicodedata.east_asian_width(token) in "WF" else 1
            if column + width > columns:                     # the last column was full: autowrap
                row, column = row + 1, 0
                line = rows[row] if row < len(rows) else rows.append([]) or rows[row]
            line += " " * (column - len(line))
            line[column:column + width] = [token, ""][:width]
            column += width
        while row >= len(rows):
            rows.append([])
    return ["".join(line).rstrip() for line in rows], row, column


class Person(Process):
    """client.py under a person's hands and eyes: keys go to a terminal, `sees` looks at it."""

    def __init__(self, port, *arguments, columns=40, script=HERE / "client.py", **environment):
        self.columns = columns
        self.keyboard, self.tty = pty.openpty()
        fcntl.ioctl(self.tty, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.modes = termios.tcgetattr(self.tty)
        environment = {**os.environ, "TERM": "xterm-256color", "INPUTRC": os.devnull, **environment}
        self.popen = subprocess.Popen(
            [sys.executable, str(script), "127.0.0.1", str(port), *arguments],
            stdin=self.tty, stdout=self.tty, stderr=subprocess.PIPE, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.collected = {"out": b"", "err": b""}
        self.reading = threading.Event()
        self.reading.set()
        self.threads = [threading.Thread(target=self.collect, args=("err", self.popen.stderr), daemon=True)]
        self.eyes = threading.Thread(target=self.look, daemon=True)
        for thread in (*self.threads, self.eyes):
            thread.start()

    def look(self):
        with contextlib.suppress(OSError):                   # EIO: the terminal has been closed
            while True:
                self.collected["out"] += os.read(self.keyboard, 65536)

    def type(self, keys):
        with contextlib.suppress(OSError):                   # the terminal has been closed
            os.write(self.keyboard, keys.encode())

    def sees(self, *lines, cursor=None, seconds=PATIENCE):
        """The last lines on the screen become these; the cursor stands `cursor` columns from the left."""
        def seen():
            return screen(self.collected["out"].decode(errors="ignore"), self.columns)

        def as_expected():
            shown, _, column = seen()
            while shown and not shown[-1]:
                shown.pop()
            return shown[-len(lines):] == list(lines) and cursor in (None, column)
        try:
            eventually(as_expected, seconds=seconds)
        except AssertionError:
            raise AssertionError(f"{lines}, cursor {cursor}; but saw {seen()}") from None

    @property
    def lines(self):
        """What stands on the screen, line by line."""
        return screen(self.collected["out"].decode(errors="ignore"), self.columns)[0]

    def leaves_terminal_as_it_was(self):
        return termios.tcgetattr(self.tty) == self.modes

    def resize(self, columns):
        self.columns = columns
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def stop(self):
        super().stop()
        os.close(self.tty)
        self.eyes.join(PATIENCE)
        os.close(self.keyboard)


class Liar:
    """A server that sends whatever we like."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)
        self.port = self.listener.getsockname()[1]
        self.popen = self

    def accepts(self, data=b""):
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(data)
        return self.sock

    def stop(self):
        self.listener.close()
        if hasattr(self, "sock"):
            self.sock.close()


@pytest.fixture
def liar(start):
    return start(Liar)


@pytest.fixture
def run(start):
    """run(server, ..., typed=str) is client(...) that is stopped after the test."""
    return lambda *arguments, **more: start(client, *arguments, **more)


# ---- Through pipes ------------------------------------------------------------------------------

def test_client_in_pipes_says_and_shows(server, run, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)    # would hide that a flush is missing
    bob = server.join("bob")
    robot = run(server, "--name", "robot")
    bob.hears("JOINED robot")
    bob.says("MSG good morning")
    eventually(lambda: "bob: good morning\n" in robot.out, "a line, flushed at once")
    carol = server.join("carol")
    carol.leaves()
    eventually(lambda: "* carol joined\n* carol left\n" in robot.out)
    robot.type("hello\n  two  spaces\n//who?\n\n")
    bob.hears("JOINED carol", "LEFT carol", "MSG robot hello", "MSG robot   two  spaces", "MSG robot /who[?]")
    robot.popen.stdin.close()
    bob.hears("LEFT robot")
    assert robot.status() == 0
    assert robot.out == ("* Welcome to Chatroom, robot! You are robot in lobby.\nbob: good morning\n"
                         "* carol joined\n* carol left\n* you have left\n")
    assert robot.err == ""


def test_client_commands(server, run):
    bob = server.join("bob")
    ann = run(server, "--room", "tea", typed="ann\n/who\n/rooms\n/dance now\n/join\n/name Anna\n/join LOBBY\n"
              "/who\n/help\n/dance\nhello\n/quit\nnever said\n")
    assert ann.status() == 0
    bob.hears("JOINED Anna", "MSG Anna hello", "LEFT Anna")
    bob.hears_nothing()
    for shown in ("* in this room: ann\n", "* rooms: lobby with 1, tea with 1\n", "not a command: /dance now;",
                  "not a command: /join;", "You are Anna in tea.\n", "You are Anna in lobby.\n",
                  "* in this room: bob, Anna\n", "/rooms      which rooms"):
        assert ann.out.count(shown) == 1 or shown[0] == "/", (shown, ann.out)


@pytest.mark.parametrize("arguments, room", [((), "lobby"), (("--room", "tea"), "tea")])
def test_client_without_a_name_is_a_guest(server, run, arguments, room):
    guest = run(server, *arguments, typed="\n")
    assert guest.status() == 0 and f"You are guest1 in {room}.\n" in guest.out, guest.out


def test_client_delivers_all_that_was_typed(start, run):
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    long = "".join(f"{number} é日😀 " for number in range(2000))
    lines = [f"line {number}" for number in range(2000)]
    robot = run(server, typed="\n".join(["robot", *lines[:1000], long, *lines[1000:]]))
    bob.hears("JOINED robot", *(f"MSG robot {line}" for line in lines[:1000]))
    heard = ""
    while len(heard) < len(long):
        line = bob.line()
        assert len(line.encode()) <= len("MSG robot ") + 1020
        heard += line[len("MSG robot "):]
    assert heard == long
    bob.hears(*(f"MSG robot {line}" for line in lines[1000:]), "LEFT robot")
    assert robot.status() == 0


def test_client_shows_all_that_is_said(start, run):
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    robot = run(server, "--name", "robot")
    bob.hears("JOINED robot")
    bob.says(*(f"MSG line {number}" for number in range(3000)), "LEAVE")
    eventually(lambda: "bob left" in robot.out)
    assert re.findall("bob: line (.*)\n", robot.out) == [str(number) for number in range(3000)]


def test_client_whose_name_is_refused(server, run):
    server.join("bob")
    for typed, arguments in (("bob\nhello\n", ()), ("hello\n", ("--name", "b!"))):
        robot = run(server, *arguments, typed=typed)
        assert robot.status() == 1
        assert re.fullmatch(r"client.py: .*(bob is taken|20 letters).*--name\n", robot.err)


def test_client_arguments_without_sense(start):
    cases = ["127.0.0.1", "127.0.0.1 0", "127.0.0.1 65536", "127.0.0.1 x", "127.0.0.1 1 --name=",
             "127.0.0.1 1 --room=", "127.0.0.1 1 --room=a,b"]
    for process in [start(Process, "client.py", *case.split()) for case in cases]:
        assert process.status() == 2 and process.err.startswith("usage: ") and not process.out


def test_client_without_a_server(start):
    with socket.socket() as bound:                           # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        cases = [("127.0.0.1", bound.getsockname()[1]), ("no.such.host.invalid", 1), ("x" * 70, 1)]
        for process in [start(Process, "client.py", *case) for case in cases]:
            assert process.status() == 1
            assert re.fullmatch(r"client.py: cannot connect to .*address.*\n", process.err)


def test_client_gives_up_on_a_host_that_does_not_answer(start, tmp_path):
    script = edited(tmp_path, "client.py", ("CONNECT_SECONDS = 10 ", "CONNECT_SECONDS = 0.2 "))
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for sock in (first, second):                         # fill the queue
            sock.setblocking(False)
            sock.connect_ex(silent.getsockname())
        process = start(Process, script, *silent.getsockname())
        assert process.status(5) == 1
        assert re.fullmatch(r"client.py: cannot connect to .*timed out.*\n", process.err)


def test_client_whose_output_nobody_reads(server, start):
    reading, writing = os.pipe()
    os.close(reading)
    bob = server.join("bob")
    with subprocess.Popen([sys.executable, HERE / "client.py", "127.0.0.1", str(server.port), "--name", "ann"],
                          stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE) as robot:
        os.close(writing)
        bob.hears("JOINED ann", "LEFT ann")
        assert robot.wait(PATIENCE) == 0 and not robot.stderr.read()


@pytest.mark.parametrize("closed", [(0, 1), (2,), (0, 1, 2)])
def test_client_without_standard_input_output_or_error(server, start, closed):
    with_nothing = start(Process, "-c", f"import os, sys; [os.close(number) for number in {closed}]; os.execv(sys.executable, "
                         f"[sys.executable, 'client.py', '127.0.0.1', '{server.port}', '--name', 'x'])")
    assert with_nothing.status() == 0 and with_nothing.err == ""


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_client_in_pipes_when_the_server_ends(server, run, signum, status):
    robot = run(server, "--name", "robot")
    eventually(lambda: "You are robot" in robot.out)
    server.popen.send_signal(signum)
    assert robot.status(1 if signum == signal.SIGKILL else PATIENCE) == status
    assert robot.out.endswith("* the server is closing\n") if status == 0 else robot.err.startswith("client.py: connection lost")


def test_client_when_the_connection_is_reset(liar, start):
    ann = start(Person, liar.port, "--name", "ann")
    sock = liar.accepts(b"WELCOME r ann hi\n")
    ann.sees("* hi You are ann in r.", ">")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    assert ann.status(3) == 1 and ann.err.startswith("client.py: connection lost")
    assert ann.leaves_terminal_as_it_was()


def test_client_keys_before_the_prompt(liar, start):
    """What is typed while no prompt stands there is echoed by the system; a message takes its place."""
    ann = start(Person, liar.port, "--name", "ann")
    sock = liar.accepts(b"")
    ann.type("half")
    ann.sees("half")
    sock.sendall(b"MSG bob hi\n")
    ann.sees("bob: hi")
    sock.sendall(b"WELCOME r ann hi\n")
    ann.sees("bob: hi", "* hi You are ann in r.", "> half")


def test_client_on_a_terminal_without_a_width(server, start):
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    ann.resize(0)
    ann.columns = 80                                         # what it is taken for
    ann.type("half")
    bob = server.join("bob")
    for number in range(5):
        bob.says(f"MSG {number}")
        ann.sees(*(f"bob: {earlier}" for earlier in range(number + 1)), "> half")


# ---- Lies ---------------------------------------------------------------------------------------

LIES = (b"\033[2J\033]0;owned\007 MSG\nMSG \033[31mred \r\033[Kboo\x9b1m\nMSG\nMSG \nMSG x\n\n \nJOINED\nLEFT \nWHO\nROOMS\n"
        b"ROOMS = a==b\nWELCOME\nWELCOME x\nERROR\nHELLO w\xc3\xb6rld\xff\xfe\xc3\n\0\0\nMSG a \xe2\x80\xaeb\xe2\x80\xa8\x7f\tc\r\n")


def test_client_and_a_server_that_lies(liar, start):
    ann = start(Person, liar.port, "--name", "ann", columns=200)
    liar.accepts(LIES + b"BYE\033[2J\nBYE \033[3J\n")
    assert ann.status() == 0 and ann.leaves_terminal_as_it_was()
    shown = re.sub(r"\033\[(\d|38;5;\d+)m", "", ann.out)
    assert not re.findall("[\0-\7\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u2028\u202e]|\033(?!\\[[JKA])", shown), shown
    assert "? HELLO wörld\ufffd\ufffd\ufffd" in shown and "a: \ufffdb\ufffd\ufffd c" in shown
    assert "\033[2J" not in shown and "\033[31m" not in shown


def test_client_and_a_line_without_end(liar, run):
    robot = run(liar, "--name", "robot")
    sock = liar.accepts(b"WELCOME r robot hi\n")
    eventually(lambda: "You are robot" in robot.out)
    for _ in range(32):
        sock.sendall(b"MSG " + b"x" * 256 * 1024)
    eventually(lambda: "too long" in robot.out)
    memory = Path(f"/proc/{robot.popen.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", memory).group(1)) < 24 * 1024, memory       # KiB
    sock.sendall(b"\nMSG bob " + b"y" * 60000 + b"\nMSG bob short\nMSG bob cut o")
    sock.shutdown(socket.SHUT_WR)
    assert robot.status() == 1
    assert robot.out.endswith("bob: " + "y" * 60000 + "\nbob: short\n") and "x" not in robot.out
    assert robot.out.count("too long") == 1 and robot.err.startswith("client.py: connection lost")


# ---- At a terminal ------------------------------------------------------------------------------

def test_client_at_a_terminal(server, start):
    bob = server.join("bob")
    ann = start(Person, server.port)
    ann.sees("Your name:")
    ann.type("bob\r")
    ann.sees("Your name: bob", "! the name bob is taken", "Your name:")
    ann.type("b o!b\r")
    eventually(lambda: "20 letters" in ann.out)
    ann.sees("Your name:")
    ann.type("ann\r")
    ann.sees("in lobby.", ">", cursor=2)
    bob.hears("JOINED ann")
    ann.type("hallo")
    ann.sees("> hallo", cursor=7)
    bob.says("MSG hi")
    ann.sees("bob: hi", "> hallo", cursor=7)
    ann.type("\033[D\033[D\033[D\x7fe")                      # three to the left, correct the a
    ann.sees("bob: hi", "> hello", cursor=4)
    bob.says("MSG how are you?")
    ann.sees("bob: hi", "bob: how are you?", "> hello", cursor=4)
    ann.type("\r")
    bob.hears("MSG ann hello")
    ann.sees("bob: how are you?", "> hello", ">")
    ann.type("\033[A\033[A\033[B, bob\r")                    # up, up, down: hello, from the history
    bob.hears("MSG ann hello, bob")
    bob.hears_nothing()


def test_client_keeps_what_is_being_typed(start):
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    bob.hears("JOINED ann")
    for typed in ("x" * 38, "x" * 39, "x" * 78, "日本語" * 6 + "x", "日" * 19,
                  "x" + "日" * 19, "😀" * 40, "é" * 40, "שלום " * 9):
        ann.type(typed)
        lines, _, column = screen("> " + typed, ann.columns)
        column %= ann.columns                                # readline goes on to the next row
        for number in range(3):
            ann.sees(*(f"bob: {n}" for n in range(number)), *lines, cursor=column)
            bob.says(f"MSG {number}")
        ann.type("\033[D" * 5)
        bob.says("MSG moved")
        ann.sees("bob: 2", "bob: moved", *lines)
        ann.type("\033[C" * 5)
        ann.sees("bob: 2", "bob: moved", *lines, cursor=column)
        ann.type("\033[D!\r")
        bob.hears(f"MSG ann {typed[:-1]}!{typed[-1]}")
        ann.sees(">", cursor=2)                              # before that, the system echoes keys


def test_client_twenty_messages_while_one_is_typed(start):
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    bob.hears("JOINED ann")
    text = "The quick brown fox jumps over the lazy dog, and then once more."
    for number in range(20):
        ann.type(text[3 * number:3 * number + 3])
        bob.says(f"MSG {number}")
    ann.type(text[60:])
    ann.sees(*(f"bob: {number}" for number in range(20)), *screen("> " + text, 40)[0])
    ann.resize(60)
    bob.says("MSG wider")
    ann.type("\r")
    bob.hears(f"MSG ann {text}")
    assert "\033[?2004h" not in ann.out                      # bracketed paste would make it one line
    ann.type("".join(f"pasted {number}\r" for number in range(50)))
    bob.hears(*(f"MSG ann pasted {number}" for number in range(50)))


def test_client_many_messages_while_keys_come(start):
    """Four hundred messages while a key comes every 4 ms: all are shown, all that is typed is sent."""
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann", columns=60)
    ann.sees("* Welcome to Chatroom, ann! You are ann in lobby.", ">")
    bob.hears("JOINED ann")
    typed = [f"line {number} of what ann types; it is longer than her screen is wide" for number in range(4)]

    def talk():
        for number in range(400):
            bob.says(f"MSG number {number}")
            time.sleep(0.003)                                # about as fast as the keys come
    talker = threading.Thread(target=talk)
    talker.start()
    for key in "\r".join([*typed, "half"]):
        ann.type(key)
        time.sleep(0.004)
    talker.join()
    bob.hears(*(f"MSG ann {line}" for line in typed))
    eventually(lambda: "number 399" in ann.out)
    ann.sees("bob: number 399", "> half")
    lines = [line for line in ann.lines if line][1:]
    assert [line for line in lines if line.startswith("bob: ")] == [f"bob: number {number}" for number in range(400)]
    assert [line for line in lines if not line.startswith("bob: ")] == [
        *(row for line in typed for row in screen(f"> {line}", 60)[0]), "> half"]


def test_client_message_while_searching_and_far_from_the_end(start):
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    ann.type("good morning\r")
    ann.type("good evening\r")
    bob.hears("JOINED ann", "MSG ann good morning", "MSG ann good evening")
    ann.type("\x12morn")                                     # Ctrl-R: search the history
    ann.sees("(reverse-i-search)`morn': good morning")
    bob.says("MSG hi")
    ann.sees("> good evening", "bob: hi", "(reverse-i-search)`morn': good morning")
    ann.type("\r")
    bob.hears("MSG ann good morning")
    ann.type("x" * 100 + "\x01")                             # Ctrl-A: to the beginning of three rows
    ann.sees("> " + "x" * 38, "x" * 40, "x" * 22, cursor=2)
    bob.says("MSG hi")
    ann.sees("bob: hi", "> " + "x" * 38, "x" * 40, "x" * 22, cursor=2)
    ann.type("y")
    ann.resize(30)
    bob.says("MSG narrow")
    ann.sees("bob: narrow", "> y" + "x" * 27, "x" * 30, "x" * 30, "x" * 13, cursor=3)
    ann.type("\r")
    bob.hears("MSG ann yx{100}")


def test_client_with_a_readline_that_cannot_clear_the_line(start, tmp_path):
    """As with libedit, on macOS: a row survives; of several, the upper ones stay there once more."""
    script = edited(tmp_path, "client.py", ('"rl_clear_visible_line"', '"rl_no_such_function"'))
    server = start(Server, "--rate", 0)
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann", script=script)
    ann.sees("in lobby.", ">")
    ann.type("half a line\033[D\033[D")
    ann.sees("> half a line", cursor=11)
    for number in range(3):
        bob.says(f"MSG {number}")
        ann.sees("in lobby.", *(f"bob: {earlier}" for earlier in range(number + 1)), "> half a line", cursor=11)
    ann.type("x" * 40)
    ann.sees("> half a li" + "x" * 29, "x" * 11 + "ne", cursor=11)
    bob.says("MSG hi")
    ann.sees("bob: hi", "> half a li" + "x" * 29, "x" * 11 + "ne", cursor=11)
    ann.type("\r")
    bob.hears("JOINED ann", "MSG ann half a lix{40}ne")


def test_client_flooded_by_the_server(liar, start):
    """As many lines as the terminal takes: what is typed goes out at once, and memory is bounded."""
    ann = start(Person, liar.port, "--name", "ann")
    sock = liar.accepts(b"WELCOME r ann hi\n")
    ann.sees("* hi You are ann in r.", ">")
    over = threading.Event()

    def flood():
        while not over.is_set():
            sock.sendall(b"MSG bob buy my book\n" * 100)
    flooder = threading.Thread(target=flood, daemon=True)
    flooder.start()
    eventually(lambda: ann.out.count("buy my book") > 5000)
    heard = b""
    for number in range(5):
        typed, began = f"typed {number}\r", time.monotonic()
        ann.type(typed)
        while f"MSG {typed[:-1]}\n".encode() not in heard:
            heard += sock.recv(1000)
        assert time.monotonic() - began < 0.5
    memory = Path(f"/proc/{ann.popen.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", memory).group(1)) < 24 * 1024, memory       # KiB
    over.set()
    flooder.join(PATIENCE)
    liar.stop()
    assert ann.status(2 * PATIENCE) == 1


@pytest.mark.parametrize("ending", [Peer.resets, lambda peer: peer.sock.close()], ids=["reset", "close"])
@pytest.mark.parametrize("doing", ["a key", "an answer", "a send"])
def test_client_ends_at_once(liar, start, doing, ending):
    """Whatever it is waiting for, within 0.3 s after the connection has ended."""
    ann = start(Person, liar.port, "--name", "ann")
    sock = liar.accepts(b"" if doing == "an answer" else b"WELCOME r ann hi\n")
    if doing == "an answer":
        assert sock.recv(100) == b"JOIN ann\n"
    else:
        ann.sees("* hi You are ann in r.", ">")
        ann.type("half a line")
        ann.sees("> half a line")
    if doing == "a send":                                    # type more than is sent until somebody reads it
        threading.Thread(target=ann.type, args=["\r" + ("x" * 1000 + "\r") * 2000], daemon=True).start()
        shown = -1
        while shown < len(ann.collected["out"]):
            shown = len(ann.collected["out"])
            time.sleep(0.2)                                  # nothing is echoed in all that time
    liar.sock = sock
    began = time.monotonic()
    ending(liar)
    assert ann.status(3) == 1 and time.monotonic() - began < 0.3
    assert ann.err.startswith("client.py: connection lost") and ann.leaves_terminal_as_it_was()


def test_client_in_the_background_ends_with_the_server(server, start):
    """A shell's `&` has SIGINT ignored, which is how the reader thread wakes the main thread."""
    robot = start(Process, "client.py", "127.0.0.1", server.port, "--name", "robot", stdin=subprocess.PIPE,
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    eventually(lambda: "You are robot" in robot.out)
    server.popen.kill()
    assert robot.status() == 1


def test_client_at_a_full_server(start, run):
    server = start(Server, "--max-clients", 1)
    alice = server.join("alice")
    for arguments in (("--name", "bob"), ("--name", "bob", "--room", "tea"), ("--room", "tea")):
        bob = run(server, *arguments, typed="\n")
        assert bob.status() == 0 and bob.out == "* the server is full (1 clients)\n" and bob.err == ""
    alice.hears_nothing()


def test_client_answer_stands_above_the_next_prompt(server, start):
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    for number in range(1, 26):
        ann.type("/who\r")
        eventually(lambda: ann.out.count("in this room") == number)
    ann.sees("* in this room: ann", ">")
    shown = screen(ann.out, 40)[0]
    assert shown.count("* in this room: ann") == shown.count("> /who") == 25, shown


def test_client_colours(server, start, run):
    ann = start(Person, server.port, "--name", "ann", columns=80)
    plain = [start(Person, server.port, "--name", "p1", columns=80, NO_COLOR=""),
             start(Person, server.port, "--name", "p2", columns=80, TERM="dumb"), run(server, "--name", "p3")]
    for person in (ann, *plain):
        eventually(lambda: "You are" in person.out)
    bob, carol = server.join("bob"), server.join("carol")
    bob.says("MSG one")
    carol.says("MSG two")
    bob.says("MSG three")
    for person in (ann, *plain):
        eventually(lambda: all(number in person.out for number in ("one", "two", "three")))
    assert "\033[2m* bob joined\033[0m" in ann.out
    colours = dict(re.findall(r"(\w+)\033\[0m: (?:one|two)", ann.out) and
                   [(name, colour) for colour, name in re.findall(r"\033\[38;5;(\d+)m(\w+)\033\[0m: (?:one|two)", ann.out)])
    assert colours["bob"] != colours["carol"] and f"\033[38;5;{colours['bob']}mbob\033[0m: three" in ann.out
    for person in plain:
        assert not re.search(r"\033\[[0-9;]*m", person.out)
    for person in plain[1:]:
        assert "\033" not in person.out


def test_client_with_a_simple_terminal_loses_nothing(server, start):
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann", TERM="dumb")
    ann.sees("in lobby.", ">")
    bob.hears("JOINED ann")
    ann.type("hel")
    ann.sees("> hel")
    bob.says("MSG hi")
    ann.sees("bob: hi", ">")
    ann.type("lo\r")
    bob.hears("MSG ann hello")


@pytest.mark.parametrize("keys", ["/quit\r", "\x04", "\x03", "half a line\x03"], ids=ascii)
def test_client_leaves(server, start, keys):
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann")
    ann.sees("in lobby.", ">")
    ann.type(keys)
    assert ann.status() == 0 and ann.err == "" and ann.leaves_terminal_as_it_was()
    bob.hears("JOINED ann", "LEFT ann")
    bob.hears_nothing()


@pytest.mark.parametrize("key", ["\x04", "\x03"], ids=ascii)
@pytest.mark.parametrize("asked", ["at once", "again"])
def test_client_leaves_when_asked_for_its_name(server, start, key, asked):
    server.join("bob")
    ann = start(Person, server.port, *(["--name", "bob"] if asked == "again" else []))
    ann.sees("Your name:")
    ann.type(key)
    assert ann.status() == 0 and ann.err == "" and ann.leaves_terminal_as_it_was()


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 0), (signal.SIGKILL, 1)])
@pytest.mark.parametrize("arguments, keys, prompt", [(["--name", "ann"], "half a line", "> half a line"),
                                                     ([], "an", "Your name: an")])
def test_client_at_a_terminal_when_the_server_ends(server, start, signum, status, arguments, keys, prompt):
    ann = start(Person, server.port, *arguments)
    ann.sees(prompt[:-len(keys)].rstrip())
    ann.type(keys)
    ann.sees(prompt)
    server.popen.send_signal(signum)
    assert ann.status(3) == status and ann.leaves_terminal_as_it_was()
    if status:
        assert ann.err == "client.py: connection lost; start again when the server is back\n"
    else:
        ann.sees(prompt, "* the server is closing")


def test_client_where_input_cannot_be_interrupted(server, start, tmp_path):
    script = edited(tmp_path, "client.py", ('BELL = getattr(signal, "SIGUSR1", None)', "BELL = None"),
                    ("    import readline ", "    import no_readline_on_windows as readline "))
    bob = server.join("bob")
    ann = start(Person, server.port, "--name", "ann", columns=70, script=script)
    bob.hears("JOINED ann")
    eventually(lambda: ann.err == "> ", "the prompt, which Python prints on standard error here")
    bob.says("MSG hi")
    ann.sees("bob: hi", ">")
    ann.type("hello\r")
    bob.hears("MSG ann hello")
    server.popen.kill()
    eventually(lambda: "press Enter" in ann.out)
    ann.type("\r")
    assert ann.status() == 1 and "client.py: connection lost" in ann.err


# ---- The lesson: what README says is what happens -------------------------------------------------
#
# Everything is read from README.md, so that it cannot part from the scripts: the session, the walk,
# the transcript of nc, and the edits of the experiments.

README = (HERE / "README.md").read_text(encoding="utf-8")


def section(heading):
    """Return README's text under a heading, up to the next one of its level or above."""
    start = re.search(rf"^(#+) {heading}.*\n", README, re.M)
    assert start, f"README has no heading {heading}"
    rest = README[start.end():]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", re.sub(r"^```.*?^```", lambda block: "x" * len(block[0]), rest, flags=re.M | re.S), re.M)
    return rest[:end.start()] if end else rest


def blocks(text, language):
    """Return the fenced blocks of that language in `text`, without the fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def columns(block):
    """Return the rows (lists of cells) of a transcript; a cell that is indented goes on from the last."""
    rows, last = [], {}
    for line in block.splitlines()[2:]:
        cells = [cell.rstrip() for cell in line.split("|")]
        cells = cells[:1] + [cell[1:] for cell in cells[1:]]
        rows.append([])
        for number, cell in enumerate(cells):
            if cell.startswith("    "):
                row, place = last[number]
                row[place] += " " + cell.strip()
                cell = ""
            elif cell:
                last[number] = (rows[-1], number)
            rows[-1].append(cell)
    return rows


def masked(line):
    """A line of the log without what differs from run to run: the clock and the ports."""
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", re.sub(r"^\d\d:\d\d:\d\d", "hh:mm:ss", line))


# The session and the walk

def parts(transcript):
    """Return each column of a transcript as a list of lines."""
    return [[cell for cell in column if cell] for column in zip(*columns(transcript))]


def test_lesson_session(start):
    """The session in README, with the real scripts in real terminals."""
    [session] = blocks(section("A session"), "transcript")
    running, shown = [None, None, None], [[], [], []]

    def on_screen(number):
        if number == 0:
            return [masked(line) for line in server.err.splitlines()]
        lines = [line.rstrip() for line in running[number].lines]
        return [line for line in lines if line not in ("", ">", "Your name:")]

    for row in columns(session):
        for number, cell in enumerate(row):
            prompt, _, typed = cell.partition(" " if cell.startswith(">") else ": ")
            if cell.startswith("$ python server.py "):
                server = running[0] = start(Server)
                assert cell.split()[3] == "12345"
            elif cell.startswith("$ python client.py 127.0.0.1 12345"):
                running[number] = start(Person, server.port, *cell.split()[5:], columns=80)
            elif cell == "^C":
                server.popen.send_signal(signal.SIGINT)
            elif cell:
                shown[number].append(masked(cell) if number == 0 else cell)
                if number and prompt in ("Your name", ">"):
                    running[number].type(f"{typed}\n")
        for number in filter(running.__getitem__, range(3)):
            eventually(lambda: on_screen(number)[:len(shown[number])] == shown[number], f"{shown[number]}; there is {on_screen(number)}")
            if number:
                eventually(lambda: running[number].lines[-1].rstrip() in ("Your name:", ">") or "* you have left" in on_screen(number), "a prompt")
    assert [process.popen.wait(PATIENCE) for process in running] == [0, 0, 0]
    assert [on_screen(number) for number in range(3)] == shown


def functions(script):
    """Return {name: lines of its code} of the functions in a script."""
    text = (HERE / script).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lines, found = text.splitlines(), {}
    for node in nodes:
        found.setdefault(node.name, []).extend(lines[node.lineno - 1:max(getattr(inner, "end_lineno", 0) for inner in ast.walk(node))])
    return found


def table(text):
    """Return the cells of the rows of the table in `text`, each with its pieces of code (in backticks)."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[re.findall(r"`(.+?)`", cell) for cell in row] for row in rows if set(row[0]) != {"-"}][1:]


@pytest.mark.parametrize("script, heading, steps", [("server.py", "The walk: eight", 8), ("client.py", "The walk: five", 5)])
def test_lesson_walk(script, heading, steps):
    """Its functions are in the code; its lines are in the session, which the test above plays."""
    [session] = blocks(section("A session"), "transcript")
    log, *screens = parts(session)
    rows = table(section(heading))
    assert len(rows) == steps
    for _, _, names, lines in rows:
        assert names and set(names) <= set(functions(script)), f"not all in {script}: {names}"
        for line in lines:
            if script == "server.py" and line != "--trace":
                assert any(re.match(rf"\S+ \S+ +([^ ].* )?{re.escape(line)}( \(.*)?$", entry) for entry in log), line
            elif script == "client.py":
                assert any(entry.startswith(line) for screen in screens for entry in screen), line


def test_lesson_one_message(start):
    """The functions named on the way of one message, and the trace of it."""
    [steps] = blocks(section("One message"), "text")
    for script, names in re.findall(r"^ +\d\. (\w+\.py) +((?:\w+, )*\w+)  ", steps, re.M):
        assert set(names.split(", ")) <= set(functions(script)), (script, names)
    [expected] = blocks(section("One message"), "trace")
    server = start(Server, "--trace")
    alice, bob = server.join("alice"), server.join("bob")
    server.logs(r"client-2 +lets go of the lock\n$")
    before = len(server.err)
    alice.says("MSG hello")
    bob.hears("MSG alice hello")
    eventually(lambda: server.err.count("\n", before) == expected.count("\n"), "the trace")
    assert [masked(line) for line in server.err[before:].splitlines()] == [masked(line) for line in expected.splitlines()]


def test_lesson_from_c():
    """What stands in the column of Python stands in server.py, too."""
    text = (HERE / "server.py").read_text(encoding="utf-8")
    for _, codes, *_ in table(section("From C")):
        for code in codes:
            assert code.rstrip("…)") in text, code


# The protocol

def test_lesson_nc(server):
    """The transcript of nc, over raw sockets."""
    [transcript] = blocks(section("`nc` as a client"), "transcript")
    peers = [server.connect(), server.connect()]
    for row in columns(transcript):
        for peer, cell in zip(peers, row):
            if cell.startswith("> "):
                peer.says(cell[2:])
            elif cell:
                peer.hears(re.escape(cell))
    for peer in peers:
        peer.hears_end()


def test_lesson_protocol():
    """Each line of the protocol is one that the scripts know, and most can be seen in the transcript."""
    for heading, script in (("What a client sends", "client.py"), ("What the server sends", "server.py")):
        verbs = [codes[0].split()[0] for codes, *_ in table(section(heading))]
        assert len(verbs) == len(set(verbs)) == (5 if script == "client.py" else 8)
        for verb in verbs:
            assert re.search(rf'"{verb}[ "]', (HERE / script).read_text(encoding="utf-8")), f"{script} knows no {verb}"
            [transcript] = blocks(section("`nc` as a client"), "transcript")
            assert re.search(rf"^(.*\| )?{verb} ?|> {verb}\b", transcript, re.M | re.I), f"not in the transcript: {verb}"
    rules = section("The rules")
    assert re.findall(r"^(\d+)\.", rules, re.M) == [str(n) for n in range(1, 13)]
    text = (HERE / "server.py").read_text(encoding="utf-8")
    for constant, words in (("MAX_REQUEST = 1024 ", "1024 bytes"), ('r"[\\w-]{1,20}"', "1 to 20 letters"), ("JOIN_SECONDS = 30 ", "30 seconds"),
                            ("FAREWELL_SECONDS = 2 ", "2 seconds at most"), ("SEND_BUFFER = 256 * 1024 ", "256 KiB"), ("RECEIVE_BUFFER = 64 * 1024 ", "64 KiB"),
                            ('"--max-clients", type=int, default=100,', "100 clients"), ('"--rate", type=int, default=8192,', "8192 bytes")):
        assert constant in text and words in rules, constant


# The experiments

class Experiment:
    """What README says of an experiment: its edits, its commands, and what one sees."""

    def __init__(self, number):
        self.number = number
        self.text = section(f"Experiment {number}:")
        self.sees = blocks(self.text, "text")
        self.commands = "\n".join(blocks(self.text, "sh"))
        self.edits, script, function = [], None, None
        for name, place, block in re.findall(r"(?:[Ii]n|of) `(server\.py|client\.py)`|[Ii]n `(\w+)`|^```diff\n(.*?)^```", self.text, re.M | re.S):
            script, function = name or script, place or (None if name else function)
            if block:
                old, new = ("".join(line[1:] + "\n" for line in block.splitlines() if line[0] == sign) for sign in "-+")
                self.edits.append((script, function, old, new))

    def applied(self, tmp_path, *numbers, script="server.py"):
        """Return the path of a copy of `script` with those of the edits (from 1); without any, the script itself."""
        if not numbers:
            return HERE / script
        chosen = []
        for name, function, old, new in [self.edits[number - 1] for number in numbers]:
            text = (HERE / name).read_text(encoding="utf-8")
            where = f"README, experiment {self.number}: this edit of {name}"
            assert name == script and old and new != old
            assert f"\n{text}".count(f"\n{old}") == 1, f"{where} does not apply any more:\n{old}"
            assert not function or old in "\n".join(functions(name)[function]) + "\n", f"{where} is not in {function}:\n{old}"
            chosen.append((f"\n{old}", f"\n{new}"))
        copy = tmp_path / "-".join(map(str, numbers))
        copy.mkdir(exist_ok=True)
        return edited(copy, script, *chosen)


def chatting(start, server, name, script=HERE / "client.py", stdin=subprocess.PIPE):
    """Start client.py with pipes and wait until it has joined."""
    process = start(Process, script, "127.0.0.1", server.port, "--name", name, stdin=stdin)
    eventually(lambda: f"You are {name} in lobby." in process.out, f"{name} to join: {process.err}")
    return process


def chatting_on(start, experiment, server):
    """Start the experiment's own `yes ... | python client.py ...`."""
    words, name = re.search(r"^yes (.+) \| python client\.py 127\.0\.0\.1 12345 --name (\w+)$", experiment.commands, re.M).groups()
    yes = subprocess.Popen(["sh", "-c", f"exec yes {words}"], stdout=subprocess.PIPE)
    process = chatting(start, server, name, stdin=yes.stdout)
    yes.stdout.close()                           # so that `yes` ends together with the client
    threading.Thread(target=yes.wait, daemon=True).start()
    return process


def test_lesson_experiment_1_one_recv(start, tmp_path):
    experiment = Experiment(1)
    three = re.search(r"printf '(msg one.*?)'", experiment.commands).group(1).replace(r"\n", "\n")

    def try_it(broken):
        server = start(Server, script=experiment.applied(tmp_path, *broken))
        bob, ann = chatting(start, server, "bob"), server.join("ann")
        ann.sends(three.encode())
        eventually(lambda: "three" in bob.out, "three messages")
        ann.sends(b"msg hel")
        if broken:
            eventually(lambda: "ann: hel\n" in bob.out, "half a message")
        else:
            time.sleep(0.1)                      # the gap is what this is about
        ann.sends(b"lo\n")
        if broken:
            ann.hears(re.escape(experiment.sees[1].strip()))
            assert bob.out.endswith(experiment.sees[0])
        else:
            eventually(lambda: bob.out.endswith("ann: one\nann: two\nann: three\nann: hello\n"), "four messages")

    side_by_side(try_it, [1], [])


def test_lesson_experiment_2_decode_what_has_come(start, tmp_path):
    experiment = Experiment(2)
    typed = re.search(r"^echo '(.*)' \|", experiment.commands, re.M).group(1)

    def try_it(broken):
        server = start(Server, script=experiment.applied(tmp_path, *broken))
        bob, ann = chatting(start, server, "bob"), chatting(start, server, "ann")
        ann.type(f"{typed}\n")
        said = experiment.sees[0] if broken == [1, 2] else f"ann: {typed}\n"
        eventually(lambda: bob.out.endswith(said), f"{said}; there is {bob.out}")

    side_by_side(try_it, [], [1], [1, 2])


def test_lesson_experiment_3_ignore_the_end(start, tmp_path):
    experiment = Experiment(3)

    def try_it(broken):
        server = start(Server, script=experiment.applied(tmp_path, *broken))
        alice, ghost = chatting(start, server, "alice"), server.join("ghost")
        eventually(lambda: "* ghost joined" in alice.out, "ghost")
        ghost.sock.close()
        if not broken:
            eventually(lambda: alice.out.endswith(experiment.sees[1]), "ghost to leave")
        before = server.cpu()
        time.sleep(0.5)                          # the processor time used in half a second
        if not broken:
            assert server.cpu() - before < 0.1
            return
        assert server.cpu() - before > 0.5 * 0.2     # 100 %, but the machine may be busy
        alice.type("/who\n")
        eventually(lambda: alice.out.endswith(experiment.sees[0]), f"the ghost; there is {alice.out}")
        other = server.connect()
        other.says("JOIN ghost")
        other.hears("ERROR the name ghost is taken")
        alice.type("hello?\n/who\n")            # the first is answered with a reset
        eventually(lambda: alice.out.endswith(2 * experiment.sees[0]), f"the ghost; there is {alice.out}")
        alice.type("hello?\n")                   # the second cannot be sent any more
        eventually(lambda: alice.out.endswith(experiment.sees[1]), f"the ghost to leave; there is {alice.out}")
        server.logs("connection lost: Broken pipe")

    side_by_side(try_it, [1], [])


def test_lesson_experiment_4_trust_the_text(start, tmp_path):
    experiment = Experiment(4)
    payload = re.search(r"printf '(msg .*?)'", experiment.commands).group(1).encode().decode("unicode_escape")
    forged, safe = experiment.sees
    for edits_of_server, edits_of_client in (([], []), ([1], []), ([1], [2])):
        server = start(Server, script=experiment.applied(tmp_path, *edits_of_server))
        carol = server.join("carol")
        bob = chatting(start, server, "bob", script=experiment.applied(tmp_path, *edits_of_client, script="client.py"))
        server.join("mallory").says(payload.rstrip("\n"))
        heard = carol.hears_sometime("MSG mallory .*")
        assert ("\033[2J" in heard) == bool(edits_of_server)
        eventually(lambda: forged in bob.out, "the message")
        assert bob.out.endswith(f"mallory: \033[2J\033[H{forged}" if edits_of_client else safe)


def test_lesson_experiment_5_take_the_lock_away(start, tmp_path):
    experiment = Experiment(5)
    servers = [start(Server, script=experiment.applied(tmp_path, *broken)) for broken in ([1, 2], [2])]
    anns = [[server.connect(), server.connect()] for server in servers]
    for ann in sum(anns, []):
        ann.says("JOIN ann")
    for server, pair, expected in zip(servers, anns, experiment.sees):
        heard = sorted((ann.line() for ann in pair), reverse=True)
        other = server.connect()
        other.says("ROOMS", "LEAVE")
        assert [*heard, other.line(), other.line()] == expected.splitlines()


def test_lesson_experiment_6_wait_for_the_reader(start, tmp_path):
    experiment = Experiment(6)
    rate = re.search(r"server\.py 12345 (--rate) (\d+)", experiment.commands).groups()

    def try_it(broken):
        server = start(Server, *rate, script=experiment.applied(tmp_path, *broken))
        bob, alice = chatting(start, server, "bob"), chatting(start, server, "alice")
        bob.popen.send_signal(signal.SIGSTOP)
        zoe = chatting_on(start, experiment, server)
        if broken:
            heard = -1
            while heard < len(alice.collected["out"]):
                heard = len(alice.collected["out"])
                time.sleep(0.3)                  # frozen: nothing comes in all that time
            assert heard > 100000
            alice.type("/who\n")
            other = server.connect()
            other.says("JOIN other")
            with pytest.raises(socket.timeout):
                other.line(0.3)
            assert "in this room" not in alice.out and "bob left" not in alice.out
            bob.popen.send_signal(signal.SIGCONT)
            eventually(lambda: "* in this room: " in alice.out, "the thaw")
        else:
            eventually(lambda: experiment.sees[0] in zoe.out, "bob to be dropped")
            server.logs("dropped: it does not read")
            alice.type("/who\n")
            eventually(lambda: "* in this room: alice, zoe\n" in alice.out, "an answer")

    side_by_side(try_it, [1], [])


def test_lesson_experiment_7_lock_twice(start, tmp_path):
    experiment = Experiment(7)
    start(Server).join("ann")                    # without the edit
    [options] = re.findall(r"^python (.*) server\.py 12345$", experiment.commands, re.M)
    server = start(Process, *options.split(), experiment.applied(tmp_path, 1), 0)
    port = eventually(lambda: re.search(r" listening on \S+:(\d+) ", server.err), "the server to listen").group(1)
    ann = Peer(int(port))
    ann.says("JOIN ann")
    with pytest.raises(socket.timeout):
        ann.line(0.3)
    assert server.err.endswith("client-1  ann joined lobby\n")
    server.popen.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        server.popen.wait(0.3)
    server.popen.send_signal(signal.SIGABRT)
    assert server.status() == -signal.SIGABRT
    dump = re.sub(r"0x[0-9a-f]+", "0x…", server.err[server.err.index("Fatal"):])
    dump = re.sub(r'"\S+/server\.py", line \d+', '"server.py", line …', dump)
    dump = re.sub(r'(  File "/.*\n)+', "  …\n", dump)        # Python's own functions
    assert dump == experiment.sees[0]
    ann.sock.close()


def test_lesson_experiment_8_a_thread_ends_alone(start, tmp_path):
    experiment = Experiment(8)

    def try_it(broken):
        server = start(Server)
        alice = start(Person, server.port, "--name", "alice", columns=80, script=experiment.applied(tmp_path, *broken, script="client.py"))
        eventually(lambda: alice.lines[-1] == ">", "the prompt")
        server.popen.send_signal(signal.SIGINT)
        server.logs("closing: BYE")
        if broken:
            with pytest.raises(subprocess.TimeoutExpired):
                alice.popen.wait(0.5)            # nothing happens in half a second, nor later
            assert "closing" not in "".join(alice.lines)
            alice.type("\n")
        assert alice.popen.wait(PATIENCE) == 0
        eventually(lambda: experiment.sees[0].strip() in alice.lines, "the reason")
        assert server.status() == 0

    side_by_side(try_it, [1], [])


def test_lesson_experiment_9_a_short_queue(start, tmp_path):
    experiment = Experiment(9)
    clients = int(re.search(r"seq (\d+)", experiment.commands).group(1))
    slow, short = (start(Server, script=experiment.applied(tmp_path, *broken)) for broken in ([1], [1, 2]))
    welcome, coming = {slow: [], short: []}, []

    def come(server, sock):
        with contextlib.suppress(OSError):
            sock.settimeout(PATIENCE)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"JOIN\n")
            welcome[server].append(sock.recv(100))

    for _ in range(clients):
        for server in (slow, short):
            sock = socket.socket()
            coming.append((sock, threading.Thread(target=come, args=(server, sock), daemon=True)))
            coming[-1][1].start()
    began = time.monotonic()
    try:
        eventually(lambda: len(welcome[slow]) == clients, "all of them where the queue is long")
        time.sleep(max(0, began + 0.9 - time.monotonic()))   # TCP asks again after a second
        assert 0 < len(welcome[short]) < clients
        assert all(line.startswith(b"WELCOME ") for line in welcome[slow] + welcome[short])
    finally:
        for sock, thread in coming:              # or their TCP would ask on, and find another test's server at that port
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
            sock.close()


def test_lesson_experiment_10_no_pacing(start):
    experiment = Experiment(10)
    assert not experiment.edits
    option = re.search(r"server\.py 12345 (--rate) (0)$", experiment.commands, re.M).groups()

    def without_pacing():
        server = start(Server, *option)
        bob = start(Person, server.port, "--name", "bob")
        bob.sees("in lobby.", ">")
        chatting_on(start, experiment, server)
        assert bob.popen.wait(PATIENCE) == 1
        eventually(lambda: bob.err == experiment.sees[0], "the reason")
        server.logs(rf"client-1 .*{experiment.sees[1]}")
        assert bob.collected["out"].count(b"buy my book") > 1000

    def with_pacing():
        server = start(Server)
        bob, carol = chatting(start, server, "bob"), server.join("carol")
        mallory = chatting_on(start, experiment, server)
        before = bob.out.count("\n")
        time.sleep(0.5)                          # the lines that come in half a second
        assert 100 < bob.out.count("\n") - before < 500
        began = time.monotonic()
        bob.type("hi\n")
        carol.hears_sometime("MSG bob hi")
        assert time.monotonic() - began < 1
        assert bob.popen.poll() is mallory.popen.poll() is None and "dropped" not in server.err

    side_by_side(lambda variant: variant(), without_pacing, with_pacing)


# The rest of README

def test_lesson_commands_and_links(start):
    """README names no file, no option and no place in itself that is not there."""
    helps = {script: start(Process, script, "--help") for script in ("server.py", "client.py")}
    for script, process in helps.items():
        assert process.status() == 0
    for script in re.findall(r"[\w/-]+\.(?:py|txt|md)\b", README):
        assert (HERE / script).exists(), script
    for line in re.findall(r"python(?: -X \w+)? (?:server|client)\.py[^`\n|&>)]*", README):
        script, arguments = re.search(r"(\w+\.py)(.*)", line).groups()
        for option in re.findall(r"--[\w-]+", arguments):
            assert option in helps[script].out, line
    for option in re.findall(r"`[^`\n]*?(--[a-z-]+)", README):
        assert any(option in process.out for process in helps.values()), option
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S), re.M)
    places = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(places) == len(set(places))
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links and all(link[0] == "#" and link[1:] in places for link in links), links


def test_lesson_demo():
    """The demo's commands are the client's, its log lines those of the session."""
    demo = section("A demo in ten minutes")
    for command in re.findall(r"`(/\w+)", demo):
        assert f'"{command}"' in (HERE / "client.py").read_text(encoding="utf-8"), command
    for message in re.findall(r"^\| `(.*?)` ?…? \|", section("When it does not connect"), re.M):
        message = message.replace("ann", "{name}")
        assert any(message in (HERE / script).read_text(encoding="utf-8") for script in ("server.py", "client.py")), message


# ---- How fast -----------------------------------------------------------------------------------

def fan_out(server, clients, talkers, count, pause):
    """Let `talkers` members in turn say `count` messages each to a room of `clients`; print the figures.

    One message is on its way at a time: the next is said when all have heard the last, and `pause`
    seconds later. The delay of a message is the time until the last of the others has heard it.
    Nothing may be lost; how long it takes is not judged.
    """
    server.logs("listening")
    before = server.rss()
    peers = [server.join(f"p{n}") for n in range(clients)]
    for peer in peers:
        peer.says("WHO")
        peer.hears_sometime("WHO .*")
        peer.sock.settimeout(None)       # a deadline kept by the system is cheaper: it is part of the delay
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
    memory = (server.rss() - before) / clients
    delays, lost = [], 0
    for n in range(count):
        for talker in peers[:talkers]:
            said = time.monotonic()
            talker.says(f"MSG {n}")
            try:
                lost += sum(not peer.sock.recv(4096).endswith(b" %d\n" % n) for peer in peers if peer is not talker)
            except BlockingIOError:
                pytest.fail(f"message {n} has been lost: after {PATIENCE} s somebody has not heard it")
            delays.append(time.monotonic() - said)
            time.sleep(pause)
    rate = len(delays) * (clients - 1) / sum(delays)
    print(f"\n{clients} clients, {len(delays)} messages: {rate:,.0f} deliveries/s, delay until all have it: median "
          f"{sorted(delays)[len(delays) // 2] * 1000:.2f} ms, worst {max(delays) * 1000:.2f} ms; lost: {lost}; "
          f"{memory:.0f} KiB of memory a client")
    assert lost == 0


def test_fan_out_as_fast_as_possible(start):
    fan_out(start(Server, "--rate", 0), 50, 10, 50, 0)


def test_fan_out_at_the_default_rate(server):
    fan_out(server, 50, 10, 5, 0.005)


def test_fan_out_to_three_hundred(start):
    fan_out(start(Server, "--rate", 0, "--max-clients", 300), 300, 5, 10, 0)
