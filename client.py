#!/usr/bin/env python3
"""A chatroom client: one thread at the keyboard, one at the socket. The server is server.py.

    python client.py 127.0.0.1 12345
    echo "hello from a script" | python client.py 127.0.0.1 12345 --name robot

/who        who is in this room?
/rooms      which rooms are there?
/join ROOM  go to another room; it is made if need be
/name NAME  take another name
/quit       leave; so does Ctrl-D
//text      say "/text"; whatever else you type is said

The main thread waits for a line to be typed, and sends it. The reader thread waits for lines from
the server. It does not write them itself, but rings a bell: a signal, which interrupts the main
thread, and that writes them above what is being typed. So only one thread uses the terminal.
(Windows has no such signal: there the reader thread writes.)
"""
import argparse
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading

try:
    import readline                      # gives input() line editing and a history
    # Its functions in C, which Python does not offer. (PyDLL: no other thread runs meanwhile.)
    editor = ctypes.PyDLL(getattr(readline, "__file__", None))
    redraw = editor.rl_forced_update_display
    clear = getattr(editor, "rl_clear_visible_line", None)       # libedit (macOS) has none
    state = clear and ctypes.c_ulong.in_dll(editor, "rl_readline_state")
except (ImportError, AttributeError, OSError, ValueError):       # Windows has no readline
    redraw = None

HELP = __doc__.split("\n\n")[2]          # the commands, from above
MAX_TEXT = 1024 - len("MSG ")            # bytes of text that fit into one request
MAX_WAITING = 64 * 1024                  # bytes: in the kernel, each way (its own megabytes would
                                         # keep a flood going for minutes), or of an endless line
CONNECT_SECONDS = 10                     # a server that has not answered by then is not there
GOODBYE_SECONDS = 1                      # how long Ctrl-C waits for the server's BYE
BELL = getattr(signal, "SIGUSR1", None)  # Windows has none

# What must not reach the terminal, whatever the server says; it has the same table.
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
SAFE_TEXT = {**dict.fromkeys(UNSAFE, "\ufffd"), ord("\t"): " "}
# The colours of names: those of the 256 that can be read on white and on black.
COLOURS = [27, 28, 30, 31, 64, 98, 129, 130, 161, 163]


class Terminal:
    """Keyboard and screen. Only the main thread uses them; the reader thread only calls show()."""

    def __init__(self):
        for name in ("stdin", "stdout", "stderr"):           # None: closed by whoever started us
            setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))
        sys.stdin.reconfigure(errors="replace")
        # Unbuffered: the bell may write in the middle of a write, which a buffer does not allow.
        self.screen = open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.escape_codes = (self.interactive and os.environ.get("TERM") != "dumb"
                             and (os.name != "nt" or "WT_SESSION" in os.environ))
        self.redraws = self.escape_codes and BELL and redraw is not None
        self.prompt = ""                 # what stands before the line that is being typed
        self.leaving = False             # the main thread does not wait for lines any more
        self.waiting = []                # what the reader thread wants shown; None: the end
        self.shown = threading.Event()   # set when that has been done
        if BELL:
            signal.signal(BELL, self.answer_bell)

    def ask(self, prompt):
        """Return the next line typed (str). Raises EOFError, KeyboardInterrupt, OSError."""
        self.prompt = prompt if self.interactive else ""
        try:
            if self.redraws:             # what readline writes when the bell rings would be lost
                signal.siginterrupt(BELL, False)
            return input(self.prompt).replace("\n", " ")     # Ctrl-V Ctrl-J types a newline
        except (EOFError, KeyboardInterrupt, OSError):
            print(end="\n" if self.prompt else "")           # leave the line of the prompt
            raise
        finally:
            self.prompt = ""
            if self.redraws:             # wait() and sendall() must be interrupted
                signal.siginterrupt(BELL, True)

    def show(self, lines):
        """Have the main thread write `lines` (str) or, if None, stop waiting for anything."""
        if not BELL:
            return self.write(lines or "* the server has gone; press Enter")
        self.shown.clear()
        self.waiting.append(lines)
        # A signal just before input() waits for a key is noticed only after that key: ring again.
        while not self.shown.is_set():
            signal.pthread_kill(threading.main_thread().ident, BELL)
            self.shown.wait(0.01)

    def answer_bell(self, _signum, _frame):
        """Do what show() asks for. Python runs this in the main thread, whatever that waits for."""
        with contextlib.suppress(IndexError):                # it has been done: the bell rang twice
            lines = self.waiting.pop()
            try:
                if lines is not None:
                    self.write(lines)
                elif not self.leaving:
                    raise ConnectionError                    # out of input(), wait() or sendall()
            finally:
                self.shown.set()

    def write(self, lines):
        """Write `lines` (str) above the prompt and what is being typed. Raises OSError."""
        # GNU readline tells whether it has drawn the prompt (RL_STATE_CALLBACK); libedit does not.
        editing = self.redraws and self.prompt and (not clear or state.value & 0x80000)
        if editing and clear:
            clear()
            editor.fflush(None)
        before = "\r\033[J" if self.escape_codes else "\r" if self.prompt else ""
        after = "" if self.redraws else self.prompt
        data = f"{before}{lines}\n{after}".encode(sys.stdout.encoding, "replace")
        try:
            while data:
                data = data[self.screen.write(data):]
        except OSError:                  # nobody reads our output any more: leave
            if not self.leaving:
                raise
        if editing:
            redraw()

    def styled(self, text, style="2"):
        """Return `text` with the codes for a style (dimmed by default), where they are wanted."""
        colours = self.escape_codes and "NO_COLOR" not in os.environ
        return f"\033[{style}m{text}\033[0m" if colours else text


class Chat:
    """The conversation: main sends what is typed, the reader thread hears what the server says.

    What the two share needs no lock. Only main sends, only the reader thread receives. The reader
    thread assigns `name`, `refusal` and `end`, each in one step, and main looks at them when
    `answered` is set. What is to be shown waits alone: the reader thread waits until it is shown.
    """

    def __init__(self, terminal, sock):
        self.terminal = terminal
        self.sock = sock
        self.name = None                     # who we are, as the last WELCOME said
        self.refusal = None                  # the answer to JOIN: what ERROR said, "" for WELCOME
        self.answered = threading.Event()    # set when that has been shown
        self.end = None                      # (exit status, reason) when the connection has ended
        self.reader = threading.Thread(target=self.read, name="reader", daemon=True)

    # The main thread

    def run(self, name, room):
        """Join, say what is typed, leave. Ends the process if the connection is lost."""
        # The ways out: EOFError is Ctrl-D (/quit returns). KeyboardInterrupt is Ctrl-C: it may have
        # cut a line, so no LEAVE. OSError comes from the bell or from send when the connection has
        # ended, and from write when nobody reads our output.
        with contextlib.suppress(OSError, KeyboardInterrupt):
            try:
                self.reader.start()
                with contextlib.suppress(EOFError):
                    self.enter(name, room)
                    self.talk()
            finally:
                self.terminal.leaving = True         # from here on the bell raises nothing
            self.send("LEAVE")
            self.reader.join()                       # BYE comes when all has been delivered
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.reader.join(GOODBYE_SECONDS)
        status, reason = self.end or (0, "you have left")
        if status:
            sys.exit(f"client.py: {reason}")
        self.notice(reason)

    def enter(self, name, room):
        """Join under `name`, or else as what is typed, until the server accepts it."""
        while not self.name and not self.end:
            typed = self.terminal.ask("Your name: ") if name is None else name
            self.join("_".join(typed.split()), room)         # what follows a space would be a room
            if self.refusal and not self.terminal.interactive:
                sys.exit(f"client.py: {self.refusal}; start again with another --name")
            name = None

    def talk(self):
        """Say each line that is typed, or carry it out if it is a command."""
        while not self.end:
            line = self.terminal.ask("> ")
            command, *words = line.split() or [""]
            if not line.startswith("/") or line.startswith("//"):        # //text says /text
                self.say(line[1:] if line.startswith("/") else line)
            elif command in ("/who", "/rooms"):
                self.send(command[1:].upper())
            elif command == "/join" and len(words) == 1:
                self.join(self.name, *words)
            elif command == "/name" and len(words) == 1:
                self.join(*words)
            elif command == "/quit":
                return
            else:
                if command != "/help":
                    self.notice(f"not a command: {' '.join(line.split())}; the commands are")
                self.terminal.write(HELP)

    def say(self, text):
        """Send `text` as MSG; in several, cut between characters, if it is longer than MAX_TEXT."""
        data = text.encode("utf-8", "replace")
        while data.strip():
            piece = data[:MAX_TEXT].decode("utf-8", "ignore")    # without half a character
            self.send(f"MSG {piece}")
            data = data[len(piece.encode()):]

    def join(self, name, room=None):
        """Send JOIN and wait for the answer, so that the next JOIN bears the right name."""
        self.refusal = None
        self.send(f"JOIN {name} {room}" if name and room else f"JOIN {name}")
        while self.refusal is None and not self.end:
            self.answered.wait()
            self.answered.clear()
        if room and not name and self.name:          # JOIN takes no room without a name: go there
            self.join(self.name, room)               # under the guest's name that the server chose

    def send(self, request):
        """Send one request (str). Raises OSError."""
        self.sock.sendall(request.encode("utf-8", "replace") + b"\n")

    def notice(self, text):
        """Write a notice of our own."""
        self.terminal.write(self.terminal.styled(f"* {text}"))

    # The reader thread

    def read(self):
        """Show what the server says, until its BYE or the end of the connection; then stop main."""
        with contextlib.suppress(OSError):           # a reset is an end as well
            for lines in received_lines(self.sock):
                shown = "\n".join(text for text in map(self.hear, lines) if text)
                if shown:
                    self.terminal.show(shown)
                if self.refusal is not None:
                    self.answered.set()
                if self.end:
                    break
        self.end = self.end or (1, "connection lost; start again when the server is back")
        self.answered.set()
        if not self.terminal.leaving:
            self.terminal.show(None)

    def hear(self, line):
        """Return what to show (str) for a line from the server; note what it says of us."""
        verb, _, rest = line.partition(" ")
        word, _, text = rest.partition(" ")
        words = ", ".join(rest.split())
        if verb == "MSG":
            colour = COLOURS[sum(word.casefold().encode()) % len(COLOURS)]
            return f"{self.terminal.styled(word, f'38;5;{colour}')}: {text}"
        if verb == "BYE":                            # main shows it, when the prompt has gone
            self.end = (0, "you have left" if self.terminal.leaving else rest)
            return ""
        if verb == "WELCOME":                        # WELCOME room name greeting
            self.name, _, text = text.partition(" ")
        if verb in ("WELCOME", "ERROR"):
            self.refusal = "" if verb == "WELCOME" else rest
        notices = {"WELCOME": f"* {text} You are {self.name} in {word}.", "ERROR": f"! {rest}",
                   "JOINED": f"* {word} joined", "LEFT": f"* {word} left",
                   "WHO": f"* in this room: {words}",
                   "ROOMS": f"* rooms: {words.replace('=', ' with ') or 'none'}"}
        return self.terminal.styled(notices.get(verb, f"? {line}"))


def received_lines(sock):
    """Yield lists of lines (str, safe to show), those that come together. Raises OSError.

    A line that is too long is replaced by a notice; an unfinished last line is dropped.
    """
    unfinished = b""
    while data := sock.recv(MAX_WAITING):
        *lines, unfinished = (unfinished + data).split(b"\n")
        unfinished = unfinished[:MAX_WAITING + 1]    # enough to see at its end that it is too long
        yield [line.decode("utf-8", "replace").rstrip("\r").translate(SAFE_TEXT)
               if len(line) <= MAX_WAITING else "a line that is too long has been left out"
               for line in lines]


def connect(host, port):
    """Return a connected socket; end the process with status 1 where that is not possible."""
    try:
        sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except (OSError, UnicodeError) as error:         # UnicodeError: not even a host name
        why = getattr(error, "strerror", None) or error
        sys.exit(f"client.py: cannot connect to {host}:{port}: {why}; are address and port right?")
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_WAITING)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MAX_WAITING)
    return sock


def main():
    """Run the client. Exit status: 0 after leaving or BYE, 1 without a connection or a name."""
    parser = argparse.ArgumentParser(description="A chatroom client. Type /help for its commands.")
    parser.add_argument("host", help="address of the server, 127.0.0.1 for this machine")
    parser.add_argument("port", type=int, help="the server's port")
    parser.add_argument("--name", help="your name; asked for if not given")
    parser.add_argument("--room", help="the room to join; the server's oldest if not given")
    options = parser.parse_args()
    if (options.port not in range(1, 65536) or options.name is not None and not options.name.strip()
            or options.room is not None and not re.fullmatch(r"[\w-]{1,20}", options.room)):
        parser.error("port: 1 to 65535; --name: not empty; --room: 1 to 20 letters, digits, _ or -")
    with contextlib.suppress(KeyboardInterrupt):     # while there is nothing to leave yet
        Chat(Terminal(), connect(options.host, options.port)).run(options.name, options.room)


if __name__ == "__main__":
    main()
