#!/usr/bin/env python3
"""A chatroom server: one thread per client, one lock, nothing but the standard library.

    python server.py 12345                 in one terminal
    python client.py 127.0.0.1 12345       in another, and in one more
    nc 127.0.0.1 12345                     is a client too: type `join ann`, `msg hi`, `leave`

The main thread accepts connections and starts a thread for each. A client's thread reads the
client's requests (JOIN, MSG, WHO, ROOMS, LEAVE; one per line) and carries them out: what the
client says, it sends straight to the sockets of the others in the room.
"""
import argparse
import collections
import contextlib
import errno
import itertools
import logging
import signal
import socket
import sys
import threading
import time

MAX_REQUEST = 1024           # bytes in a request, its line ending not counted
TOO_LONG = "\n"              # stands for a longer one: no request holds a newline
MAX_NAME = 20                # characters in the name of a person or a room
JOIN_SECONDS = 30            # a client that has not joined by then is cut off
FAREWELL_SECONDS = 2         # how long a client may take to hang up after its BYE
JOINED_SECONDS = 0.001       # how long JOINED waits for more: so 500 joins take 0.5 s, not 0.9
TICK_SECONDS = 0.1           # how often the main thread looks at deadlines, and for Ctrl-C
HELD_BACK_SECONDS = 8        # between two warnings to a client that sends too fast
SEND_BUFFER = 256 * 1024     # bytes that may wait in the kernel for a client that reads slowly
RECEIVE_BUFFER = 64 * 1024   # bytes that a client may have sent ahead, in the kernel too
CHUNK = 4096                 # bytes taken from a socket at once, at most
MAX_BATCH = 8 * 1024         # bytes of several speakers sent at once: far less than SEND_BUFFER
BACKLOG = 1024               # connections that may wait for accept; with 128, a class that connects
                             # at once waits for seconds: TCP tries again after 1 s, 2 s, ...

# send(..., MSG_DONTWAIT) fails where it would have to wait. Windows has no such flag: there,
# SO_SNDTIMEO (see serve) limits the wait for a client that does not read.
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)

# What must not reach other people's terminals: control characters (C0, DEL, C1), line and paragraph
# separators, and the bidirectional controls, which turn text around. A tab becomes a space.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}

NAME_RULE = f"JOIN [name [room]]; a name is 1 to {MAX_NAME} letters, digits, _ or -"

log = logging.getLogger("chat")
options = argparse.Namespace()   # the command line: set before the first thread starts, then read
closing = False                  # set by Ctrl-C and SIGTERM, looked at by the main thread

# ---- What the threads share, and why that is safe ----------------------------------------------
#
# rooms_lock (in C: a pthread_mutex_t) guards `rooms`, the members of each room, `clients`, each
# client's name, room, entered_at, reason and deadline, and every send.
#
# - Looking up a room or a name and acting on the answer are one critical section. Otherwise two
#   clients could both find no room and make two, or both take one name, or enter a room that is
#   being deleted.
# - Sending is done under the lock, and so is putting lines in order, in a room's `unsent`. So all
#   see the same order, and no two lines mix on one socket. This is allowed only because send does
#   not wait (on Windows: 10 ms at most).
# - Nothing that may wait is done under the lock: no recv, no sleep, no line of the log
#   (but for --trace).
# - Only a client's own thread changes its name and room (so it may read them without the lock), and
#   only that thread (or start_thread, if it could not be started) closes the socket, after taking
#   the client out of `rooms` and `clients`: who finds it there, under the lock, may use its socket.
# - Without the lock: append to a room's `said`, which is one step (taking out is done under the
#   lock); and a look at `reason` or `clients`, which may come a moment too early: then the next
#   look sees the change.
# - Not shared: recv, and a client's other attributes, belong to its own thread. One thread may
#   receive from a socket while another sends on it: the two directions are independent.

rooms = []                       # the oldest first; never one without members
clients = set()                  # every connection that has a thread
rooms_lock = threading.Lock()


class Room:
    """A named room: its members (Client), in the order of entering, and the lines for them."""

    def __init__(self, name):
        self.name = name
        self.members = []
        self.said = collections.deque()      # (speaker, lines) that wait for the lock: see say()
        self.unsent = []                     # (speaker, lines), in the order in which all get them

    def broadcast(self):
        """Empty `unsent` and send it to the members, to nobody its own lines. Lock held.

        A newcomer does not get what is older than its JOINED. That is in the batch too: so the
        newcomer is among the speakers, and whoever is not gets everything.
        """
        batch, self.unsent = self.unsent, []
        if not batch:
            return
        speakers = {speaker for speaker, _ in batch}
        everything = b"".join(lines for _, lines in batch)
        for member in self.members:
            if member not in speakers:
                member.send(everything)
            elif len(batch) > 1:             # else there is only its own
                heard = batch[member.entered_at:]
                member.send(b"".join(lines for speaker, lines in heard if speaker is not member))
                member.entered_at = 0

    def broadcast_said(self):
        """Broadcast what waits in `said`, but stop at MAX_BATCH bytes. Lock held."""
        size = 0
        while self.said and size < MAX_BATCH:
            self.unsent.append(self.said.popleft())
            size += len(self.unsent[-1][1])
        self.broadcast()


class Client:
    """A connection: its socket, who it is and where, and its thread's work."""

    def __init__(self, sock, number):
        self.sock = sock
        self.number = number
        self.name = None
        self.room = None                     # None before it has joined and after it has left
        self.reason = None                   # why the connection ends; None while it goes on
        self.deadline = time.monotonic() + JOIN_SECONDS
        self.unfinished = b""                # a request whose end has not come yet
        self.skipping = False                # in the middle of a request that is too long
        self.entered_at = 0                  # how many in its room's `unsent` are older than it
        self.messages = 0                    # how many it has said
        self.relayed = 0                     # bytes passed on since the last rest
        self.held_back = 0                   # seconds in a row that it has been faster than --rate
        self.events = []                     # what to log when the lock is free again
        # Bytes a recv may return: what --rate allows in 1/16 s, so that no rest is long.
        self.chunk = min(CHUNK, options.rate // 16 + 1) if options.rate else CHUNK

    def serve(self):
        """Read and carry out requests until the client leaves. Runs in a thread of its own."""
        ended = "end of file"                # unless recv fails
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # send lines at once
            if not DONT_WAIT:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 10)   # Windows: ms
            while not self.reason:
                data = self.sock.recv(self.chunk)
                if not data:                 # b"" is not "nothing yet" but "nothing any more"
                    break
                self.handle(data)
                if options.rate:
                    self.keep_pace(len(data))
        except OSError as error:
            ended = f"connection lost: {error.strerror}"
        finally:                             # the one way out, however the connection ends
            self.leave(ended)
            with contextlib.suppress(OSError):
                # Read on until the client hangs up, or keep_deadlines shuts the socket: to close
                # with unread input would reset the connection, and our BYE could be lost.
                while self.sock.recv(RECEIVE_BUFFER):
                    time.sleep(0.01)         # a flooder must not keep us busy
            log.info("thread ends after %d messages: %s", self.messages, self.reason)
            with rooms_lock:
                clients.remove(self)
            self.sock.close()

    def keep_pace(self, received):
        """Rest for as long as the bytes received (int) take at --rate: TCP holds the sender back.

        A short message grows when its speaker's name is put before it: then the bytes passed on
        count. A flooder is warned now and then. The warning also finds out those who have gone:
        their kernel may still have 4 MiB to send (measured), minutes at this pace, but it answers
        our line with a reset.
        """
        rest = min(max(received, self.relayed) / options.rate, 1)    # closing must not wait long
        time.sleep(rest)
        self.relayed = 0
        if received < self.chunk:
            self.held_back = 0
        else:                                    # as much as we asked for: more is waiting
            self.held_back += rest
        if self.held_back > HELD_BACK_SECONDS:
            self.held_back = 0
            with rooms_lock:
                self.tell("ERROR", f"too fast: you are held back to {options.rate} bytes a second")

    def requests(self, data):
        """Yield each request (str) that `data` (bytes, just received) completes, or TOO_LONG.

        TCP keeps the order of bytes, not the pieces in which they were sent. So cut at newlines,
        which are never a part of another UTF-8 character, and decode whole lines only.
        """
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if self.skipping:
                self.skipping = False            # the end of a line that was refused already
            elif len(line) > MAX_REQUEST:
                yield TOO_LONG
            else:
                yield line.decode("utf-8", "replace").translate(SAFE_TEXT).lstrip()
        if len(self.unfinished) > MAX_REQUEST + len(b"\r") and not self.skipping:
            self.skipping = True
            yield TOO_LONG
        if self.skipping:
            self.unfinished = b""                # however long the line, memory is bounded

    def handle(self, data):
        """Carry out, in order, the requests that `data` (bytes, just received) completes."""
        lines = []           # messages in a row are passed on together: 3 times as fast in bursts
        for request in self.requests(data):
            verb, _, text = request.partition(" ")
            verb = verb.upper()
            if verb == "MSG" and self.room:
                if text.strip():
                    lines.append(f"MSG {self.name} {text}\n")
                continue
            self.say(lines)
            lines = []
            if verb == "JOIN":
                self.join(*text.split())
                self.write_log()
            elif verb == "LEAVE":
                return self.leave("you said LEAVE")
            elif verb:
                self.answer(verb)
        self.say(lines)

    def answer(self, verb):
        """Answer a request that changes nothing: what was asked for, or ERROR."""
        with rooms_lock:
            if self.room:
                self.room.broadcast()                # no answer gets ahead of a JOINED
            if verb == "ROOMS":
                self.tell("ROOMS", *(f"{room.name}={len(room.members)}" for room in rooms))
            elif verb == "WHO" and self.room:
                self.tell("WHO", *(member.name for member in self.room.members))
            elif verb in ("MSG", "WHO"):
                self.tell("ERROR", "join a room first: JOIN [name [room]]")
            elif verb == TOO_LONG:
                self.tell("ERROR", f"a request is at most {MAX_REQUEST} bytes long")
            else:
                self.tell("ERROR", "unknown request; there are JOIN, MSG, WHO, ROOMS and LEAVE")

    def say(self, lines):
        """Pass on `lines`, a list of MSG lines, to the others in the room.

        While one thread sends, others wait for the lock, each with lines to say. The next to get it
        sends them together, with one send per receiver: a full lecture hall is 1.2 times as fast.
        """
        if lines:
            self.messages += len(lines)
            data = "".join(lines).encode()
            self.relayed += len(data)
            self.room.said.append((self, data))
            while self.room.said:                # if not, another thread has taken ours too
                with rooms_lock:
                    self.room.broadcast_said()

    def join(self, name=None, room_name=None, *more):
        """Enter a room, or move, or take another name: in one step, or not at all and ERROR."""
        with rooms_lock:
            others = [member for room in rooms for member in room.members if member is not self]
            taken = [other.name.casefold() for other in others]
            guests = (f"guest{number}" for number in itertools.count(self.number))
            name = name or next(guest for guest in guests if guest not in taken)
            room = find_room(room_name, self.room)
            if more or not is_name(name) or (room_name and not is_name(room_name)):
                return self.refuse(NAME_RULE)
            if name.casefold() in taken:
                return self.refuse(f"the name {name} is taken")
            if self.room and (name, room) == (self.name, self.room):
                return self.refuse(f"you are {name} in {room.name} already")
            if self.reason:          # BYE came while it waited for the lock: its deadline stays
                return
            if not room:
                room = Room(room_name or "lobby")
                rooms.append(room)
                self.events.append(f"room {room.name} created")
            self.leave_room(room)
            self.name, self.room = name, room
            self.deadline = float("inf")             # who has joined has none
            self.entered_at = len(room.unsent)
            room.members.append(self)
            room.unsent.append((self, f"JOINED {name}\n".encode()))
            self.tell("WELCOME", room.name, name, f"Welcome to {options.name}, {name}!")
            self.events.append(f"{name} joined {room.name}")
        # Whoever enters meanwhile is announced together with us, in one broadcast.
        time.sleep(JOINED_SECONDS)
        with rooms_lock:
            room.broadcast()

    def refuse(self, why):
        """Answer JOIN with ERROR: nothing has changed. Lock held."""
        self.tell("ERROR", why)
        self.events.append(f"refused: {why}")

    def leave_room(self, to=None):
        """Leave the room, if in one, for the room `to`; the last to leave deletes it. Lock held."""
        room, self.room = self.room, None
        if room:
            room.unsent.append((self, f"LEFT {self.name}\n".encode()))
            room.broadcast()                         # to us too: who has entered before we left
            room.members.remove(self)
            self.events.append(f"{self.name} left {room.name}")
            if not room.members and room is not to:
                rooms.remove(room)
                self.events.append(f"room {room.name} deleted")

    def leave(self, reason):
        """Leave the room, and say BYE if it has not been said; to leave twice does no harm."""
        with rooms_lock:
            self.leave_room()
            self.say_bye(reason)
        self.write_log()

    def write_log(self):
        """Log what has happened, now that the lock is free: a stopped terminal makes us wait.

        A known limit: who talks goes on while the log's terminal is stopped (Ctrl-S); who joins
        or leaves does not.
        """
        for event in self.events:
            log.info(event)
        self.events.clear()

    def say_bye(self, reason):
        """Send BYE, the last line, and end our direction; at most once. Lock held."""
        if not self.reason:
            self.tell("BYE", reason)
            self.reason = self.reason or reason      # tell may have found the connection lost
            self.deadline = time.monotonic() + FAREWELL_SECONDS
            self.shutdown(socket.SHUT_WR)

    def tell(self, *words):
        """Send one line that consists of `words` (str). Lock held."""
        self.send(f"{' '.join(words)}\n".encode())

    def send(self, data):
        """Send `data` (bytes: whole lines) without waiting, or drop the client. Lock held.

        A full send buffer means that the client has not read for too long. If only a part of
        `data` fitted, a line may be cut in two, and nothing may follow it: that is the end too.
        """
        if self.reason:
            return
        try:
            if self.sock.send(data, DONT_WAIT) == len(data):
                return
            self.reason = "dropped: it does not read"
        except (BlockingIOError, TimeoutError):      # the latter on Windows, by SO_SNDTIMEO
            self.reason = "dropped: it does not read"
        except OSError as error:
            self.reason = f"connection lost: {error.strerror}"
        self.shutdown(socket.SHUT_RDWR)

    def shutdown(self, how):
        """End a direction of the connection, or both, which wakes our thread up in recv."""
        with contextlib.suppress(OSError):           # the client has gone already
            self.sock.shutdown(how)


def is_name(word):
    """Tell whether `word` (str) can name a person or a room; letters may be of any script."""
    return 0 < len(word) <= MAX_NAME and all(c.isalpha() or c.isdigit() or c in "_-" for c in word)


def find_room(name, here):
    """Return the room called `name`, or None. Without a name: `here`, or the oldest. Lock held."""
    if name is None:
        return here or (rooms[0] if rooms else None)
    return next((room for room in rooms if room.name.casefold() == name.casefold()), None)


# ---- With --trace: every line that a client's thread receives or sends, and the lock -------------

class TracedLock:
    """Stands in for rooms_lock, and logs who waits for it, who has it and who lets go."""

    lock = rooms_lock            # the real one; `with rooms_lock` looks the name up and finds us

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            trace("waits for the lock")
            self.lock.acquire()
        trace("has the lock")

    def __exit__(self, *_):
        trace("lets go of the lock")
        self.lock.release()


def trace(message):
    """Log for --trace; not from the main thread, which takes the lock ten times a second."""
    if threading.current_thread() is not threading.main_thread():
        log.info("    %s", message)


def trace_everything():
    """Wrap what is traced in functions that log; so without --trace nothing is slower."""
    global rooms_lock
    requests, send = Client.requests, Client.send

    def _traced_requests(client, data):
        for request in requests(client, data):
            trace(f"<- {request!r}")
            yield request

    def _traced_send(client, data):
        for line in data.decode().splitlines() if not client.reason else ():
            trace(f"-> {client.name}: {line}")
        send(client, data)
    rooms_lock = TracedLock()
    Client.requests, Client.send = _traced_requests, _traced_send


# ---- The main thread: listen, accept, close -----------------------------------------------------

def listen(host, port):
    """Return a listening socket (in C: socket, setsockopt, bind, listen). Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    # The sockets that it accepts inherit the sizes of the buffers, but not the time limit.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    listener.settimeout(TICK_SECONDS)
    return listener


def accept_clients(listener):
    """Start a thread for each client that connects, and keep the deadlines, until `closing`."""
    numbers = itertools.count(1)
    while not closing:
        keep_deadlines()
        try:
            sock, address = listener.accept()
        except (socket.timeout, ConnectionAbortedError):     # nobody came, or has gone again
            continue
        except OSError as error:                             # out of file descriptors, for one
            log.warning("cannot accept: %s", error.strerror)
            time.sleep(TICK_SECONDS)                         # it would fail again at once
            continue
        start_thread(Client(sock, next(numbers)), address)


def start_thread(client, address):
    """Start the client's thread. One client too many gets BYE first: its thread only leaves."""
    thread = threading.Thread(target=client.serve, name=f"client-{client.number}", daemon=True)
    with rooms_lock:
        if sum(not other.reason for other in clients) >= options.max_clients:
            client.say_bye(f"the server is full ({options.max_clients} clients)")
        clients.add(client)
    host, port = address[:2]                                 # IPv6 has two parts more
    log.info("connection from %s:%d: thread %s starts", host, port, thread.name)
    try:
        thread.start()
    except RuntimeError as error:                            # the system has no thread left
        log.warning("%s: %s", thread.name, error)
        with rooms_lock:
            client.say_bye("the server has no thread left")
            clients.remove(client)
        client.sock.close()


def keep_deadlines():
    """Say BYE to those who have not joined in time; hang up on those who have had BYE but stay."""
    now = time.monotonic()
    with rooms_lock:
        for client in clients:
            if now > client.deadline and client.reason:
                client.shutdown(socket.SHUT_RDWR)
            elif now > client.deadline:
                client.say_bye(f"no JOIN within {JOIN_SECONDS} seconds")


def close():
    """Say BYE to every client and wait until they have gone; their deadline is FAREWELL_SECONDS."""
    log.info("closing: BYE to %d clients", len(clients))
    with rooms_lock:
        for client in clients:
            client.say_bye("the server is closing")
    while clients:
        keep_deadlines()
        time.sleep(0.01)
    log.info("closed")


def stop(_signum, _frame):
    """On Ctrl-C or SIGTERM, have the main thread close; a second one ends the process at once."""
    global closing
    closing = True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def parse_arguments():
    """Fill `options` from the command line; status 2 and a usage line if it makes no sense."""
    parser = argparse.ArgumentParser(description="A chatroom server: one thread per client.")
    parser.add_argument("port", type=int, help="TCP port to listen on; 0: the system picks one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: "
                        "for this machine only; 0.0.0.0: for the network too)")
    parser.add_argument("--name", default="Chatroom", help="the server's name (%(default)s)")
    parser.add_argument("--max-clients", type=int, default=100, help="at once (%(default)s)")
    parser.add_argument("--rate", type=int, default=8192, help="bytes a second that are read from "
                        "each client (%(default)s; 0: no limit)")
    parser.add_argument("--trace", action="store_true", help="log each line that a client's "
                        "thread receives or sends, and the lock: for a lesson, not for a crowd")
    parser.parse_args(namespace=options)
    options.name = options.name.encode("utf-8", "replace").decode().translate(SAFE_TEXT).strip()
    if not 0 <= options.port <= 65535:
        parser.error("the port is a number from 0 to 65535")
    if options.max_clients < 1 or options.rate < 0 or not options.name or not options.host:
        parser.error("--max-clients is at least 1, --rate at least 0, --name and --host not empty")


def main():
    """Run the server. Exit status: 0 when it was closed, 1 when it cannot listen."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    parse_arguments()
    threading.current_thread().name = "main"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)-9s %(message)s",
                        datefmt="%H:%M:%S")
    try:
        listener = listen(options.host, options.port)
    except (OSError, UnicodeError) as error:                 # UnicodeError: not even a host name
        hints = {errno.EADDRINUSE: "the port is in use; stop that server or take another port",
                 errno.EACCES: "not allowed; take a port from 1024 up"}
        hint = hints.get(getattr(error, "errno", None), f"{error}; is --host an own address?")
        sys.exit(f"server.py: cannot listen on {options.host}:{options.port}: {hint}")
    if options.trace:
        trace_everything()
    host, port = listener.getsockname()[:2]
    local = host.startswith("127.") or host == "::1"
    log.info("%s listening on %s:%d (%s)", options.name, host, port, "this machine only; --host "
             "0.0.0.0 opens it to the classroom" if local else "clients need its address")
    with listener:
        accept_clients(listener)
    close()


if __name__ == "__main__":
    main()
