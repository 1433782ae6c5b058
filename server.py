#!/usr/bin/env python3
"""A chatroom server: one thread for each client, one lock, and no long waits.

    python server.py 12345                 in one terminal
    python client.py 127.0.0.1 12345       in another, and in one more
    nc 127.0.0.1 12345                     works as a client, too: type `join ann`, `msg hi`

Client and server send each other lines of text. The first word of a line is its verb:

    a client sends                                the server sends
    JOIN [name [room]]   enter, move or rename    WELCOME room name text   you are in it
    MSG text             say it to the others     MSG name text            somebody says it
    WHO                  who is in my room?       WHO name name ...
    ROOMS                which rooms are there?   ROOMS room=count room=count ...
    LEAVE                leave, and hang up       JOINED name, LEFT name   others come and go
                                                  ERROR text               your request is refused
                                                  BYE text                 why I hang up

The main thread accepts connections and starts a thread for each. That thread receives the client's
requests and carries them out. One more thread writes the log. A thread that waits on a socket gives
up after half a second, checks whether to stop, and waits again.
"""
import argparse
import logging
import logging.handlers
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import unicodedata

POLL_SECONDS = 0.5           # how long a thread waits on a socket before it checks whether to stop
JOIN_SECONDS = 300           # a client that takes longer to join is disconnected
FLOOD_SECONDS = 60           # a client that sends too fast for this long is disconnected
ACCEPT_SECONDS = 0.007       # pause before each accept: at most some 140 connections a second
MAX_REQUEST = 1024           # bytes in a request, its line ending not counted
log = logging.getLogger("chat")
options = argparse.Namespace()           # --rate and so on; filled before the first thread starts

# ---- What the threads share, and why that is safe ------------------------------------------------
rooms = []                               # oldest first; empty rooms are removed
rooms_lock = threading.Lock()            # in C: a pthread_mutex_t
closing = False                          # becomes True at Ctrl-C, and stays True

# 1. A thread holds the lock while it uses `rooms`, a room or its members, and while it sends. So no
#    name is given twice, no room is created twice, and a room's lines reach all in one order.
# 2. A thread that holds the lock never waits for a client: `send` gives up at once. So nobody waits
#    long for the lock. (Rules 3 and 4: see Client.)


class Room:
    """A named room and its members, in order of arrival. All methods need the lock."""
    def __init__(self, name):
        self.name = name
        self.members = []

    def add(self, client):
        """Make `client` a member. The first one puts the room on the list."""
        if not self.members:
            rooms.append(self)
            log.info("room %s created", self.name)
        self.members.append(client)
        log.info("%s joined %s", client.name, self.name)

    def remove(self, client):
        """Take `client` out. The last one takes the room off the list."""
        self.members.remove(client)
        log.info("%s left %s", client.name, self.name)
        if not self.members:
            rooms.remove(self)
            log.info("room %s deleted", self.name)


class Client:
    """A connection, its name and room. Other clients' threads call only `send`."""
    def __init__(self, sock, thread_name):
        self.sock, self.send_sock = two_sockets(sock)    # recv waits half a second, send never
        # daemon: as in C, the process ends if main does, and does not wait for this thread.
        self.thread = threading.Thread(target=self.serve, name=thread_name, daemon=True)
        self.pace = Pace()               # slows down a client that sends too fast
        self.unfinished = b""            # the beginning of a request whose end has not come yet
        self.send_failed = False         # if so, maybe within a line: then not even BYE follows
        # 3. Only the client's own thread changes its name and room. It leaves the room before it
        #    closes the connection. So a thread that finds a client in a room can send to it.
        self.name = "(no name yet)"
        self.room = None                 # the Room that it is a member of
        # 4. `reason` and `closing` are set and read without the lock (in C they would be atomic).
        #    Once set they stay set: a thread that has just missed it sees it the next time.
        self.reason = None               # why it has to go; None as long as it stays

    def serve(self):
        """Serve the client from beginning to end. The thread that runs this is the client's own."""
        # The one way out, whatever the reason. A mistake in this program ends only the client whose
        # thread meets it; and whatever step it is in, the next one is taken all the same.
        for step in (self.converse, self.leave, self.close):
            try:
                step()
            except BaseException:        # any exception, even that of sys.exit
                log.exception("an error in the server")
                self.disconnect("an error in the server")

    def converse(self):
        """Receive and carry out requests until there is a reason to disconnect the client."""
        join_by = time.monotonic() + JOIN_SECONDS
        while not self.reason:
            if closing:
                self.disconnect("the server is closing")
            elif not self.room and time.monotonic() > join_by:
                self.disconnect(f"no JOIN within {JOIN_SECONDS} seconds")
            elif self.pace.slept > FLOOD_SECONDS:
                self.disconnect(f"sending too fast for {FLOOD_SECONDS} seconds")
            else:
                self.receive()

    def receive(self):
        """Wait half a second at most for some bytes; carry out the requests that they complete."""
        try:
            data = self.sock.recv(self.pace.recv_size)   # few bytes, so that the sleep is short
        except OSError as error:
            if not is_our_timeout(error):            # otherwise just nothing has come
                self.disconnect(f"connection lost: {error.strerror}")
            return
        log.debug("recv %r", data)
        if data == b"":                  # the client has closed its side: no more will come
            self.disconnect("end of file")
            return
        # TCP delivers a stream of bytes, without message boundaries: so cut it at the newlines. The
        # last line has no end yet: keep it, or so much of it that one sees that it is too long.
        lines = (self.unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
        self.unfinished = shortened(lines.pop())
        requests = [parse(line) for line in lines if line.strip()]
        if requests:
            self.carry_out(requests)
        # Sleep as long as these bytes may take at --rate. What the client sends meanwhile fills the
        # receive buffer here, then the send buffer at its end, and then its `send` has to wait.
        self.pace.sleep(len(data), len(requests))

    def carry_out(self, requests):
        """Carry out requests (verb, text) in their order, none once there is a reason to go."""
        log.debug("waits for the lock")
        with rooms_lock:                 # one critical section, until the last answer is sent
            log.debug("has the lock")    # logging does not wait, either: see start_log
            unsent = ""                  # messages for the others: several in one send are faster
            for verb, text in requests:
                if closing or self.reason:
                    break
                if verb == "MSG" and self.room:
                    if text.strip():
                        unsent += f"MSG {self.name} {text}\n"
                elif verb == "LEAVE":
                    self.disconnect("you said LEAVE")
                else:
                    if unsent:           # first, since JOIN may take us to another room
                        self.broadcast(self.room, unsent)
                        unsent = ""
                    answer = self.answer(verb, text)
                    self.send(f"{answer}\n".encode())
            if unsent:
                self.broadcast(self.room, unsent)
            log.debug("releases the lock")

    def answer(self, verb, text):
        """Do what a request asks for; return the answer (str). Needs the lock."""
        if verb == "JOIN":
            return self.join(text)
        if verb == "ROOMS":
            return "ROOMS" + "".join(f" {room.name}={len(room.members)}" for room in rooms)
        if verb == "WHO" and self.room:
            return "WHO" + "".join(f" {member.name}" for member in self.room.members)
        if verb in ("MSG", "WHO"):
            return "ERROR join a room first: JOIN [name [room]]"
        if verb == "TOO LONG":           # not a verb, which has no space in it: see parse
            return f"ERROR a request is at most {MAX_REQUEST} bytes long"
        return "ERROR unknown request; use JOIN, MSG, WHO, ROOMS or LEAVE"

    def join(self, text):
        """Enter a room, move or rename (text: "name room"); return the answer. Needs the lock."""
        words = unicodedata.normalize("NFC", text).split()   # é is one character, however typed
        if len(words) > 2 or not all(is_name(word) for word in words):
            return f"ERROR JOIN [name [room]]; a name is 1 to {MAX_NAME} letters, digits, _ or -"
        if self.room and not self.pace.may_move():
            return "ERROR you can move or rename yourself once a second; try again"
        # carry_out holds the lock until it has sent WELCOME. Otherwise two could find the same name
        # free, and take it; or somebody could send to us before WELCOME.
        taken = set()                    # casefold: so that Ann and ann are one name
        for room in rooms:
            for member in room.members:
                if member is not self:
                    taken.add(member.name.casefold())
        name = words[0] if words else free_guest_name(taken)
        if name.casefold() in taken:
            return f"ERROR the name {name} is taken"
        if len(words) == 2:
            room = find_room(words[1])
        else:
            room = self.room or find_room()
        if name == self.name and room is self.room:
            return f"ERROR you are already {name} in {room.name}"
        if self.room:                    # the first JOIN does not count
            self.pace.moved = time.monotonic()
        self.move(name, room)
        return f"WELCOME {room.name} {name} Welcome to {options.name}, {name}!"

    def move(self, name, room):
        """Take `name` and go to `room`, the same or another (None: leave). Needs the lock."""
        old_name, old_room = self.name, self.room
        self.name = name
        if old_room and name != old_name:
            log.info("%s is now %s", old_name, name)
        if room is not old_room:
            if old_room:
                old_room.remove(self)
            self.room = room
            if room:
                room.add(self)
        # The others are told last: so if a mistake in `send` ends this, the rooms are right. If
        # the room is the same they hear that the old name has left it, and the new one has joined.
        if old_room and not closing:     # when all leave, nobody is told
            self.broadcast(old_room, f"LEFT {old_name}\n")
        if room:
            self.broadcast(room, f"JOINED {name}\n")

    def broadcast(self, room, lines):
        """Send `lines` (str) to the other members of `room`. Needs the lock."""
        data = lines.encode()
        for member in room.members:
            if member is not self and not member.reason:     # those about to leave get no more
                member.send(data)

    def send(self, data):
        """Send `data` (bytes) without waiting, or disconnect the client. Needs the lock."""
        if options.trace:                # (this is called so often that the `if` saves time)
            log.debug("send %r to %s", data, self.name)
        try:
            sent = self.send_sock.send(data)
        except OSError:                  # the send buffer is full, or the connection is lost
            sent = 0                     # (in C, SIGPIPE; Python ignores that signal)
        if sent < len(data):             # half a line may have been sent: so nothing may follow
            self.send_failed = True
            self.disconnect("dropped: not reading, or gone")

    def disconnect(self, reason):
        """Note why the client has to go. Its own thread will see that: see `converse`."""
        self.reason = self.reason or reason      # the first stays; of two at once, either

    def leave(self):
        """Say BYE to the client, if it was not dropped, and leave the room."""
        with rooms_lock:
            try:
                if not self.send_failed:
                    self.send(f"BYE {self.reason}\n".encode())
            finally:
                if self.room:
                    self.move(self.name, None)

    def close(self):
        """Close the connection. Runs last."""
        read_rest(self.sock)
        self.send_sock.close()
        self.sock.close()
        log.info("thread ends: %s", self.reason)


def find_room(name=None):
    """Return the room called `name`, or the oldest; if there is none, a new one. Needs the lock."""
    for room in rooms:
        if not name or room.name.casefold() == name.casefold():
            return room
    return Room(name or "lobby")         # not on the list yet: see Room.add


def accept_clients(listener):
    """Start a thread for each client that connects; return the clients when the server closes."""
    clients, number = [], 0              # those whose thread has not ended; connections so far
    while not closing:
        time.sleep(ACCEPT_SECONDS)       # whoever connects in a loop must not slow down the others
        clients = [client for client in clients if client.thread.is_alive()]
        if is_crowded(clients):
            continue                     # whoever connects waits in the queue of accept
        try:
            sock, address = listener.accept()
            client = Client(sock, f"client-{number + 1}")
        except OSError as error:
            if not is_our_timeout(error):            # e.g. no file descriptors
                log.warning("cannot accept: %s", error.strerror)
                time.sleep(POLL_SECONDS)             # it would fail again at once
            continue
        number += 1
        if is_full(clients):
            client.disconnect(f"the server is full (at most {options.max_clients} clients)")
        log.info("connection from %s: thread %s starts", address, client.thread.name)
        start_thread(client)
        clients.append(client)
    return clients


# ---- What guards it, and the start ---------------------------------------------------------------
FAREWELL_SECONDS = 1         # how long a client may go on sending after its BYE, or a little more
MOVE_SECONDS = 1             # a client in a room can rename itself or move once in this time
MAX_REFUSED = 10             # connections at a time that are told that the server is full
MAX_NAME = 20                # characters in the name of a person or a room
RECEIVE_BUFFER = 64 * 1024   # bytes from a client that may wait in the kernel to be received
SEND_BUFFER = 256 * 1024     # bytes that may wait there for a client that reads slowly
BACKLOG = 1024               # connections that may wait for accept
# What must never reach a terminal: control characters (C0, DEL, C1), separators of lines and
# paragraphs, and what embeds, overrides or isolates text of another direction.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Letters and marks without ink: with one of them in it, a name could look like another.
INVISIBLE = re.compile(r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                       r"\U000e0100-\U000e01ef]")
# Options of a client's socket. After 20 s of silence TCP sends a probe every 5 s. It gives up when
# nothing comes back or data is not accepted, on Linux after 30 s. (macOS says TCP_KEEPALIVE.)
SOCKOPTS = {"SO_SNDBUF": SEND_BUFFER, "TCP_NODELAY": 1, "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 20,
            "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


def two_sockets(sock):
    """Set SOCKOPTS. Return a socket object to receive with, and one to send with."""
    # Both are one connection, and non-blocking for the kernel. It is Python that waits: for an
    # object with a timeout it polls before recv. (In C: MSG_DONTWAIT to send; Windows lacks that.)
    for name, value in SOCKOPTS.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
        try:
            sock.setsockopt(level, getattr(socket, name), value)     # man 7 tcp, man 7 socket
        except (AttributeError, OSError):            # unknown to this system, or refused
            pass
    sock.settimeout(POLL_SECONDS)
    try:
        send_sock = sock.dup()
    except OSError:                      # e.g. no file descriptors
        sock.close()
        raise
    send_sock.setblocking(False)
    return sock, send_sock


def is_our_timeout(error):
    """Return whether an OSError only says that we have waited for POLL_SECONDS."""
    return error.errno is None           # that of TCP (ETIMEDOUT, the same class) has a number


def shortened(line):
    """Return a line (bytes), if it is too long without most of it: it will be refused."""
    return line[:MAX_REQUEST + 2]        # one byte for a \r, which does not count, and one too many


def is_crowded(clients):
    """Return whether so many threads run that no more may start; leaving ones count, too."""
    return len(clients) >= options.max_clients + MAX_REFUSED


def is_full(clients):
    """Return whether nobody else can stay; those who are leaving do not count."""
    staying = [client for client in clients if not client.reason]
    return len(staying) >= options.max_clients


def start_thread(client):
    """Start the client's thread. If there are no more threads say BYE, and close the connection."""
    try:
        client.thread.start()            # in C: pthread_create
    except RuntimeError as error:
        client.disconnect(str(error))
        client.serve()                   # there is nothing left to do but BYE, and to close


def read_rest(sock):
    """Say that no more follows, and read until the client hangs up, falls silent, or time is up."""
    # If a socket is closed while input is unread, TCP sends a reset, and BYE may be lost.
    end = time.monotonic() + FAREWELL_SECONDS
    try:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(RECEIVE_BUFFER) and time.monotonic() < end:
            time.sleep(0.01)             # a client that goes on sending must not make this spin
    except OSError:                      # our timeout: it is silent; or a reset
        pass


class Pace:
    """How fast one client may send and move, at --rate. Used by the client's own thread only."""
    def __init__(self):
        # How many bytes one recv takes: few, so that no sleep is long. At 8192 bytes a second these
        # are 81: usually 10 ms of sleep, and half a second at worst, for some 40 tiny requests.
        self.recv_size = min(4096, options.rate // 100) if options.rate else 4096
        self.slept = 0                   # for how many seconds, since the client last paused
        self.woke_up = 0                 # when the last sleep ended
        self.moved = 0                   # when the client last renamed itself or moved

    def may_move(self):
        """Return whether the last move is long enough ago; at --rate 0 it always is."""
        return options.rate == 0 or time.monotonic() > self.moved + MOVE_SECONDS

    def sleep(self, size, requests):
        """Sleep as long as `size` bytes with so many requests may take at --rate."""
        if closing or not options.rate:
            return
        # If recv came back full and at once, more was waiting already; otherwise it has paused. (A
        # short cut: if we wait 0.1 s for the lock, that looks like a pause, too.)
        came_at_once = time.monotonic() - self.woke_up < 0.1
        if size < self.recv_size or not came_at_once:
            self.slept = 0
        seconds = max(size, 100 * requests) / options.rate       # a request: 100 at least, or so
        time.sleep(seconds)
        self.slept += seconds
        self.woke_up = time.monotonic()


def parse(line):
    """Return the verb, in capitals, and the text (str) of a request (bytes) that is not blank."""
    if len(line) > MAX_REQUEST:
        return "TOO LONG", ""
    text = UNSAFE.sub("\ufffd", line.decode("utf-8", "replace").replace("\t", " "))
    verb, _, text = text.lstrip().partition(" ")
    return verb.upper(), text


def free_guest_name(taken):
    """Return guest1, guest2 or so: the first that is not in `taken` (a set of str)."""
    number = 1
    while f"guest{number}" in taken:
        number += 1
    return f"guest{number}"


def is_name(word):
    """Return whether `word` has 1 to MAX_NAME letters, marks (not first), digits, _ or -."""
    categories = [unicodedata.category(character) for character in word if character not in "_-"]
    known = all(kind[0] in "LM" or kind == "Nd" for kind in categories)      # Nd: decimal digit
    begins_with_mark = unicodedata.category(word[0])[0] == "M"
    return known and not begins_with_mark and len(word) <= MAX_NAME and not INVISIBLE.search(word)


def listen(host, port):
    """Return a listening socket (in C: socket, setsockopt, bind, listen). Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)     # inherited
    listener.settimeout(POLL_SECONDS)
    return listener


def stop(signum, _frame):
    """Make the server close. After Ctrl-C, a second Ctrl-C ends the process at once."""
    global closing
    closing = True       # every thread sees it by itself; a handler that took a lock could hang
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, lambda *_: os._exit(1))


def where(listener):
    """Return where the server listens, and how clients on other machines can connect (str)."""
    host, port = listener.getsockname()[:2]
    if host.startswith("127.") or host == "::1":
        return f"{host}:{port} (this machine only; --host 0.0.0.0 opens it to the classroom)"
    address = host
    if host in ("0.0.0.0", "::"):        # all addresses of this machine: which one do others see?
        with socket.socket(listener.family, socket.SOCK_DGRAM) as probe:     # looks up a route
            error = probe.connect_ex(("192.0.2.1" if host == "0.0.0.0" else "2001:db8::1", port))
            address = "<its address>" if error else probe.getsockname()[0]
    return f"{host}:{port} - on another machine: python client.py {address} {port}"


def parse_arguments():
    """Fill `options` from the command line; if it is invalid, exit with usage and status 2."""
    parser = argparse.ArgumentParser(description="A chatroom server: a thread for each client.")
    parser.add_argument("port", type=int, help="TCP port to listen on; 0: the system picks one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to the network")
    parser.add_argument("--name", default="Chatroom", help="the server's name")
    parser.add_argument("--max-clients", type=int, default=100, help="connected at once (100)")
    parser.add_argument("--rate", type=int, default=8192, help="bytes/s a client (8192); 0: any")
    parser.add_argument("--trace", action="store_true", help="log bytes, and the lock")
    parser.parse_args(namespace=options)
    for is_right, message in (
            (0 <= options.port <= 65535, "port: 0 to 65535"),
            (options.host and options.host.isascii(), "--host: an address of this machine"),
            (options.name.strip() and options.name.isprintable(), "--name: printable, not empty"),
            (options.max_clients > 0, "--max-clients: 1 or more"),
            (options.rate == 0 or options.rate >= 100, "--rate: 100 or more; 0: no limit")):
        if not is_right:
            parser.error(message)


def start_log():
    """Start the thread that writes the log; return its QueueListener."""
    # If the terminal stalls only this thread waits: logging just puts lines into the queue, which
    # has no bound.
    lines = queue.SimpleQueue()
    logging.basicConfig(level=logging.DEBUG if options.trace else logging.INFO,
                        format="%(asctime)s %(threadName)-9s %(message)s", datefmt="%H:%M:%S",
                        handlers=[logging.handlers.QueueHandler(lines)])
    writer = logging.handlers.QueueListener(lines, logging.StreamHandler())
    writer.start()
    return writer


def main():
    """Run the server. Exit status: 0: closed; 1: cannot listen, or a second Ctrl-C; 2: usage."""
    threading.current_thread().name = "main"
    parse_arguments()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):     # Ctrl-C, kill, a closed terminal
        number = getattr(signal, name, None)         # Windows has no SIGHUP, others no SIGBREAK
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, stop)              # nohup makes the system ignore SIGHUP
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        sys.exit(f"server.py: cannot listen on {options.host}:{options.port}: "
                 f"{error.strerror.partition(' (')[0]}; try another port, or another --host")
    writer = start_log()
    log.info("%s listening on %s", options.name, where(listener))
    clients = accept_clients(listener)
    listener.close()
    log.info("closing: BYE to all clients")
    # At most half a second until a thread sees `closing` (1 s at --rate 100), 1 s for the farewell,
    # half a second for its last recv, half a second for the log: 2.5 s (3 s), for fifty as for one.
    while any(client.thread.is_alive() for client in clients):
        time.sleep(0.05)
    log.info("closed")
    ending = threading.Thread(target=writer.stop, daemon=True)   # writes the rest of the log
    ending.start()
    ending.join(POLL_SECONDS)            # not longer: the terminal may be stalled, or gone
    os._exit(0)                          # without Python's own flush, which could hang


if __name__ == "__main__":
    main()
