"""One end of a lifeline in a process of its own, for the tests of `engine.lifeline`.

`python -m tests.scripts.lifeline lead WORLD_SIZE` prints its port and `ready`;
`... follow PORT RANK` prints `ready`. Both then do what stdin says: close, fail TEXT, or nothing.
"""

import socket
import sys
import time

from mistral_chat.engine.lifeline import Lifeline

SECRET = b"sixteen bytes...."[:16]


def main(role: str, *numbers: str) -> None:
    if role == "lead":
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        lifeline = Lifeline.lead(listener, int(numbers[0]), SECRET)
    else:
        lifeline = Lifeline.follow(("127.0.0.1", int(numbers[0])), int(numbers[1]), SECRET)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "close\n":
            lifeline.close()
            return
        if line.startswith("fail "):
            lifeline.fail(line.removeprefix("fail ").strip())
            return
    time.sleep(60)  # stdin has ended: what a busy rank looks like


if __name__ == "__main__":
    main(*sys.argv[1:])
