"""Chatroom with asyncio, a reference solution: one thread, and a task for each client.

    python server_asyncio.py [--rate N] [--max-clients N] PORT
    CHAT_SERVER="python .github/solutions/server_asyncio.py" python -m pytest -k rule    # tests it

It needs no lock: others run only where a task says `await`; all between two of them is one step.
Short cuts: no Windows, this machine only, options are not checked, only tracebacks are logged (for
a port in use, too), any OSError is taken for a lost connection, an endless loop must be killed.
"""
import argparse, asyncio, os, re, signal, socket, traceback
from contextlib import suppress
from itertools import count
from time import monotonic as now
from unicodedata import category, normalize

SOCKET_OPTIONS = {          # of the listening socket; those that it accepts inherit them
    "SO_REUSEADDR": 1, "SO_SNDBUF": 256 * 1024, "SO_RCVBUF": 64 * 1024, "TCP_NODELAY": 1,
    "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20,    # these two are one: macOS
    "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30000}
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                       "\U000e0100-\U000e01ef]")
clients = []                # all whose connection is not closed yet, in order of their last JOIN
rooms = {}                  # {folded name: name}, the oldest first
signals = []                # that have come: it is closing

def is_name(word):
    kinds = [category(letter) for letter in re.sub("[_-]", "x", word)]
    return (len(word) <= 20 and kinds[0][0] != "M" and not INVISIBLE.search(word)
            and all(kind[0] in "LM" or kind == "Nd" for kind in kinds))

def fold(name):             # equal for names that compare as equal
    return normalize("NFC", name.casefold())

def members(room):          # of no room (None): nobody
    return [client for client in clients if room and client.room == room]

class Client:
    def __init__(self, sock):
        self.sock, self.moved = sock, 0
        self.name = self.room = self.reason = None      # its folded room; why it has to go
        if sum(not client.reason for client in clients) >= options.max_clients:
            self.reason = f"the server is full (at most {options.max_clients} clients)"
        clients.append(self)
        self.deadline = loop.call_later(300, self.stop, "no JOIN within 300 seconds")
        self.task = loop.create_task(self.serve())

    async def serve(self):
        for step in self.carry_out_requests, self.leave, self.say_bye:
            try:
                await step()
            except (OSError, asyncio.CancelledError):   # the connection is lost; or see stop
                pass
            except Exception:                           # somebody has edited this script
                self.reason = "an error in the server"
                traceback.print_exc()
        clients.remove(self)
        self.sock.close()

    def stop(self, reason):
        if not self.reason:
            self.reason = reason
            self.task.cancel()                          # where it waits now, or waits next

    async def carry_out_requests(self):
        pace = options.rate or float("inf")             # bytes a second
        size = int(min(4096, pace / 100)) or 1          # read so few that a rest is not long
        unfinished, last_pause = b"", now()
        while not self.reason:
            try:
                data = self.sock.recv(size)
            except BlockingIOError:                     # nothing has been held back
                data = await loop.sock_recv(self.sock, size)
                last_pause = now()
            if not data:
                self.reason = "end of file"
            elif options.rate and now() > last_pause + 60:
                self.reason = "you have been held back for 60 seconds"
            *lines, unfinished = (unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
            unfinished = unfinished[:1026]              # enough to be seen as too long
            for line in filter(bytes.strip, lines):
                self.answer(line)
                await asyncio.sleep((100 - len(line)) / pace)   # it costs 100 bytes at least
            await asyncio.sleep(len(data) / pace)

    async def leave(self):
        self.move(None, None)

    async def say_bye(self):
        """A close with unread input would be a reset, which can destroy the BYE on its way."""
        if self.reason != "not reading":                # else its last line may be cut
            self.send(f"BYE {self.reason or 'connection lost'}")
        self.sock.shutdown(socket.SHUT_WR)
        loop.call_later(1.5, self.task.cancel)
        while await loop.sock_recv(self.sock, 65536):
            await asyncio.sleep(0)                      # sock_recv waits only if it has to

    def answer(self, line):
        text = UNSAFE.sub("\ufffd", line.decode("utf-8", "replace").replace("\t", " "))
        verb, _, text = text.lstrip(" ").partition(" ")
        verb = verb.upper()
        if len(line) > 1024:
            self.send("ERROR a request is at most 1024 bytes")
        elif verb == "JOIN":
            self.join(*normalize("NFC", text).split())
        elif verb == "ROOMS":
            self.send(" ".join(["ROOMS", *(f"{rooms[it]}={len(members(it))}" for it in rooms)]))
        elif verb == "LEAVE":
            self.stop("you said LEAVE")
        elif verb not in ("MSG", "WHO"):
            self.send(f"ERROR unknown request {verb}")
        elif not self.room:
            self.send("ERROR join a room first: JOIN name")
        elif verb == "WHO":
            self.send(" ".join(["WHO", *(member.name for member in members(self.room))]))
        elif text.strip():
            self.broadcast(self.room, f"MSG {self.name} {text}")

    def join(self, name="", room="", *more):
        owners = {fold(client.name): client for client in clients if client.name}
        name = name or next(it for it in map("guest{}".format, count(1)) if it not in owners)
        room = room or rooms.get(self.room) or next(iter(rooms.values()), "lobby")
        if more or not is_name(name) or not is_name(room):
            self.send("ERROR a name is 1 to 20 letters, digits, _ or -")
        elif owners.get(fold(name), self) is not self:
            self.send(f"ERROR the name {name} is taken")
        elif (name, fold(room)) == (self.name, self.room):
            self.send(f"ERROR you are {name} in {rooms[self.room]} already")
        elif options.rate and now() < self.moved + 1:
            self.send("ERROR you can move or change your name once a second")
        else:
            self.moved = now() if self.room else 0      # the first JOIN does not count
            room = rooms.setdefault(fold(room), room)
            self.move(name, fold(room))
            self.send(f"WELCOME {room} {name} Welcome to Chatroom, {name}!")

    def move(self, name, room):
        """From the old room, if any, to the new one, if any: first the state, then the news."""
        self.deadline.cancel()
        old_name, old_room, self.name, self.room = self.name, self.room, name, room
        clients.remove(self)
        clients.append(self)
        if not members(old_room):
            rooms.pop(old_room, None)
        self.broadcast(old_room, f"LEFT {old_name}")
        self.broadcast(room, f"JOINED {name}")

    def broadcast(self, room, line):
        for member in members(room):
            if member is not self and not member.reason:
                member.send(line)

    def send(self, line):
        """Never wait: what is unread stays in the send buffer; whoever lets it fill up must go."""
        data, sent = f"{line}\n".encode(), 0
        with suppress(OSError):                         # no space at all, or a lost connection
            sent = self.sock.send(data)
        if sent < len(data):
            self.stop("not reading")

async def main():
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, lambda signum, frame: signals.append(signum))
    socket.setdefaulttimeout(0)                         # no socket waits: asyncio does
    listener = socket.socket()
    for name, value in SOCKET_OPTIONS.items():
        if hasattr(socket, name):                       # not every system has all of them
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            listener.setsockopt(level, getattr(socket, name), value)
    listener.bind(("127.0.0.1", options.port))
    listener.listen(1024)
    while not signals:
        if len(clients) < options.max_clients + 10:     # ten more, who are told that it is full
            with suppress(OSError):                     # nobody is there, or too many files open
                Client(listener.accept()[0])
        await asyncio.sleep(0.01)                       # so it accepts 100 a second at most
    for client in clients:
        client.stop("the server is closing")
    while clients and signals.count(signal.SIGINT) < 2:     # a second Ctrl-C ends it at once
        await asyncio.sleep(0.01)
    os._exit(1 if clients else 0)   # in the usual end a signal would look like an accident

parser = argparse.ArgumentParser()
parser.add_argument("--rate", type=int, default=8192)
parser.add_argument("--max-clients", type=int, default=100)
parser.add_argument("port", type=int)
options = parser.parse_args()
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
