#!/usr/bin/env python3
"""A chatroom server: one thread for each client, one lock, and no long waits.

    python server.py 12345                 in one terminal
    python client.py 127.0.0.1 12345       in another, and in one more
    nc 127.0.0.1 12345                     works as a client, too: type `join ann`, `msg hi`

Client and server send each other lines of text. The first word of a line is its verb:

    a client sends                                the server sends
    JOIN [name [room]]   enter a room             WELCOME room name text   you are in it
    MSG text             say it to the others     MSG name text            somebody says it
    WHO                  who is in my room?       WHO name name ...
    ROOMS                which rooms are there?   ROOMS room=count room=count ...
    LEAVE                leave, and hang up       JOINED name, LEFT name   others come and go
                                                  ERROR text, BYE text     refused; why I hang up

The main thread accepts connections and starts a thread for each. That thread receives the client's
requests and carries them out. One more thread writes the log. No other thread has to wake one that
waits on a socket: after half a second it gives up, checks whether to stop, and waits again.
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
MOVE_SECONDS = 1             # a client in a room can rename itself or move once in this time
FLOOD_SECONDS = 60           # a client that sends too fast for this long is disconnected
FAREWELL_SECONDS = 1         # how long a client may go on sending after its BYE
ACCEPT_SECONDS = 0.007       # between two accepts: so there are some 140 connections a second
MAX_REQUEST = 1024           # bytes in a request, its line ending not counted
MAX_NAME = 20                # characters in the name of a person or a room
RECEIVE_BUFFER = 64 * 1024   # bytes from a client that may wait in the kernel to be received
SEND_BUFFER = 256 * 1024     # bytes that may wait there for a client that reads slowly
BACKLOG = 1024               # connections that may wait for accept
AT_THE_DOOR = 10             # connections above --max-clients, which are told that it is full
log = logging.getLogger("chat")
options = argparse.Namespace()           # set before the first thread starts: see parse_arguments

# ---- What the threads share, and why that is safe ------------------------------------------------
rooms = []                               # oldest first; empty rooms are removed
rooms_lock = threading.Lock()            # in C: a pthread_mutex_t
closing = False                          # becomes True at Ctrl-C, and stays True

# 1. A thread holds the lock while it uses `rooms` or a room, and while it sends. So no name is
#    given twice, no room is created twice, and all in a room get the same lines in the same order.
# 2. A thread that holds the lock never waits for a client. So nobody waits long for the lock.
# 3. Only a client's own thread changes its name and room. It leaves the room first, and closes the
#    connection afterwards. So to send to whoever is found in a room is safe.
# 4. Two things that others set are read without the lock: `closing`, and the `reason` to disconnect
#    a client. Both stay set: a thread that has just missed it sees it the next time.


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
    """A connection, its name and room. Other clients' threads call `send` and `disconnect`."""
    def __init__(self, sock, thread_name):
        set_options(sock)
        # recv may wait half a second; send must not wait at all. A Python socket has one timeout
        # for both: so these are two socket objects for one connection. (dup, as in C; but there one
        # would use MSG_DONTWAIT, which Windows lacks.) The connection ends when both are closed.
        self.sock = sock
        self.sock.settimeout(POLL_SECONDS)
        self.send_sock = sock.dup()
        self.send_sock.setblocking(False)
        self.thread = threading.Thread(target=self.serve, name=thread_name, daemon=True)
        self.name = "(no name yet)"
        self.room = None                 # the Room that it is a member of
        self.reason = None               # why it is disconnected; None as long as it stays
        self.unfinished = b""            # the beginning of a request whose end has not come yet
        self.moved = 0                   # when it last renamed itself or moved
        self.flooding = 0                # seconds of `slow_down` since we last caught up with it

    def serve(self):
        """Serve the client from beginning to end. Runs in the client's own thread."""
        # The one way out, whatever the reason. A mistake in this program ends only the client that
        # met it; and the steps that follow are taken all the same.
        for step in (self.converse, self.leave, self.close):
            try:
                step()
            except BaseException:        # sys.exit, too
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
            else:
                self.receive()

    def receive(self):
        """Wait half a second at most for some bytes; carry out the requests that they complete."""
        asked = time.monotonic()
        try:
            data = self.sock.recv(options.piece)     # a piece: 81 bytes at the default --rate
        except OSError as error:
            self.flooding = 0
            if error.errno:              # otherwise it is just our timeout: nothing has come
                self.disconnect(f"connection lost: {error.strerror}")
            return
        # Nothing more was waiting if the piece is short, or was long in coming. (A short cut: lines
        # of exactly one piece, more than ten a second, look like a flood.)
        caught_up = len(data) < options.piece or time.monotonic() - asked > 0.1
        log.debug("recv %r", data)
        if data == b"":                  # the client has closed its side: nothing more will come
            self.disconnect("end of file")
            return
        # TCP delivers a stream of bytes, without message boundaries: so cut it at the newlines. The
        # last line has no end yet. Keep it; but if it is too long already, its end is not needed.
        lines = (self.unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
        self.unfinished = lines.pop()[:2 * MAX_REQUEST]
        requests = [parse(line) for line in lines if line.strip()]
        self.carry_out(requests)
        if options.rate and not (closing or self.reason):
            self.slow_down(len(data), len(requests), caught_up)

    def slow_down(self, size, requests, caught_up):
        """Sleep as long as `size` bytes with so many requests should take at --rate."""
        # At 8192 bytes a second a piece of 81 bytes takes 10 ms. A request counts as 100 bytes at
        # least: so 40 tiny ones take half a second. Meanwhile what a flooder sends fills the buffer
        # of its socket here, then the one at the other end, and then its `send` has to wait.
        seconds = max(size, 100 * requests) / options.rate
        time.sleep(seconds)
        if caught_up:
            self.flooding = 0
        else:
            self.flooding += seconds
        if self.flooding > FLOOD_SECONDS:
            self.disconnect(f"sending too fast for {FLOOD_SECONDS} seconds")

    def carry_out(self, requests):
        """Carry out requests (verb, text) in their order, none after LEAVE or once closing."""
        log.debug("waits for the lock")
        # JOIN is one critical section, until WELCOME is sent. Between "is the name free?" and the
        # taking nobody else may take it; between the entering and WELCOME nobody may send to us.
        with rooms_lock:
            log.debug("has the lock")    # logging does not wait, either: see start_log
            messages = ""                # MSG requests in a row; each member gets them in one send
            for verb, text in requests:
                if closing or self.reason:
                    break
                if verb == "MSG" and self.room:
                    if text.strip():
                        messages += f"MSG {self.name} {text}\n"
                elif verb == "LEAVE":
                    self.disconnect("you said LEAVE")
                else:
                    self.broadcast(self.room, messages)      # what came first goes first
                    messages = ""
                    answer = self.answer(verb, text)
                    self.send(f"{answer}\n".encode())
            self.broadcast(self.room, messages)
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
        if self.room and options.rate and time.monotonic() < self.moved + MOVE_SECONDS:
            return "ERROR you can move or rename yourself once a second; try again"
        taken = set()                    # casefold: like lower, but for all scripts
        for room in rooms:
            taken.update(member.name.casefold() for member in room.members if member is not self)
        number = 1
        while f"guest{number}" in taken:
            number += 1
        name = words[0] if words else f"guest{number}"
        if name.casefold() in taken:
            return f"ERROR the name {name} is taken"
        if len(words) == 2:
            room = find_room(words[1])
        else:
            room = self.room or find_room()
        if (name, room) == (self.name, self.room):
            return f"ERROR you are already {name} in {room.name}"
        if self.room:                    # the first JOIN does not count
            self.moved = time.monotonic()
        self.move(name, room)
        return f"WELCOME {room.name} {name} Welcome to {options.name}, {name}!"

    def move(self, name, room):
        """Take `name` and go to `room`, the same or another (None: leave). Needs the lock."""
        old_name, old_room = self.name, self.room
        if room is old_room:
            self.name = name
            log.info("%s is now %s", old_name, name)
        else:
            if old_room:
                old_room.remove(self)
            self.name, self.room = name, room
            if room:
                room.add(self)
        # The others are told last: so even if an edit breaks `send`, the rooms are in order. In the
        # same room a new name, too, is LEFT and JOINED to them.
        if not closing:                  # otherwise everybody leaves, and nobody needs to be told
            self.broadcast(old_room, f"LEFT {old_name}\n")
        self.broadcast(room, f"JOINED {name}\n")

    def broadcast(self, room, lines):
        """Send `lines` (str) to the others in `room`, if there are any. Needs the lock."""
        if not room or not lines:
            return
        data = lines.encode()
        for member in room.members:
            if member is not self and not member.reason:     # those about to leave get no more
                member.send(data)

    def send(self, data):
        """Send `data` (bytes) without waiting, or disconnect the client. Needs the lock."""
        if options.trace:                # without this `if` everything would be slower
            log.debug("send %r to %s", data, self.name)
        try:
            sent = self.send_sock.send(data)
        except OSError:                  # the send buffer is full, or the connection is lost
            sent = 0                     # (in C, SIGPIPE; Python ignores that signal)
        if sent < len(data):             # half a line may have been sent: so nothing may follow
            self.disconnect("dropped: not reading, or gone")
            self.send_sock.close()       # so every later send fails: that of BYE, see leave

    def disconnect(self, reason):
        """Note why the client is to go. Its own thread sees that within half a second."""
        self.reason = self.reason or reason      # the first stays; of two at once, either

    def leave(self):
        """Say BYE to the client, if it was not dropped, and leave the room."""
        with rooms_lock:
            try:
                self.send(f"BYE {self.reason}\n".encode())
            finally:
                if self.room:
                    self.move(self.name, None)

    def close(self):
        """Read on until the client hangs up, falls silent or runs out of time; then close."""
        # If a socket is closed while input is unread, TCP sends a reset, which can cost the client
        # its BYE.
        end = time.monotonic() + FAREWELL_SECONDS
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(RECEIVE_BUFFER) and time.monotonic() < end:
                time.sleep(0.01)         # a client that goes on sending must not make this spin
        except OSError:                  # our timeout: the client is silent; or a reset
            pass
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
        time.sleep(ACCEPT_SECONDS)       # so whoever connects in a loop delays nobody inside
        clients = [client for client in clients if client.thread.is_alive()]
        if len(clients) >= options.max_clients + AT_THE_DOOR:
            continue                     # more than that wait in the queue of accept
        try:
            sock, address = listener.accept()
            client = Client(sock, f"client-{number + 1}")
        except OSError as error:
            if error.errno:              # e.g. no file descriptors; otherwise just our timeout
                log.warning("cannot accept: %s", error.strerror)
                sock = None              # if it was dup that failed: nobody holds it any more
                time.sleep(POLL_SECONDS)             # it would fail again at once
            continue
        number += 1
        staying = [other for other in clients if not other.reason]
        if len(staying) >= options.max_clients:      # its thread says so in BYE, and closes
            client.disconnect(f"the server is full (at most {options.max_clients} clients)")
        host, port = address[:2] if address else ("?", "?")      # on macOS it can be None
        log.info("connection from %s:%s: thread %s starts", host, port, client.thread.name)
        try:
            client.thread.start()        # in C: pthread_create
            clients.append(client)
        except RuntimeError as error:    # no more threads: so main itself says BYE, and closes
            client.disconnect(str(error))
            client.serve()
    return clients


# ---- What guards it, and the start ---------------------------------------------------------------
# What must never reach a terminal: control characters (C0, DEL, C1), separators of lines and
# paragraphs, and controls that change the direction of text.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Letters and marks without ink: with one of them in it, a name could look like another.
INVISIBLE = re.compile(r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                       r"\U000e0100-\U000e01ef]")
# Options of a client's socket. After 20 s of silence TCP sends a probe every 5 s. It gives up when
# nothing comes back or data is not accepted, on Linux after 30 s. (macOS says TCP_KEEPALIVE.)
SOCKOPTS = {"SO_SNDBUF": SEND_BUFFER, "TCP_NODELAY": 1, "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 20,
            "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


def parse(line):
    """Return the verb, in capitals, and the text (str) of a request (bytes) that is not blank."""
    if len(line) > MAX_REQUEST:
        return "TOO LONG", ""
    text = UNSAFE.sub("\ufffd", line.decode("utf-8", "replace").replace("\t", " "))
    verb, _, text = text.lstrip().partition(" ")
    return verb.upper(), text


def is_name(word):
    """Return whether `word` has 1 to MAX_NAME letters, marks (not first), digits, _ or -."""
    categories = [unicodedata.category(character) for character in word if character not in "_-"]
    known = all(kind[0] in "LM" or kind == "Nd" for kind in categories)      # Nd: decimal digit
    begins_with_mark = unicodedata.category(word[0])[0] == "M"
    return known and not begins_with_mark and len(word) <= MAX_NAME and not INVISIBLE.search(word)


def set_options(sock):
    """Set SOCKOPTS as far as this system knows them (man 7 tcp, man 7 socket)."""
    for name, value in SOCKOPTS.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
        try:
            sock.setsockopt(level, getattr(socket, name), value)
        except (AttributeError, OSError):            # unknown here, or refused
            pass


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
    parser.add_argument("--trace", action="store_true", help="log all bytes, and the lock")
    parser.parse_args(namespace=options)
    for is_right, message in (
            (0 <= options.port <= 65535, "port: 0 to 65535"),
            (options.host and options.host.isascii(), "--host: an address of this machine"),
            (options.name.strip() and options.name.isprintable(), "--name: printable, not empty"),
            (options.max_clients > 0, "--max-clients: 1 or more"),
            (options.rate == 0 or options.rate >= 100, "--rate: 100 or more; 0: no limit")):
        if not is_right:
            parser.error(message)
    # How many bytes one recv takes: few if there is a rate, so that no rest is long.
    options.piece = min(4096, options.rate // 100) if options.rate else 4096


def start_log():
    """Start the thread that writes the log; return its QueueListener."""
    # If the terminal stalls only this thread waits: logging just puts lines into the queue.
    lines = queue.SimpleQueue()
    logging.basicConfig(level=logging.DEBUG if options.trace else logging.INFO,
                        format="%(asctime)s %(threadName)-9s %(message)s", datefmt="%H:%M:%S",
                        handlers=[logging.handlers.QueueHandler(lines)])
    writer = logging.handlers.QueueListener(lines, logging.StreamHandler())
    writer.start()
    return writer


def main():
    """Run the server. Exit status: 0 after closing, 1 if it cannot listen."""
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
    # half a second for its last recv and for the log: 2.5 s (3 s), for fifty threads as for one.
    while any(client.thread.is_alive() for client in clients):
        time.sleep(0.05)
    log.info("closed")
    ending = threading.Thread(target=writer.stop, daemon=True)   # writes the rest of the log
    ending.start()
    ending.join(POLL_SECONDS)            # not longer: the terminal may be stalled, or gone
    os._exit(0)                          # without Python's own flush, which could hang


if __name__ == "__main__":
    main()
