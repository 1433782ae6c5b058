#!/usr/bin/env python3
"""A chatroom client: one thread at the keyboard, one at the socket. The server is server.py.

    python client.py 127.0.0.1 12345
    echo "hello from a script" | python client.py 127.0.0.1 12345 --name robot

The main thread waits for a line to be typed, and sends it. The reader thread waits for lines from
the server, and shows them. Each has its own part of the screen: you type in the bottom rows, the
conversation scrolls above them. Nothing can wake input() on every system; so neither thread wakes
the other: when the connection has ended, the reader thread ends the whole process.

/who        who is in this room?
/rooms      which rooms are there?
/join ROOM  go to another room; it is created if necessary
/name NAME  take another name
/quit       leave; so does Ctrl-D (Windows: Ctrl-Z, Enter)
//text      say "/text"; anything else is sent as a message
"""
import argparse
import contextlib
import os
import queue
import socket
import sys
import threading
import time
import traceback
import unicodedata
try:
    import readline                      # gives input() line editing and a history
    import termios                       # reads and sets the modes of the terminal, such as echo
except ImportError:                      # Windows, where the console edits lines itself
    readline = termios = None
MAX_WAITING = 64 * 1024                  # bytes in each kernel buffer, and in a line shown
POLL_SECONDS = 0.5                       # Windows notices Ctrl-C only between waits
CONNECT_SECONDS = 10                     # how long to wait for a connection
INPUT_ROWS = 3                           # at the bottom of the screen, for what is being typed
# Socket options: buffer sizes, and when TCP gives up on a vanished machine. See server.py.
SOCKOPTS = {"SO_SNDBUF": MAX_WAITING, "SO_RCVBUF": MAX_WAITING, "SO_KEEPALIVE": 1, "TCP_KEEPCNT": 4,
            "TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30_000}
# What must never reach a terminal, whatever the server says: see server.py.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}
COLOURS = [27, 28, 30, 31, 64, 98, 129, 130, 161, 163]   # of 256: legible on white and on black


class Chat:
    """The conversation. The main thread runs `run`, the reader thread `read`."""
    # What the two share needs no lock: only main sends on the socket, only the reader receives; the
    # queue has its own lock; only the reader sets `name`, only main sets `goodbye`.
    def __init__(self, sock, screen):
        self.sock = sock
        self.screen = screen
        self.answers = queue.Queue(1)        # what came of JOIN: "" for WELCOME, or the ERROR
        self.name = ""                       # our name, as the last WELCOME said
        self.goodbye = ""                    # the last line to show, if it is we who leave

    def run(self, name, room):
        """Join, send what is typed, leave. Does not return: see Screen.end."""
        threading.Thread(target=self.read, name="reader", daemon=True).start()
        try:
            # EOFError: Ctrl-D, or a script's end. OSError: terminal, output or connection is gone.
            with contextlib.suppress(EOFError, OSError):
                self.enter(name, room)
                self.talk()
            self.goodbye = "you have left"
            with contextlib.suppress(OSError):
                self.send("LEAVE")
            while True:                      # the reader ends the process at BYE: see hear
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.screen.end(0, "you have left")

    def enter(self, name, room):
        """Join under `name`, or a name that is typed, until the server accepts one."""
        while not self.name:
            if name is None and self.screen.interactive:
                name = self.screen.ask("Your name: ")
            name = "_".join((name or "").split())    # a second word would be a room
            why = self.join(name, room)
            if self.name and room and not name:      # JOIN takes no room without a name: so go
                self.join(self.name, room)           # there now, by the name the server chose
            if why and not self.screen.interactive:
                self.screen.end(1, f"{why}; start again with another --name or --room")
            name = None

    def talk(self):
        """Send each line that is typed as a message, or carry it out if it is a command."""
        while True:
            line = self.screen.ask("> ")
            command, *words = line.split() or [""]
            if not line.startswith("/") or line.startswith("//"):
                self.say(line[1:] if line.startswith("/") else line)
            elif command in ("/who", "/rooms"):
                self.send(command[1:].upper())
            elif command in ("/join", "/name") and len(words) == 1:
                self.join(*(words if command == "/name" else [self.name, *words]))
            elif command == "/quit":
                return
            else:
                if command != "/help":
                    self.screen.show(f"* unknown command or wrong arguments: {line}; the commands:")
                self.screen.show((__doc__ or "").split("\n\n")[-1].strip())     # from the top

    def say(self, text):
        """Send `text` as MSG; if too long, as several, never cutting a character in two."""
        data = text.encode("utf-8", "replace")
        while data.strip():
            piece = data[:1024 - len("MSG ")].decode("utf-8", "ignore")      # no half character
            self.send(f"MSG {piece}")
            if self.screen.rows():           # otherwise the typed line stays visible
                self.hear(f"MSG {self.name} {piece}")
            data = data[len(piece.encode()):]

    def join(self, name, room=None):
        """Send JOIN, wait for the answer; return why it was refused (str, empty if it was not)."""
        self.send(f"JOIN {name} {room or ''}".rstrip() if name else "JOIN")
        while True:
            with contextlib.suppress(queue.Empty):
                return self.answers.get(timeout=POLL_SECONDS)

    def send(self, request):
        """Send one request (str). Raises OSError."""
        self.sock.sendall(request.encode("utf-8", "replace") + b"\n")

    def read(self):
        """Show what the server says until its BYE or the end of the connection; then end."""
        try:
            for line in self.lines():
                self.hear(line)
            self.screen.end(1, "connection lost; start again when the server is back")
        except OSError:                      # our output cannot be written any more
            self.screen.end(0, "you have left")
        except Exception:                    # a mistake in this program
            self.screen.end(1, traceback.format_exc())

    def lines(self):
        """Yield each line from the server (str, safe to show) until the connection has ended."""
        rest = b""
        with contextlib.suppress(OSError):   # a reset ends it, too
            while data := self.sock.recv(MAX_WAITING):
                *lines, rest = (rest[:MAX_WAITING + 1] + data).replace(b"\r\n", b"\n").split(b"\n")
                for line in lines:
                    text = line.decode("utf-8", "replace").translate(SAFE_TEXT)
                    yield text if len(line) <= MAX_WAITING else "overlong line omitted"

    def hear(self, line):
        """Show a line from the server (str); remember our name; end at BYE."""
        verb, _, rest = line.partition(" ")
        word, _, text = rest.partition(" ")
        if verb == "BYE":
            self.screen.end(0 if self.name or self.goodbye else 1, self.goodbye or rest)
        if verb == "WELCOME":                # WELCOME room name greeting
            self.name, _, text = text.partition(" ")
        notices = {"WELCOME": f"* {text} You are {self.name} in {word}.", "ERROR": f"! {rest}",
                   "JOINED": f"* {word} joined", "LEFT": f"* {word} left",
                   "WHO": f"* in this room: {rest.replace(' ', ', ')}",
                   "ROOMS": f"* rooms: {rest.replace(' ', ', ').replace('=', ' with ') or 'none'}"}
        colour = COLOURS[sum(word.casefold().encode()) % len(COLOURS)]
        message = f"{self.screen.styled(word, f'38;5;{colour}')}: {text}"
        notice = self.screen.styled(notices.get(verb, f"? {line}"))
        self.screen.show(message if verb == "MSG" else notice)
        if verb in ("WELCOME", "ERROR"):
            with contextlib.suppress(queue.Full):            # nobody waits
                self.answers.put_nowait(rest if verb == "ERROR" else "")


class Screen:
    """The terminal. You type in the rows at the bottom; above them the conversation scrolls."""
    # Whatever edits the typed line (readline, the Windows console) never notices a message: it
    # leaves those rows and the cursor as they were.
    def __init__(self):
        for name in ("stdin", "stdout", "stderr"):           # None: closed by whoever started us
            setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))
        self.interactive = sys.stdin.isatty()
        console = self.interactive and sys.stdin is sys.__stdin__    # IDLE replaces stdin
        self.modes = termios.tcgetattr(sys.stdin) if termios and console else None
        self.divided = (console and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
                        and os.system("") == 0)      # on Windows, turns escape codes on
        with contextlib.suppress(AttributeError, OSError):   # what IDLE or Windows lacks
            sys.stdin.reconfigure(errors="replace")
            sys.stdout.reconfigure(errors="replace")
            os.set_blocking(sys.stdout.fileno(), True)
            print("\n" * INPUT_ROWS if self.rows() else "", end="", flush=True)      # make room
            readline.parse_and_bind("set horizontal-scroll-mode on")     # long lines do not wrap
            readline.parse_and_bind("bind ^L ed-redisplay" if "libedit" in readline.__doc__
                                    else "Control-l: redraw-current-line")   # keep the rest

    def rows(self):
        """Return how many rows the conversation has; 0 where the screen cannot be divided."""
        rows = os.get_terminal_size(sys.stdout.fileno()).lines if self.divided else 0
        return rows - min(INPUT_ROWS, rows // 2) if rows > 2 else 0

    def bottom(self):
        """Return the codes (str) that clear the rows at the bottom and go to the first of them."""
        return f"\033[{self.rows() + 1}H\033[J" if self.rows() else ""

    def show(self, text):
        """Show `text` (str) below the rest of the conversation. Raises OSError."""
        rows = self.rows()
        if not rows:
            return print(text, flush=True)
        # Save the cursor (ESC 7); let only the conversation scroll (CSI 1;n r); go to its last row
        # (CSI n H), where "\n" scrolls it; undo that (CSI r); restore the cursor (ESC 8). All in
        # one write: the stream and the terminal have a lock each, so nothing gets in between.
        text = f"\0337\033[1;{rows}r\033[{rows}H\n{text}\033[r\0338".replace("\n", "\r\n")
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "replace"))
        return sys.stdout.buffer.flush()

    def ask(self, prompt):
        """Return the next line typed (str). Raises EOFError, KeyboardInterrupt, OSError."""
        print(self.bottom(), end="", flush=True)
        return input(prompt if self.interactive else "").replace("\n", " ").translate(SAFE_TEXT)

    def styled(self, text, style="2"):
        """Return `text` with codes for a style (dim by default), if the screen wants them."""
        wanted = self.divided and "NO_COLOR" not in os.environ
        return f"\033[{style}m{text}\033[0m" if wanted else text

    def end(self, status, reason):
        """Say why, give the terminal back, and end the process, whatever its threads are doing."""
        try:
            threading.Timer(1, os._exit, [status]).start()   # in case the output is stuck
            print(self.bottom(), end="", flush=True)
            line = f"client.py: {reason}" if status else self.styled(f"* {reason}")
            print(line, file=sys.stderr if status else sys.stdout, flush=True)
        finally:
            if self.modes:               # otherwise the shell would not echo what is typed
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self.modes)
            os._exit(status)


def connect(host, port):
    """Return a connected socket; if that is impossible, exit with status 1."""
    try:
        sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except (OSError, UnicodeError) as error:         # UnicodeError: not even a host name
        why = getattr(error, "strerror", None) or error
        sys.exit(f"client.py: cannot connect to {host}:{port}: {why}; check the address and port")
    sock.settimeout(None)
    for name, value in SOCKOPTS.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
        with contextlib.suppress(AttributeError, OSError):   # unknown here, or refused
            sock.setsockopt(level, getattr(socket, name), value)
    return sock


def is_name(word):
    """Return whether `word` is a name: letters, marks (not first) and digits of any script, _ -."""
    kinds = ["L" if sign in "_-" else unicodedata.category(sign)[0] for sign in word]
    return 0 < len(word) <= 20 and kinds[0] != "M" and set(kinds) <= {"L", "M", "N"}


def main():
    """Run the client. Exit status: 0 after leaving, or BYE once joined; 1 if it failed."""
    parser = argparse.ArgumentParser(description="A chatroom client. Type /help for its commands.")
    parser.add_argument("host", help="address of the server, 127.0.0.1 for this machine")
    parser.add_argument("port", type=int, help="the server's port")
    parser.add_argument("--name", help="your name; asked for if not given")
    parser.add_argument("--room", help="the room to join; the server's oldest if not given")
    args = parser.parse_args()
    if (args.port not in range(1, 65536) or args.name is not None and not args.name.strip()
            or args.room is not None and not is_name(unicodedata.normalize("NFC", args.room))):
        parser.error("port: 1 to 65535; --name: not empty; --room: 1 to 20 letters, digits, _ or -")
    with contextlib.suppress(KeyboardInterrupt):     # while there is nothing to leave yet
        Chat(connect(args.host, args.port), Screen()).run(args.name, args.room)


if __name__ == "__main__":
    main()
