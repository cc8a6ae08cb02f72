"""One end of a lifeline in a process of its own, for the tests of `engine.lifeline`.

`python -m tests.scripts.lifeline lead WORLD_SIZE` prints its port and `ready`;
`... follow PORT RANK` prints `ready`. Both then do what stdin says: close, fail TEXT, or nothing.
"""

import socket
import sys
import time

from mistral_chat.engine.ranks.lifeline import Lifeline


def main(role: str, *numbers: str) -> None:
    if role == "lead":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            accepted = [listener.accept()[0] for _ in range(int(numbers[0]) - 1)]
        lifeline = Lifeline({connection.recv(1)[0]: connection for connection in accepted})
    else:
        connection = socket.create_connection(("127.0.0.1", int(numbers[0])))
        connection.sendall(bytes([int(numbers[1])]))
        lifeline = Lifeline({0: connection})
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
