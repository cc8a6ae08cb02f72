"""`python -m mistral_chat`, and each rank that the launcher starts."""

import sys

from mistral_chat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
