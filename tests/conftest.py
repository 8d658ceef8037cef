import os
import sys
from pathlib import Path

# Tests never ask a hub, and never wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
