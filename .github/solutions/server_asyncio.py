"""Chatroom with asyncio, a reference solution: one thread, and a task for each client.

    python server_asyncio.py [--rate N] [--max-clients N] [--host H] [--name N] PORT

It needs no lock: others run only where a task says `await`; all between two of them is one step.
Short cuts: no Windows, only IPv4, logs only tracebacks, takes any OSError for a lost connection.
"""
import argparse, asyncio, os, re, signal, socket, sys, traceback
from time import monotonic as now
from unicodedata import category, normalize

MAX_REQUEST, MAX_NAME = 1024, 20                        # bytes, characters
JOIN_SECONDS = 300
FLOOD_SECONDS = 60
FAREWELL_SECONDS = 1.5
SOCKET_OPTIONS = {      # of the listening socket; those that it accepts inherit them
    "SO_REUSEADDR": 1, "SO_SNDBUF": 256 * 1024, "SO_RCVBUF": 64 * 1024, "TCP_NODELAY": 1,
    "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20,    # macOS
    "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30000}
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                       "\U000e0100-\U000e01ef]")
DEFAULTS = {"rate": 8192, "max-clients": 100, "host": "127.0.0.1", "name": "Chatroom"}
clients = []            # every connection not yet closed; those in a room in order of arrival
rooms = {}              # {folded name: name}, the oldest first
closing = False

def is_name(name):
    kinds = ["_" if letter in "_-" else category(letter) for letter in name]
    return (len(name) <= MAX_NAME and kinds[0][0] != "M" and not INVISIBLE.search(name)
            and all(kind == "Nd" or kind[0] in "LM_" for kind in kinds))

def fold(name):         # equal for names that compare as equal
    return normalize("NFD", normalize("NFD", name).casefold())

def members(room):
    return [client for client in clients if client.room == room]

class Client:
    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.unfinished, self.cut = sock, b"", False
        self.name = self.room = self.reason = None      # its folded room; why it is stopped
        self.moved, self.last_pause = now() - 1, now()
        if sum(not client.reason for client in clients) >= options.max_clients:
            self.reason = f"the server is full (at most {options.max_clients} clients)"
        clients.append(self)
        self.task = asyncio.ensure_future(self.serve())
        self.deadline = asyncio.get_running_loop().call_later(
            JOIN_SECONDS, self.stop, f"no JOIN within {JOIN_SECONDS} seconds")

    def stop(self, reason):
        if not self.reason:
            self.reason = reason
            self.task.cancel()                          # where it waits now, or waits next

    async def serve(self):
        try:
            while not self.reason:
                cost = self.carry_out(await self.receive())
                await asyncio.sleep(cost / options.rate if options.rate else 0)  # 0: others' turn
        except asyncio.CancelledError:                  # by stop
            pass
        except OSError:
            self.reason = "connection lost"
        except Exception:                               # somebody has edited this script
            self.reason = "an error in the server"
            traceback.print_exc()
        try:
            try:
                self.send(f"BYE {self.reason}")
            finally:
                self.move(None, None)
            self.sock.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(self.read_off(), FAREWELL_SECONDS)
        except (OSError, asyncio.TimeoutError):
            pass
        except Exception:
            traceback.print_exc()
        finally:
            clients.remove(self)
            self.sock.close()

    async def read_off(self):
        """A close with unread input would be a reset, which can destroy the BYE on its way."""
        while await asyncio.get_running_loop().sock_recv(self.sock, 65536):
            await asyncio.sleep(0)                      # sock_recv waits only if it has to

    async def receive(self):
        """Return a piece so small that the rest after it is about half a second at most."""
        size = min(4096, options.rate // 100) or 4096
        try:
            data = self.sock.recv(size)
        except BlockingIOError:                         # nothing has been held back
            data = await asyncio.get_running_loop().sock_recv(self.sock, size)
            self.last_pause = now()
        if len(data) < size:                            # nor was anything beyond this piece
            self.last_pause = now()
        if not data:
            self.stop("end of file")
        elif options.rate and now() - self.last_pause > FLOOD_SECONDS:
            self.stop(f"you have been held back for {FLOOD_SECONDS} seconds")
        return data

    def carry_out(self, data):
        """Answer the requests that end in these bytes; return what they cost, in bytes."""
        cost, self.unfinished = len(data), self.unfinished + data
        while b"\n" in self.unfinished and not self.reason and not closing:
            line, _, self.unfinished = self.unfinished.partition(b"\n")
            line = line[:-1] if line.endswith(b"\r") else line
            if line:
                cost += max(0, 100 - len(line))
                self.send(self.answer(line))
        self.unfinished = self.unfinished[:MAX_REQUEST + 2]     # enough to be seen as too long
        return cost

    def answer(self, line):
        text = UNSAFE.sub("\ufffd", line.decode("utf-8", "replace").replace("\t", " "))
        verb, _, text = text.lstrip(" ").partition(" ")
        verb = verb.upper()
        if len(line) > MAX_REQUEST: return f"ERROR a request is at most {MAX_REQUEST} bytes"
        if not verb: return
        if verb == "JOIN": return self.join(*normalize("NFC", text).split())
        if verb == "ROOMS":
            return " ".join(["ROOMS", *(f"{rooms[it]}={len(members(it))}" for it in rooms)])
        if verb == "LEAVE": return self.stop("you said LEAVE")
        if verb not in ("MSG", "WHO"): return f"ERROR unknown request {verb}"
        if not self.room: return "ERROR join a room first: JOIN name"
        if verb == "WHO": return " ".join(["WHO", *(it.name for it in members(self.room))])
        if text.strip(): self.broadcast(self.room, f"MSG {self.name} {text}")

    def join(self, name="", room="", *more):
        taken = [fold(client.name) for client in clients if client.name]
        name = name or next(it for it in map("guest{}".format, range(1, 9**9)) if it not in taken)
        room = room or rooms.get(self.room) or next(iter(rooms.values()), "lobby")
        here = self.room == fold(room)
        if more or not is_name(name) or not is_name(room):
            return f"ERROR a name is 1 to {MAX_NAME} letters, digits, _ or -"
        if fold(name) in taken and fold(name) != fold(self.name or ""):
            return f"ERROR the name {name} is taken"
        if here and name == self.name: return f"ERROR you are {name} in {rooms[self.room]} already"
        if self.room:
            if options.rate and now() < self.moved + 1:
                return "ERROR you can move or change your name once a second"
            self.moved = now()
        self.move(name, room)
        return f"WELCOME {rooms[self.room]} {name} Welcome to {options.name}, {name}!"

    def move(self, name, room):
        """Leave the old room, if any; enter the new one, if any. First the state, then the news."""
        self.deadline.cancel()
        old_name, old_room = self.name, self.room
        self.name, self.room = name, room and fold(room)
        clients.sort(key=lambda client: client is self)     # now it has arrived last
        if room: rooms.setdefault(self.room, room)
        if old_room and not members(old_room): del rooms[old_room]
        if old_room and not closing: self.broadcast(old_room, f"LEFT {old_name}")
        if room: self.broadcast(self.room, f"JOINED {name}")

    def broadcast(self, room, line):
        for member in members(room):
            if member is not self: member.send(line)

    def send(self, line):
        """Never wait: what is unread stays in the send buffer; whoever lets it fill up must go."""
        if self.cut or not line: return
        data, sent = f"{line}\n".encode(), 0
        try:
            sent = self.sock.send(data)
        except OSError:                                 # no space at all, or the connection is lost
            pass
        if sent < len(data):
            self.cut = True                             # the line may be cut: nothing may follow
            self.stop("not reading")

def close(signum, frame):
    """Only make a note: carry_out and main look at it. (A handler of asyncio's comes too late, if
    hundreds of requests have been received.)"""
    global closing
    closing = True
    if signum == signal.SIGINT:                         # a second Ctrl-C ends it at once
        signal.signal(signum, lambda signum, frame: os._exit(1))

async def main():
    listener = socket.socket()
    for name, value in SOCKET_OPTIONS.items():
        if hasattr(socket, name):                       # not every system has all of them
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            listener.setsockopt(level, getattr(socket, name), value)
    try:
        listener.bind((options.host, options.port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error}")
    listener.setblocking(False)
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:      # nohup
            signal.signal(signum, close)
    while not closing:
        try:
            if len(clients) < options.max_clients + 10: # ten more, who are told that it is full
                Client(listener.accept()[0])
        except OSError:                                 # nobody there, or out of descriptors
            pass
        await asyncio.sleep(0.01)                       # so it accepts 100 a second at most
    for client in clients:
        client.stop("the server is closing")
    while clients:
        await asyncio.sleep(0.01)
    os._exit(0)         # while Python tidies up, another signal would look like an accident

parser = argparse.ArgumentParser()
for option, value in DEFAULTS.items():
    parser.add_argument(f"--{option}", type=type(value), default=value)
parser.add_argument("port", type=int)
options = parser.parse_args()
if options.rate != 0 and options.rate < 100 or options.max_clients < 1:
    parser.error("--rate is 0, or 100 or more; --max-clients is 1 or more")
asyncio.run(main())
