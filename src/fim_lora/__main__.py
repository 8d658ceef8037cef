"""`python -m fim_lora`: the command `fim-lora`, for environments whose scripts are not on the path."""

import sys

from fim_lora_command import main

if __name__ == "__main__":
    sys.exit(main())
