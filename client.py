#!/usr/bin/env python3
"""A chatroom client: one thread at the keyboard, one at the socket. The server is server.py.

    python client.py 127.0.0.1 12345
    echo "hello from a script" | python client.py 127.0.0.1 12345 --name robot

The main thread waits for a line to be typed, and sends it. The reader thread waits for lines from
the server, and shows them. (JOIN is answered with WELCOME or ERROR, LEAVE with BYE; for the other
lines see server.py.) At a terminal you type in the bottom rows, and the conversation scrolls above
them. When the connection ends, the main thread may still wait for a line to be typed. So the reader
thread ends the whole process.
"""
import argparse
import contextlib
import os
import random
import re
import socket
import sys
import threading
import time
import traceback
try:
    import readline                      # gives input() line editing and a history
    import termios                       # reads and sets the modes of the terminal, such as echo
except ImportError:                      # Windows, where the console edits lines itself
    readline = termios = None
HELP = """\
/who        who is in this room?
/rooms      which rooms are there?
/join ROOM  go to another room; it is created if necessary
/name NAME  take another name
/quit       leave; so do Ctrl-C and Ctrl-D (Windows: Ctrl-Z, Enter)
//text      say "/text"; anything else is sent as a message"""
MAX_REQUEST = 1024           # bytes in a line to the server, its ending not counted
MAX_LINE = 64 * 1024         # bytes in a line from the server; a notice replaces a longer one
POLL_SECONDS = 0.5           # main waits in steps of this, so that Ctrl-C works on Windows, too


class Chat:
    """The conversation. Main runs `run`, the reader thread `read`. `screen.exit` never returns."""
    def __init__(self, sock, screen):
        self.sock = sock                     # main sends on it, the reader thread receives
        self.screen = screen
        # No lock is needed. The reader thread sets `name` and `error`, then `answered`, for which
        # `join` waits. Main sets `has_left`, then sends LEAVE: so it is set when BYE comes.
        self.name = ""                       # our name, as the last WELCOME said
        self.error = None                    # the text of the last ERROR; None after WELCOME
        self.answered = threading.Event()    # a flag that a thread can wait for
        self.has_left = False                # whether all has been said

    def run(self, name, room):
        """Start the reader thread, hold the conversation, and end the process."""
        threading.Thread(target=self.read, name="reader", daemon=True).start()
        try:
            self.converse(name, room)
        except KeyboardInterrupt:            # Ctrl-C; the server sees that the connection ends
            if self.name and self.screen.interactive:
                self.screen.exit(0, "you have left")
            else:
                self.screen.exit(130, "interrupted")     # 128 + SIGINT, as a shell expects
        except OSError as error:             # of the keyboard or the screen
            self.screen.exit(1, f"cannot read or write: {error.strerror}")

    def converse(self, name, room):
        """Join, send what is typed, leave; then wait for BYE, at which the reader thread exits."""
        try:
            self.enter(name, room)
            self.talk()
        except EOFError:                     # Ctrl-D, or the end of a script's input
            pass
        self.has_left = True
        self.send("LEAVE")
        self.wait_for_the_end()

    def enter(self, name, room):
        """Join. If that is refused a person is asked again, and a script ends."""
        if not name and self.screen.interactive:
            name = self.screen.ask("Your name: ")
        while not self.join(name, room):
            if not self.screen.interactive:
                self.screen.exit(1, f"{self.error}; start again with another --name or --room")
            name = self.screen.ask("Your name: ")
            if room:
                room = self.screen.ask("The room: ")

    def talk(self):
        """Send each line that is typed as a message, or carry it out if it is a command."""
        while True:
            line = self.screen.ask("> ")
            words = line.split()
            command = words[0] if words else ""
            if not line.startswith("/"):
                self.say(line)
            elif line.startswith("//"):
                self.say(line[1:])
            elif command in ("/who", "/rooms"):
                self.send(command[1:].upper())
            elif command == "/name" and len(words) == 2:
                self.join(words[1])
            elif command == "/join" and len(words) == 2:
                self.join(self.name, words[1])
            elif command == "/quit":
                return
            elif command == "/help":
                self.screen.show(HELP)
            else:
                self.screen.show(f"* unknown command or wrong arguments: {line}; see /help")

    def say(self, text):
        """Send `text` (str) as MSG; if it is too long, as several; if it is blank, as none."""
        for piece in pieces(text):
            self.send(f"MSG {piece}")
            self.screen.show_own_message(self.name, piece)   # the server does not send it to us

    def join(self, name, room=""):
        """Send JOIN and wait for the answer; return whether it was WELCOME."""
        self.answered.clear()                # an ERROR that has come before is not the answer
        self.send(join_request(name, room))
        while not self.answered.wait(POLL_SECONDS):
            pass                             # wait on
        return self.error is None

    def send(self, request):
        """Send one request (str)."""
        try:
            self.sock.sendall(request.encode("utf-8", "replace") + b"\n")
        except OSError:                      # disconnected: the reader thread sees that, and exits
            self.wait_for_the_end()

    def wait_for_the_end(self):
        """Wait until the reader thread ends the process."""
        while True:
            time.sleep(POLL_SECONDS)

    def read(self):
        """Show what the server sends until its BYE or the end of the connection; then end."""
        try:
            for line in lines_from(self.sock):
                self.hear(line)
            self.screen.exit(1, "the connection has ended without BYE")
        except OSError as error:             # of the screen; one of the socket just ends the loop
            self.screen.exit(1, f"cannot write: {error.strerror}")
        except Exception:                    # a mistake in this program
            self.screen.exit(1, traceback.format_exc())

    def hear(self, line):
        """Show a line from the server (str). Note the answer to JOIN. End at BYE."""
        verb, _, rest = line.partition(" ")
        if verb == "MSG":                    # MSG name text
            name, _, text = rest.partition(" ")
            self.screen.show_message(name, text)
        elif verb == "WELCOME":              # WELCOME room name text
            self.welcome(rest)
        elif verb == "ERROR":                # ERROR text
            if self.name or self.screen.interactive:         # otherwise `enter` shows it
                self.screen.show_notice(f"! {rest}")
            self.error = rest
            self.answered.set()
        elif verb in ("JOINED", "LEFT"):     # JOINED name
            self.screen.show_notice(f"* {rest} {verb.lower()}")
        elif verb == "WHO":                  # WHO name name ...
            self.screen.show_notice("* in this room: " + rest.replace(" ", ", "))
        elif verb == "ROOMS":                # ROOMS room=count room=count ...
            self.screen.show_notice("* rooms: " + rest.replace(" ", ", ").replace("=", " with "))
        elif verb == "BYE":                  # BYE text
            self.bye(rest)
        else:
            self.screen.show_notice(f"? {line}")

    def welcome(self, text):
        """Note and show where we are (text: "room name greeting"). It is the answer to JOIN."""
        room, _, name_and_greeting = text.partition(" ")
        self.name, _, greeting = name_and_greeting.partition(" ")
        self.screen.show_notice(f"* {greeting} You are {self.name} in {room}.")
        self.error = None
        self.answered.set()

    def bye(self, reason):
        """End, with status 0 if we have left or, at a terminal, were in a room; else with 1."""
        if self.has_left:
            self.screen.exit(0, "you have left")
        elif self.name and self.screen.interactive:
            self.screen.exit(0, reason)
        else:
            self.screen.exit(1, reason)


# ---- The terminal --------------------------------------------------------------------------------
INPUT_ROWS = 3                           # at the bottom, for what is being typed
COLOURS = [27, 28, 30, 31, 64, 98, 129, 130, 161, 163]   # of 256: legible on white and on black
ESC, CSI = "\033", "\033["               # the beginnings of codes for the terminal


class Screen:
    """The terminal. You type in the rows at the bottom; above them the conversation scrolls."""
    # Both threads write here. The reader thread shows a message with one write, which leaves the
    # cursor where it was. So nothing gets in between, and whatever edits the typed line (readline,
    # the Windows console) never notices.
    def __init__(self):
        self.open_streams()
        self.interactive = sys.stdin.isatty()
        console = self.interactive and sys.stdin is sys.__stdin__    # IDLE replaces stdin
        self.divisible = (console and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
                          and os.system("") == 0)    # on Windows this turns escape codes on
        self.modes = termios.tcgetattr(sys.stdin) if termios and console else None
        self.prompt_lock = threading.Lock()          # see exit
        self.height = sum(self.size())               # of the terminal, at the last write
        if readline and self.divisible:
            self.set_up_readline()
        if self.divisible:
            self.write("\n" * INPUT_ROWS)            # make room: keep what the shell has shown

    def open_streams(self):
        """Make sure that input and output exist, and take any character."""
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:           # closed by whoever started us
                setattr(sys, name, open(os.devnull, "r+"))
        for stream in (sys.stdin, sys.stdout):
            with contextlib.suppress(AttributeError):            # unknown in IDLE
                stream.reconfigure(errors="replace")
        with contextlib.suppress(AttributeError, OSError):       # unknown in IDLE and on Windows
            os.set_blocking(sys.stdout.fileno(), True)

    def set_up_readline(self):
        """Keep a long line in its row, and the conversation on the screen at Ctrl-L."""
        if "libedit" in (readline.__doc__ or ""):    # on macOS: another library, the same name
            readline.parse_and_bind("bind ^L ed-redisplay")
        else:
            readline.parse_and_bind("set horizontal-scroll-mode on")
            readline.parse_and_bind("Control-l: redraw-current-line")

    def size(self):
        """Return how many rows the conversation has, and the input; 0, 0 if it is not divided."""
        height = os.get_terminal_size(sys.stdout.fileno()).lines if self.divisible else 0
        if height < 3:
            return 0, 0
        input_rows = min(INPUT_ROWS, height // 2)
        return height - input_rows, input_rows

    def make_room(self, free):
        """Return codes (str) that keep `free` rows free below the cursor, if the height changed."""
        # A window made lower takes these rows away. ESC D goes a row down, and scrolls if there is
        # none; CSI n A goes n rows up again. Where there are enough rows nothing moves.
        height = sum(self.size())
        if height == self.height or free < 1:
            return ""
        self.height = height
        return f"{ESC}D" * free + f"{CSI}{free}A"

    def write(self, text):
        """Write `text` (str) at once, in one piece. Raises OSError."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def show(self, text):
        """Show `text` (str) below the rest of the conversation. Raises OSError."""
        rows, input_rows = self.size()
        if not rows:
            self.write(f"{text}\n")
            return
        text = text.replace("\n", "\r\n")
        self.write(self.make_room(input_rows - 1)
                   + f"{ESC}7"               # save the cursor
                   + f"{CSI}1;{rows}r"       # from now on only the conversation scrolls
                   + f"{CSI}{rows}H"         # go to its last row
                   + f"\r\n{text}"           # the line feed scrolls it
                   + f"{CSI}r"               # from now on the whole screen scrolls
                   + f"{ESC}8")              # restore the cursor

    def show_message(self, name, text):
        """Show what somebody says; the same name always has the same colour."""
        colour = COLOURS[sum(name.casefold().encode()) % len(COLOURS)]
        name = self.styled(name, f"38;5;{colour}")
        self.show(f"{name}: {text}")

    def show_own_message(self, name, text):
        """Show what one has said oneself, if the next prompt clears the row it was typed in."""
        if self.size() != (0, 0):
            self.show_message(name, text)

    def show_notice(self, text):
        """Show what is not a message, dimmed."""
        self.show(self.styled(text, "2"))

    def styled(self, text, style):
        """Return `text` with codes for a style around it, if the terminal wants them."""
        wanted = self.divisible and "NO_COLOR" not in os.environ
        return f"{CSI}{style}m{text}{CSI}0m" if wanted else text

    def bottom(self):
        """Return the codes (str) that clear the rows at the bottom, and go to the first of them."""
        rows, input_rows = self.size()
        if not rows:
            return ""
        # Enter has usually gone one row down already: so there is one row less to keep free.
        return self.make_room(input_rows - 2) + f"{CSI}{rows + 1}H{CSI}J"

    def ask(self, prompt):
        """Return the next line typed (str). Raises EOFError, KeyboardInterrupt, OSError."""
        # `exit` takes this lock for good: from then on main gets no further than here. It is not
        # held in input(), or `exit` would have to wait for somebody to type.
        with self.prompt_lock:
            self.write(self.bottom())
        line = input(prompt if self.interactive else "")
        return safe(line.replace("\n", " "))             # readline may paste several lines as one

    def exit(self, status, reason):
        """Say why, give the terminal back, and end the process, whatever its threads are doing."""
        # input() changes the modes of the terminal. If that came last, the shell would not echo. So
        # we let no prompt begin any more, say why, give an input() that was just beginning 0.05 s
        # to change the modes, and put them back.
        try:
            threading.Timer(1, self.restore_and_exit, [status]).start()      # if output is stuck
            self.prompt_lock.acquire()
            if self.divisible:
                print(self.bottom(), end="", flush=True)
            if status:
                print(f"client.py: {reason}", file=sys.stderr, flush=True)
            else:
                print(self.styled(f"* {reason}", "2"), flush=True)
            time.sleep(0.05)
        finally:
            self.restore_and_exit(status)

    def restore_and_exit(self, status):
        """Put the modes of the terminal back, and end the process: in C, tcsetattr and _exit."""
        try:
            if self.modes:
                termios.tcsetattr(sys.stdin, termios.TCSANOW, self.modes)
        finally:
            os._exit(status)


# ---- The connection ------------------------------------------------------------------------------
CONNECT_SECONDS = 10                     # how long to wait for a connection
# See server.py. TCP_USER_TIMEOUT is not here: it would end the connection of somebody from whom the
# server takes data at a slow pace. With a small send buffer not much piles up on the way.
SOCKOPTS = {"SO_SNDBUF": 64 * 1024, "SO_RCVBUF": 64 * 1024, "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 20,
            "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# What must never reach a terminal, whatever the server sends: see server.py.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def safe(text):
    """Return `text` with spaces for its tabs, and U+FFFD for what is UNSAFE."""
    return UNSAFE.sub("\ufffd", text.replace("\t", " "))


def lines_from(sock):
    """Yield the lines (str) that the server sends, until the connection has ended, or was reset."""
    unfinished = b""
    while True:
        try:
            data = sock.recv(MAX_LINE)
        except OSError:
            return
        if data == b"":
            return
        # Cut at newlines, as the server does; what follows the last one has no end yet.
        lines = (unfinished + data).replace(b"\r\n", b"\n").split(b"\n")
        unfinished = lines.pop()[:2 * MAX_LINE]      # enough to be seen to be too long
        for line in lines:
            text = safe(line.decode("utf-8", "replace"))
            yield text if len(line) <= MAX_LINE else "(a line that is too long)"


def join_request(name, room):
    """Return a JOIN request (str). Name and room (str) may be empty, or more than one word."""
    name = "_".join(name.split())
    room = "_".join(room.split())
    if room and not name:                            # JOIN takes no room without a name
        name = f"guest{random.randrange(10 ** 6)}"
    return f"JOIN {name} {room}".strip()


def pieces(text):
    """Cut `text` (str) so that each piece fits into a request; return a list of str."""
    result = []
    data = text.encode("utf-8", "replace")
    while data.strip():
        piece = data[:MAX_REQUEST - len("MSG ")]
        piece = piece.decode("utf-8", "ignore")      # drops a character that was cut in two
        data = data[len(piece.encode()):]
        result.append(piece)
    return result


def connect(host, port):
    """Return a connected socket; if that is impossible, exit with status 1."""
    try:
        sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except (OSError, UnicodeError) as error:         # UnicodeError: not even a host name
        why = getattr(error, "strerror", None) or error
        sys.exit(f"client.py: cannot connect to {host}:{port}: {why}; check the address and port")
    sock.settimeout(None)                            # from now on recv waits as long as it takes
    for name, value in SOCKOPTS.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
        with contextlib.suppress(AttributeError, OSError):       # unknown here, or refused
            sock.setsockopt(level, getattr(socket, name), value)
    return sock


def main():
    """Run the client. Exit status: see `Chat.run` and `Chat.bye`; 1: cannot connect; 2: usage."""
    parser = argparse.ArgumentParser(description="A chatroom client. Type /help for its commands.")
    parser.add_argument("host", help="address of the server, 127.0.0.1 for this machine")
    parser.add_argument("port", type=int, help="the server's port")
    parser.add_argument("--name", default="", help="your name; a person is asked for it")
    parser.add_argument("--room", default="", help="the room; the server's oldest if not given")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:
        parser.error("port: 1 to 65535")
    try:
        chat = Chat(connect(args.host, args.port), Screen())
    except KeyboardInterrupt:
        sys.exit(130)                                # see Chat.run
    chat.run(args.name, args.room)


if __name__ == "__main__":
    main()
