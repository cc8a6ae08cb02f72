"""What a shell is to a command in a window: its parent, which says how it ended, and stays.

`python -m tests.scripts.shell MODULE WORDS` forks `python -m MODULE WORDS`; see `tests.warm`.
"""

import os
import sys
import time

from tests.warm import become

if __name__ == "__main__":
    pid = os.fork()
    if not pid:
        module, *words = sys.argv[1:]
        become({"module": module, "words": words, "env": dict(os.environ), "session": "same"})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"code {code if code >= 0 else 128 - code}", flush=True)
    time.sleep(600)
