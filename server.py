#!/usr/bin/env python3
"""A chatroom server: one thread for each client, one lock, and no long waits.

    python server.py 12345                 in one terminal
    python client.py 127.0.0.1 12345       in another, and in one more
    nc 127.0.0.1 12345                     works as a client too: type `join ann`, `msg hi`

The main thread accepts connections and starts a thread for each. That thread receives the client's
requests, one per line, and carries them out under the one lock: it changes the rooms, and sends
what the client says to the others in its room. One more thread writes the log. To stop, no thread
wakes another: a wait on a socket ends after half a second, and its thread then checks `closing`.
"""
import argparse
import contextlib
import itertools
import logging.handlers
import os
import queue
import signal
import socket
import sys
import threading
import time
import unicodedata

POLL_SECONDS = 0.5           # how long a thread waits before it checks whether to stop
JOIN_SECONDS = 300           # a client that takes longer to join is disconnected
FAREWELL_SECONDS = 1.5       # how long a client may go on sending after its BYE
MAX_REQUEST = 1024           # bytes in a request, its line ending not counted
MAX_NAME = 20                # characters in the name of a person or a room
REQUEST_BYTES = 100          # at --rate a request counts as at least so many bytes
SEND_BUFFER = 256 * 1024     # bytes that may wait in the kernel for a client that reads slowly
RECEIVE_BUFFER = 64 * 1024   # bytes from a client that may wait there to be received
BACKLOG = 1024               # connections that may wait for accept; with 128, 500 at once take 3 s
# A client's socket. TCP gives up when a machine is silent for 20 s and ignores four probes sent 5 s
# apart (macOS says KEEPALIVE, not KEEPIDLE), or when it has accepted no data for 30,000 ms.
SOCKOPTS = {"SO_SNDBUF": SEND_BUFFER, "TCP_NODELAY": 1, "SO_KEEPALIVE": 1, "TCP_KEEPCNT": 4,
            "TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30_000}
# What must never reach a terminal: control characters (C0, DEL, C1), separators of lines and
# paragraphs, and controls that override the direction of text. A tab becomes a space.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}
log = logging.getLogger("chat")
options = argparse.Namespace()           # the command line; set before the first thread starts

# ---- What the threads share, and why that is safe ------------------------------------------------
rooms = []                               # oldest first; empty rooms are removed
rooms_lock = threading.Lock()            # in C: a pthread_mutex_t
closing = False                          # set by stop, at Ctrl-C and other signals

# 1. A thread holds the lock while it changes `rooms` or a room, acts on what it has read there, or
#    sends. So two clients cannot both find a name free, or both create the same room; all members
#    see the same order; lines on a socket are never interleaved.
# 2. A thread that holds the lock does not wait: it neither receives nor sleeps, and a send that
#    would have to wait fails instead. So nobody waits long for the lock.
# 3. Only a client's own thread receives from it, changes its name and room, says BYE and closes its
#    socket, once it is in no room. So the socket of whoever is in a room is still open.
# 4. `closing`, and the `reason` why a client is disconnected, are set but never cleared. They are
#    read without the lock: a thread that reads one too early sees it half a second later.


class Room:
    """A named room and its members, in order of arrival. All methods need the lock."""
    def __init__(self, name):
        self.name = name
        self.members = []
        rooms.append(self)
        log.info("room %s created", name)

    def enter(self, client):
        """Add `client`, and tell the others."""
        if client.room is not self:      # otherwise it has only changed its name
            self.members.append(client)
            client.room = self
        log.info("%s joined %s", client.name, self.name)
        self.broadcast(f"JOINED {client.name}\n".encode(), client)

    def leave(self, client):
        """Remove `client`, and tell the others. The last member deletes the room."""
        self.members.remove(client)
        client.room = None
        log.info("%s left %s", client.name, self.name)
        if not self.members:
            rooms.remove(self)
            log.info("room %s deleted", self.name)
        elif not closing:                # when the server closes, nobody needs to be told
            self.broadcast(f"LEFT {client.name}\n".encode(), client)

    def broadcast(self, lines, sender):
        """Send `lines` (bytes) to every member but the sender."""
        for member in self.members:
            if member is not sender:
                member.send(lines)


class Client:
    """A connection: its sockets, name and room. Other clients' threads call only `send`."""
    def __init__(self, sock):
        # Two objects for one descriptor, since an object has one timeout for both ways: `recv` on
        # `sock` waits half a second at most, `send` on `sender` never. Only `sock` closes it;
        # `sender` merely forgets it (detach), and then every send on it fails.
        self.sock = sock
        self.sender = socket.socket(sock.family, sock.type, fileno=sock.fileno())
        self.sock.settimeout(POLL_SECONDS)
        self.sender.setblocking(False)
        self.name = "(no name yet)"
        self.room = None                 # the Room that it is a member of
        self.reason = None               # why it is disconnected; None as long as it stays
        self.unfinished = b""            # the beginning of a request whose end has not come yet
        self.resume = 0                  # the time to receive again, see --rate

    def serve(self):
        """Serve the client until there is a reason to stop. Runs in the client's own thread."""
        join_by = time.monotonic() + JOIN_SECONDS
        try:
            while not self.reason:
                now = time.monotonic()
                if closing:
                    self.reason = "the server is closing"
                elif not self.room and now > join_by:
                    self.reason = f"no JOIN within {JOIN_SECONDS} seconds"
                elif now < self.resume:  # it sent faster than --rate; now TCP makes it wait
                    time.sleep(min(POLL_SECONDS, self.resume - now))
                else:
                    self.receive()
        except Exception:                # a mistake in this program ends only this client
            self.reason = "an error in the server"
            log.exception(self.reason)
        with contextlib.closing(self):   # the one way out, whatever the reason; at its end it calls
            self.carry_out("LEAVE", [])  # self.close(), even if this fails

    def receive(self):
        """Receive what comes within half a second; carry out the requests that are complete."""
        try:
            data = self.sock.recv(options.chunk)
        except OSError as error:         # no errno: only our timeout, nothing has come
            if error.errno:
                self.reason = f"connection lost: {error.strerror}"
            return
        log.debug("recv %r", data)
        if not data:                     # b"" means that the client has closed its side; as long as
            self.reason = "end of file"  # nothing has come, recv times out
        # TCP delivers a stream of bytes, without message boundaries: so cut at newlines. Of a line
        # without an end, keep just enough to see that it is too long.
        *lines, unfinished = (self.unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
        self.unfinished = unfinished[:MAX_REQUEST + 2]
        # Successive requests with one verb form a group: many messages then go out in one send.
        for verb, group in itertools.groupby(map(parse, lines), key=lambda request: request[0]):
            if verb == "LEAVE":          # serve carries it out
                self.reason = "you said LEAVE"
            elif verb and not self.reason:
                self.carry_out(verb, [text for _, text in group])
        requests = len(lines) - lines.count(b"")             # an empty line is not one
        self.resume = time.monotonic() + max(len(data), REQUEST_BYTES * requests) / options.rate

    def carry_out(self, verb, texts):
        """Carry out requests with the same verb: send lines to the others, or answers."""
        log.debug("waits for the lock")
        with rooms_lock:                 # for JOIN, all of this is one critical section: from the
            log.debug("has the lock")    # check that the name is free to the sending of WELCOME
            if verb == "MSG" and self.room:
                lines = [f"MSG {self.name} {text}\n" for text in texts if text.strip()]
                self.room.broadcast("".join(lines).encode(), self)
            elif verb == "LEAVE":
                self.send(f"BYE {self.reason}\n".encode())
                if self.room:
                    self.room.leave(self)
            else:
                for text in texts:
                    answer = self.answer(verb, text)
                    if answer.startswith("ERROR "):
                        log.info("refused: %s", answer[6:])
                    self.send(f"{answer}\n".encode())
            log.debug("releases the lock")

    def answer(self, verb, text):
        """Do what a request asks for, and return the answer (str). Needs the lock."""
        if verb == "JOIN":
            return self.join(*unicodedata.normalize("NFC", text).split())
        if verb == "ROOMS":
            return " ".join(["ROOMS", *(f"{room.name}={len(room.members)}" for room in rooms)])
        if verb == "WHO" and self.room:
            return " ".join(["WHO", *(member.name for member in self.room.members)])
        if verb in ("MSG", "WHO"):
            return "ERROR join a room first: JOIN [name [room]]"
        if verb == "TOO LONG":
            return f"ERROR a request is at most {MAX_REQUEST} bytes long"
        return "ERROR unknown request; use JOIN, MSG, WHO, ROOMS or LEAVE"

    def join(self, *words):
        """Enter a room, move or rename (words: name, room); return the answer. Needs the lock."""
        if len(words) > 2 or not all(map(is_name, words)):
            return f"ERROR JOIN [name [room]]; a name is 1 to {MAX_NAME} letters, digits, _ or -"
        used = {m.name.casefold() for room in rooms for m in room.members} - {self.name.casefold()}
        guests = (f"guest{number}" for number in itertools.count(1))
        name = words[0] if words else next(guest for guest in guests if guest not in used)
        if name.casefold() in used:
            return f"ERROR the name {name} is taken"
        room = find_room(words[1]) if len(words) == 2 else (self.room or find_room())
        if (name, room) == (self.name, self.room):
            return f"ERROR you are already {name} in {room.name}"
        if room is self.room:            # only a new name
            room.broadcast(f"LEFT {self.name}\n".encode(), self)
        elif self.room:
            self.room.leave(self)
        self.name = name
        room.enter(self)
        return f"WELCOME {room.name} {name} Welcome to {options.name}, {name}!"

    def send(self, lines):
        """Send `lines` (bytes) without waiting, or note why that is impossible. Needs the lock."""
        if options.trace:                # without this `if` everything would be slower
            log.debug("send %r to %s", lines, self.name)
        try:
            if self.sender.send(lines) < len(lines):
                raise BlockingIOError    # only part of it was sent, so nothing may follow
        except OSError as error:         # its own thread sees `reason` within half a second
            full = isinstance(error, BlockingIOError)
            self.reason = self.reason or ("dropped: not reading" if full else "connection lost")
            self.sender.detach()         # from now on every send fails

    def close(self):
        """Read on until the client hangs up, falls silent or runs out of time; then close."""
        # Closing with input unread makes TCP send a reset, which can cost the client its BYE.
        end = time.monotonic() + FAREWELL_SECONDS
        with contextlib.suppress(OSError):       # a reset; or our timeout: no more came
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(RECEIVE_BUFFER) and time.monotonic() < end:
                time.sleep(0.01)         # a client that goes on sending must not make this spin
        self.sender.detach()
        self.sock.close()
        log.info("thread ends: %s", self.reason)


def find_room(name=None):
    """Return the room called `name`, or the oldest; created if necessary. Needs the lock."""
    for room in rooms:
        if not name or room.name.casefold() == name.casefold():
            return room
    return Room(name or "lobby")


def accept_clients(listener):
    """Start a thread for each client that connects; return the threads when the server closes."""
    threads, number = {}, 0              # the thread of each client; clients so far
    while not closing:
        try:
            sock, address = listener.accept()        # on macOS address can be None
        except OSError as error:         # no errno: only our timeout, no new connection yet
            if error.errno:              # e.g. out of file descriptors; it would fail again at once
                log.warning("cannot accept: %s", error.strerror)
                time.sleep(0.05)
            continue
        set_options(sock)
        client, number = Client(sock), number + 1
        threads = {other: thread for other, thread in threads.items() if thread.is_alive()}
        if sum(not other.reason for other in threads) >= options.max_clients:
            client.reason = f"the server is full (at most {options.max_clients} clients)"
        thread = threading.Thread(target=client.serve, name=f"client-{number}", daemon=True)
        log.info("connection from %s:%s: thread %s starts", *(address or "??")[:2], thread.name)
        try:
            thread.start()               # in C: pthread_create
            threads[client] = thread
        except RuntimeError as error:    # it has no thread: so this one closes its socket
            log.warning("thread ends: %s", error)
            client.sender.detach()
            sock.close()
    return threads.values()


# ---- What guards it, and the start ---------------------------------------------------------------
def parse(line):
    """Return the verb, in capitals, and the text of a request (bytes). An empty one has verb ""."""
    verb, _, text = line.decode("utf-8", "replace").translate(SAFE_TEXT).lstrip().partition(" ")
    return verb.upper() if len(line) <= MAX_REQUEST else "TOO LONG", text


def is_name(word):
    """Return whether `word` is a name: letters, marks (not first) and digits of any script, _ -."""
    kinds = ["L" if sign in "_-" else unicodedata.category(sign)[0] for sign in word]
    return len(word) <= MAX_NAME and kinds[0] != "M" and set(kinds) <= {"L", "M", "N"}


def set_options(sock):
    """Set SOCKOPTS as far as this system knows them (man 7 tcp, man 7 socket)."""
    for name, value in SOCKOPTS.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
        with contextlib.suppress(AttributeError, OSError):   # unknown here, or refused
            sock.setsockopt(level, getattr(socket, name), value)


def listen(host, port):
    """Return a listening socket (in C: socket, setsockopt, bind, listen). Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)     # inherited
    listener.settimeout(POLL_SECONDS)
    return listener


def stop(signum, _frame):
    """Make the server close; a second Ctrl-C ends the process at once."""
    global closing
    closing = True                       # nothing else: a handler that took a lock could hang
    if signum == signal.SIGINT:
        signal.signal(signum, lambda *_: os._exit(1))


def hint(family, host, port):
    """Return how clients on other machines can connect to this server (str)."""
    if host.startswith("127.") or host == "::1":
        return "(this machine only; --host 0.0.0.0 opens it to the classroom)"
    if host in ("0.0.0.0", "::"):        # all addresses of this machine: which one do others see?
        with socket.socket(family, socket.SOCK_DGRAM) as probe:      # it only looks up a route
            if probe.connect_ex(("192.0.2.1" if host == "0.0.0.0" else "2001:db8::1", port)):
                return "(this machine is not on a network)"
            host = probe.getsockname()[0]
    return f"- on another machine: python client.py {host} {port}"


def parse_arguments():
    """Fill `options` from the command line; if it is invalid, exit with usage and status 2."""
    parser = argparse.ArgumentParser(description="A chatroom server: a thread for each client.")
    parser.add_argument("port", type=int, help="TCP port to listen on; 0: the system picks one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network")
    parser.add_argument("--name", default="Chatroom", help="the server's name")
    parser.add_argument("--max-clients", type=int, default=100, help="connected at once (100)")
    parser.add_argument("--rate", type=int, default=8192, help="bytes/s a client (8192); 0: any")
    parser.add_argument("--trace", action="store_true", help="log all bytes, and the lock")
    parser.parse_args(namespace=options)
    options.name = options.name.encode("utf-8", "replace").decode().translate(SAFE_TEXT).strip()
    if not (options.port in range(65536) and options.max_clients > 0 and options.rate >= 0
            and options.name and options.host and options.host.isascii()):
        parser.error("port: 0 to 65535; --max-clients: 1 or more; --rate: 0 or more; no empty name")
    options.rate = options.rate or 10 ** 12      # in effect no limit
    options.chunk = min(4096, options.rate // 64 + 1)        # bytes; small pieces make short rests


def main():
    """Run the server. Exit status: 0 after closing, 1 if it cannot listen."""
    threading.current_thread().name = "main"
    parse_arguments()
    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"} & set(dir(signal)):  # if it exists
        signal.signal(getattr(signal, name), stop)
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        sys.exit(f"server.py: cannot listen on {options.host}:{options.port}: "
                 f"{error.strerror.partition(' (')[0]}; try another port, or another --host")
    lines = queue.SimpleQueue()          # the log has its own thread: if the terminal stalls,
    logging.basicConfig(level=logging.DEBUG if options.trace else logging.INFO,  # only that waits
                        format="%(asctime)s %(threadName)-9s %(message)s", datefmt="%H:%M:%S",
                        handlers=[logging.handlers.QueueHandler(lines)])
    writer = logging.handlers.QueueListener(lines, logging.StreamHandler())
    writer.start()
    address = listener.getsockname()[:2]
    log.info("%s listening on %s:%d %s", options.name, *address, hint(listener.family, *address))
    with listener:
        threads = accept_clients(listener)
    log.info("closing: BYE to all clients")
    while any(thread.is_alive() for thread in threads):      # each says BYE: see Client.serve
        time.sleep(0.05)
    log.info("closed")
    threading.Timer(0.7, os._exit, [0]).start()  # in case the terminal is stalled, or gone;
    writer.stop()                                # otherwise the rest of the log is written
    os._exit(0)


if __name__ == "__main__":
    main()
