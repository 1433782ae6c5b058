#!/usr/bin/env python3
"""A chatroom server: one thread for each client, one lock, nothing but the standard library.

    python server.py 12345                 in one terminal
    python client.py 127.0.0.1 12345       in another, and in one more
    nc 127.0.0.1 12345                     is a client too: type `join ann`, `msg hi`, `leave`

The main thread accepts connections and starts a thread for each. That thread reads the client's
requests (JOIN, MSG, WHO, ROOMS, LEAVE; one per line) and carries them out under the one lock: it
changes the rooms, and sends what the client says straight to the sockets of the others in its room.
"""
import argparse
import atexit
import contextlib
import itertools
import logging.handlers
import queue
import re
import signal
import socket
import sys
import threading
import time

MAX_REQUEST = 1024                       # bytes in a request, its line ending not counted
NAME = re.compile(r"[\w-]{1,20}")        # \w is a letter of any script, a digit or _
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)       # for send; Windows has none: see listen
log = logging.getLogger("chat")
options = argparse.Namespace()           # the command line; never changed once threads run
closing = threading.Event()              # set by Ctrl-C and SIGTERM
numbers = itertools.count(1)             # of the clients' threads; only the main thread counts

# ---- What the threads share, and why that is safe ------------------------------------------------

rooms = []                               # the oldest first; never one without members
clients = set()                          # all connections that have not been closed
rooms_lock = threading.Lock()            # in C: a pthread_mutex_t

# 1. A thread holds the lock to change these or anything in them, to act on what it finds there, and
#    to send. So two clients cannot both find a name free, find no room and make two, or enter a
#    room that is just being deleted; all members see the same order; no lines mix on a socket.
# 2. A thread that holds the lock does not wait: it neither receives nor sleeps, and a send that
#    would have to wait fails (on Windows, after 10 ms). So everyone gets the lock soon.
# 3. Only a client's own thread receives from the client's socket and closes it. Before it closes it
#    takes the client out of its room and of `clients`. So whoever finds a client there may send.


@contextlib.contextmanager
def locked():
    """Hold rooms_lock during a `with` block; --trace shows who waits for it, has it, lets go."""
    log.debug("waits for the lock")
    with rooms_lock:
        log.debug("has the lock")
        yield                            # here the block runs
        log.debug("lets go of the lock")


class Room:
    """A named room and its members, in the order of entering. All methods need the lock held."""

    def __init__(self, name):
        self.name = name
        self.members = []

    def enter(self, client, name):
        """Move `client` into this room, as `name`. The first member creates the room."""
        if not self.members:
            rooms.append(self)
            log.info("room %s created", self.name)
        self.members.append(client)
        if client.room:                  # if only the name changes, it is this room, which has the
            client.room.leave(client)    # client twice for a moment: so leave does not delete it
        client.name, client.room = name, self
        self.broadcast(f"JOINED {name}\n", client)
        log.info("%s joined %s", name, self.name)

    def leave(self, client):
        """Take `client` out. The last member deletes the room."""
        self.members.remove(client)
        client.room = None
        self.broadcast(f"LEFT {client.name}\n", client)
        log.info("%s left %s", client.name, self.name)
        if not self.members:
            rooms.remove(self)
            log.info("room %s deleted", self.name)

    def broadcast(self, lines, speaker):
        """Send `lines` (str) to every member but the speaker; return how many bytes they are."""
        data = lines.encode()
        for member in self.members:
            if member is not speaker:
                member.send(data)
        return len(data)


class Client:
    """A connection, and who it is and where. From `handle` on, all methods need the lock held."""

    def __init__(self, sock):
        self.sock = sock
        self.name = f"client-{next(numbers)}"                # its thread's name, its own until JOIN
        self.room = None                 # the Room that it is a member of
        self.messages = 0                # how many it has said
        self.open = True                 # False once it has been sent BYE, or cannot be sent to
        self.reason = None               # why it is not open any more
        self.deadline = time.monotonic() + JOIN_SECONDS      # to join; after BYE, to hang up

    def serve(self):
        """Read requests and carry them out until the client leaves. Runs in the client's thread."""
        size = min(CHUNK, options.rate // 16 + 1) if options.rate else CHUNK     # for short rests
        unfinished, reason = b"", "end of file"
        try:
            while self.open:
                data = self.sock.recv(size)
                log.debug("recv %r", data)
                if not data:             # b"" is not "nothing yet" but "nothing any more"
                    break
                # TCP keeps the order of bytes, not the pieces in which they were sent: so cut at
                # newlines. Of an endless line keep just enough to see that it is too long.
                *lines, unfinished = (unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
                unfinished = unfinished[:MAX_REQUEST + 2]
                with locked():
                    passed_on = self.handle(lines)
                if options.rate:         # rest (not when closing): TCP then holds back a flooder
                    closing.wait(max(len(data), passed_on) / options.rate)
        except OSError as error:         # a reset; or TCP gave up sending to it
            reason = f"connection lost: {error.strerror}"
        finally:                         # the one way out, however the connection ends
            with locked():
                self.leave(reason)
            await_hangup(self.sock)
            with locked():
                clients.remove(self)
                log.info("thread ends: %s (messages: %d)", self.reason, self.messages)
            self.sock.close()

    def handle(self, lines):
        """Carry out requests (bytes, a line each) in order; return how many bytes it passed on."""
        texts, passed_on = [], 0
        for line in lines:
            request = line.decode("utf-8", "replace").translate(SAFE_TEXT).lstrip()
            verb, _, text = request.partition(" ")
            if not self.open:            # after LEAVE, or after a BYE while we waited for the lock
                break
            if len(line) > MAX_REQUEST:
                self.tell("ERROR", f"a request is at most {MAX_REQUEST} bytes long")
            elif verb.upper() == "MSG" and self.room:
                texts.append(text)       # messages in a row leave together, which is faster
            elif verb:
                passed_on += self.say(texts) + REQUEST_BYTES
                texts = []
                self.carry_out(verb.upper(), text)
        return passed_on + self.say(texts)

    def say(self, texts):
        """Pass on messages (list of str) to the others in the room; return how many bytes."""
        lines = [f"MSG {self.name} {text}\n" for text in texts if text.strip()]
        self.messages += len(lines)
        return self.room.broadcast("".join(lines), self) if lines else 0

    def carry_out(self, verb, text):
        """Carry out a request that is not a message."""
        if verb == "JOIN":
            self.join(*text.split())
        elif verb == "LEAVE":
            self.leave("you said LEAVE")
        elif verb == "ROOMS":
            self.tell("ROOMS", *(f"{room.name}={len(room.members)}" for room in rooms))
        elif verb == "WHO" and self.room:
            self.tell("WHO", *(member.name for member in self.room.members))
        elif verb in ("MSG", "WHO"):
            self.tell("ERROR", "join a room first: JOIN [name [room]]")
        else:
            self.tell("ERROR", "unknown request; use JOIN, MSG, WHO, ROOMS or LEAVE")

    def join(self, *words):
        """Enter a room, move, or take another name (words: name, room); or get ERROR and stay."""
        if len(words) > 2 or not all(NAME.fullmatch(word) for word in words):
            return self.refuse("JOIN [name [room]]; a name is 1 to 20 letters, digits, _ or -")
        taken = {other.name.casefold() for room in rooms for other in room.members if other != self}
        guests = (f"guest{number}" for number in itertools.count(1))
        name = words[0] if words else next(guest for guest in guests if guest not in taken)
        room = find_room(words[1]) if len(words) == 2 else self.room or find_room()
        if name.casefold() in taken:
            return self.refuse(f"the name {name} is taken")
        if (name, room) == (self.name, self.room):
            return self.refuse(f"you are already {name} in {room.name}")
        room.enter(self, name)
        self.deadline = float("inf")
        self.tell("WELCOME", room.name, name, f"Welcome to {options.name}, {name}!")

    def refuse(self, why):
        """Answer JOIN with ERROR."""
        log.info("refused: %s", why)
        self.tell("ERROR", why)

    def leave(self, reason):
        """Leave the room, if in one, and disconnect, if that has not been done."""
        if self.room:
            self.room.leave(self)
        self.disconnect(reason)

    def disconnect(self, reason, bye=True):
        """Say BYE and send nothing more, so that the client hangs up; without BYE, hang up now."""
        if bye:
            self.tell("BYE", reason)
        if self.open:
            self.open, self.reason = False, reason
            self.deadline = time.monotonic() + FAREWELL_SECONDS
        with contextlib.suppress(OSError):                   # the client has gone already
            self.sock.shutdown(socket.SHUT_WR if bye else socket.SHUT_RDWR)  # RDWR wakes up recv

    def tell(self, *words):
        """Send one line that consists of `words` (str)."""
        self.send(f"{' '.join(words)}\n".encode())

    def send(self, lines):
        """Send `lines` (bytes) without waiting; hang up if the kernel has no room for them."""
        if not self.open:
            return
        if options.trace:                # without this `if` all would be a tenth slower
            log.debug("send %r to %s", lines, self.name)
        try:
            if self.sock.send(lines, DONT_WAIT) < len(lines):
                raise BlockingIOError    # only a part fits: a line is cut, and nothing may follow
        except BlockingIOError:
            self.disconnect("dropped: it does not read", bye=False)
        except OSError as error:
            self.disconnect(f"connection lost: {error.strerror}", bye=False)


def find_room(name=None):
    """Return the room called `name`, or the oldest; a new one if there is none. Needs the lock."""
    for room in rooms:
        if not name or room.name.casefold() == name.casefold():
            return room
    return Room(name or "lobby")


def accept_clients(listener):
    """Start a thread for each client that connects, until the server is closed."""
    while not closing.is_set():
        keep_deadlines()
        try:
            start_thread(*listener.accept())
        except socket.timeout:                               # nobody came
            pass
        except OSError as error:                             # out of file descriptors, for one
            log.warning("cannot accept: %s", error.strerror)
            time.sleep(TICK_SECONDS)                         # it would fail again at once


def start_thread(sock, address):
    """Start a thread for a client. If the server is full it gets BYE first, so that it leaves."""
    client = Client(sock)
    log.info("connection from %s:%d: thread %s starts", *address[:2], client.name)
    with locked():
        if sum(other.open for other in clients) >= options.max_clients:
            client.disconnect(f"the server is full (at most {options.max_clients} clients)")
        clients.add(client)
    try:                                                     # in C: pthread_create
        threading.Thread(target=client.serve, name=client.name, daemon=True).start()
    except RuntimeError as error:                            # the system has no thread left
        with locked():
            client.disconnect(str(error), bye=False)
        client.serve()                                       # not open, so this only cleans up


def close():
    """Disconnect every client and wait until their threads are done."""
    log.info("closing: BYE to all clients (%d)", len(clients))
    with locked():
        for client in clients:
            client.disconnect("the server is closing")
    while clients:                       # those who do not hang up are cut off by keep_deadlines
        keep_deadlines()
        time.sleep(0.01)
    log.info("closed")


# ---- What guards it: limits, deadlines, the last line --------------------------------------------

JOIN_SECONDS = 30            # a client that has not joined by then is disconnected
FAREWELL_SECONDS = 2         # how long a client may take to hang up after its BYE
TICK_SECONDS = 0.1           # how often the main thread looks at deadlines, and for Ctrl-C
SEND_BUFFER = 256 * 1024     # bytes that may wait in the kernel for a client that reads slowly
RECEIVE_BUFFER = 64 * 1024   # bytes that a client may have sent ahead, in the kernel too
CHUNK = 4096                 # bytes that one recv returns at most
REQUEST_BYTES = 100          # what other requests than MSG count for at --rate: JOIN is dear
BACKLOG = 1024               # connections that may wait for accept; with 128, 500 at once take 3 s

# What must not reach other people's terminals: control characters (C0, DEL, C1), separators of
# lines and paragraphs, and bidirectional controls, which turn text around. A tab becomes a space.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}


def listen(host, port):
    """Return a listening socket (in C: socket, setsockopt, bind, listen). Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    # The sockets that it accepts inherit the options, but not the time limit.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # send each line at once
    if not DONT_WAIT:                                        # on Windows, send waits 10 ms at most
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 10)
    listener.settimeout(TICK_SECONDS)
    return listener


def keep_deadlines():
    """Disconnect clients that have not joined in time; hang up on those that stay after BYE."""
    now = time.monotonic()
    if any(now > client.deadline for client in list(clients)):   # a glance needs no lock; then act
        with locked():
            for client in clients:
                if now > client.deadline:
                    client.disconnect(f"no JOIN within {JOIN_SECONDS} seconds", bye=client.open)


def await_hangup(sock):
    """Read until the client hangs up: closing with input unread resets it, and may lose BYE."""
    with contextlib.suppress(OSError):
        while sock.recv(RECEIVE_BUFFER):
            time.sleep(0.01)                                 # a flooder must not keep us busy


# ---- The log, the command line, the start --------------------------------------------------------

def start_log():
    """Let a thread of its own write the log: if its terminal stands still, nobody else waits."""
    lines = queue.SimpleQueue()
    logging.basicConfig(level=logging.DEBUG if options.trace else logging.INFO,
                        format="%(asctime)s %(threadName)-9s %(message)s", datefmt="%H:%M:%S",
                        handlers=[logging.handlers.QueueHandler(lines)])
    writer = logging.handlers.QueueListener(lines, logging.StreamHandler())
    writer.start()
    atexit.register(writer.stop)                             # which writes what is left


def hint(family, host, port):
    """Return how clients on other machines connect to a server that listens there (str)."""
    if host.startswith("127.") or host == "::1":
        return "(this machine only; --host 0.0.0.0 opens it to the classroom)"
    if host in ("0.0.0.0", "::"):                            # all addresses of this machine: which?
        elsewhere = "192.0.2.1" if host == "0.0.0.0" else "2001:db8::1"
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if probe.connect_ex((elsewhere, port)):          # sends nothing, only finds the way
                return "(this machine is not on a network)"
            host = probe.getsockname()[0]
    return f"- on another machine: python client.py {host} {port}"


def stop(_signum, _frame):
    """On Ctrl-C or SIGTERM, have the main thread close; a second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # before set, which takes a lock, and
    signal.signal(signal.SIGTERM, signal.SIG_DFL)            # must not be interrupted by itself
    closing.set()


def parse_arguments():
    """Fill `options` from the command line; status 2 and a usage line if it makes no sense."""
    parser = argparse.ArgumentParser(description="A chatroom server: one thread per client.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("port", type=int, help="TCP port to listen on; 0: the system picks one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network")
    parser.add_argument("--name", default="Chatroom", help="the server's name")
    parser.add_argument("--max-clients", type=int, default=100, help="connected at once")
    parser.add_argument("--rate", type=int, default=8192, help="bytes/s per client; 0: no limit")
    parser.add_argument("--trace", action="store_true", help="log all bytes, and the lock")
    parser.parse_args(namespace=options)
    options.name = options.name.encode("utf-8", "replace").decode().translate(SAFE_TEXT).strip()
    if not (options.port in range(65536) and options.max_clients > 0 and options.rate >= 0
            and options.name and options.host and options.host.isascii()):
        parser.error("port: 0 to 65535; --max-clients: 1 or more; --rate: 0 or more; no empty name")


def main():
    """Run the server. Exit status: 0 when it was closed, 1 when it cannot listen."""
    threading.current_thread().name = "main"
    parse_arguments()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        sys.exit(f"server.py: cannot listen on {options.host}:{options.port}: "
                 f"{error.strerror.partition(' (')[0]}; try another port, or another --host")
    start_log()
    host, port = listener.getsockname()[:2]
    log.info("%s listening on %s:%d %s", options.name, host, port,
             hint(listener.family, host, port))
    with listener:
        accept_clients(listener)
    close()


if __name__ == "__main__":
    main()
